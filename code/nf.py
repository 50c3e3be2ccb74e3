"""Normalizing flow of MNIST: checkerboard couplings (Dinh et al. 2017) of logistic mixtures (Ho et al. 2019).

Pixels, dequantised by uniform noise, go through the logit and a chain of couplings to a standard normal z = f(v). Each
coupling sees one colour of a checkerboard and transforms the other, by an increasing map whose derivative is known.
After each level one colour is finished, and the other is coloured anew.

    log p(v) = log N(f(v); 0, I) + log |det df/dv|,    bits per dimension = -log p(v) / (784 log 2)    eq:flow, eq:bpd

    python code/nf.py    # test 1.044 bits per dimension, 1.034 with 8 draws of the noise; 4224 s
    (seed 0; AMD EPYC, 2 threads, torch 2.15.0+cu132)
"""

import math
import sys
from pathlib import Path

import cli  # before torch is loaded

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import judge
import mnist
import pictures
import training
from experiment import Run, log_mean_exp, save_samples, seconds_per_1000
from training import fixed_generator, fixed_normal

EVALUATION_IMAGES = 10_000  # of the training images; validation and test have as many
EVALUATION_BATCH = 250
INTERPOLATIONS, POINTS = 8, 9  # rows, and images in a row, both ends included


# Model


def dequantised(images: Tensor, noise: Tensor) -> Tensor:
    """Grey values 0 to 255 plus noise in [0, 1), of any one shape: values in [0, 256], eq:dequantisation."""
    return images.to(noise.dtype) + noise


def to_logits(v: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """The logit of p = a/2 + (1 - a) v/256, a = shrink, eq:logit, and each number's ladj: v (...) to (...) twice.

    1 - p is computed from 256 - v, not from p, which keeps its digits near 256.
    """
    log_p, log_q = (torch.log(shrink / 2 + (1 - shrink) / 256 * part) for part in (v, 256 - v))
    return log_p - log_q, math.log1p(-shrink) - math.log(256) - log_p - log_q


def from_logits(y: Tensor, shrink: float) -> Tensor:
    """The inverse of `to_logits`: values from 256 (0 - a/2)/(1 - a) to 256 (1 - a/2)/(1 - a)."""
    return 256 * (torch.sigmoid(y) - shrink / 2) / (1 - shrink)


def mixture_logit(x: Tensor, logits: Tensor, mu: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
    """z = logit F(x) with the CDF F of a mixture of logistics, and its ladj, log dz/dx, eq:mixture.

    x: (batch, ...); logits of pi, mu, log s: (batch, J, ...). Returns (batch, ...) twice. With u_j = (x - mu_j) / s_j,
    F = sum_j pi_j sigmoid(u_j), 1 - F = sum_j pi_j sigmoid(-u_j) and the density f = sum_j pi_j sigmoid(u_j)
    sigmoid(-u_j) / s_j, all three by their logarithms, z = log F - log(1 - F) and ladj = log f - log F - log(1 - F).
    """
    u = (x.unsqueeze(1) - mu) * torch.exp(-log_s)
    log_pi = torch.log_softmax(logits, 1)
    softplus = F.softplus(u, threshold=40)  # -log sigmoid(-u); the default threshold of 20 costs 2e-9 in float64
    below, above = log_pi + (u - softplus), log_pi - softplus
    log_below, log_above, log_density = (torch.logsumexp(each, 1) for each in (below, above, below - softplus - log_s))
    return log_below - log_above, log_density - log_below - log_above


def invert_mixture(z: Tensor, logits: Tensor, mu: Tensor, log_s: Tensor, steps: int = 300) -> Tensor:
    """x with logit F(x) = z: z (batch, ...) to (batch, ...), the mixture as in mixture_logit.

    logit F lies between the least and the greatest u_j, hence x between the least and the greatest of mu_j + s_j z.
    Newton's method inside that bracket, which every evaluation narrows; a bisection step where Newton's would leave it
    or is more than half as long as the one before. Raises RunError if a number has not converged after `steps`.
    """
    ends = mu + torch.exp(log_s) * z.unsqueeze(1)
    low, high = ends.amin(1), ends.amax(1)
    x, length = low + (high - low) / 2, high - low
    done = torch.zeros_like(x, dtype=torch.bool)
    precision = 4 * torch.finfo(x.dtype).eps
    for _ in range(steps):
        reached, ladj = mixture_logit(x, logits, mu, log_s)
        low, high = torch.where(reached < z, x, low), torch.where(reached > z, x, high)
        step = (z - reached) * torch.exp(-ladj)
        close = precision * (1 + x.abs())
        done |= (step.abs() <= close) | (high - low <= close) | ((z - reached).abs() <= precision * (1 + z.abs()))
        if done.all():
            return x
        newton, middle = x + step, low + (high - low) / 2
        new = torch.where((low < newton) & (newton < high) & (step.abs() <= length / 2), newton, middle)
        x, length = torch.where(done, x, new), (new - x).abs()
    raise cli.RunError(f"the inverse of a mixture did not converge for {int((~done).sum())} of {done.numel()} numbers")


class Residual(nn.Module):
    """h + W2 SiLU(W1 SiLU(h)) with a 3 x 3 and a 1 x 1 convolution, (batch, hidden, height, width) to the same."""

    def __init__(self, hidden: int):
        super().__init__()
        self.near = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.mix = nn.Conv2d(hidden, hidden, 1)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mix(F.silu(self.near(F.silu(h))))


class Coupling(nn.Module):
    """Transforms x_b by what it sees of x_a, half of the numbers each: (batch, channels, height, width) both.

    hidden: channels of the conditioner. components: J logistics in the mixture before the affine map, with means from
    -spread to spread before training, and log-scales within a limit; with 0 there is the affine map alone.
    """

    def __init__(self, channels: int, hidden: int, components: int, spread: float, log_scale_limit: float):
        super().__init__()
        self.components, self.log_scale_limit = components, log_scale_limit
        self.outputs = 2 + 3 * components  # for each number
        last = nn.Conv2d(hidden, channels * self.outputs, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conditioner = nn.Sequential(first, Residual(hidden), nn.SiLU(), last)
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))
        means = torch.linspace(-spread, spread, components)  # components alike would stay alike
        self.spread = nn.Parameter(means.view(-1, 1, 1, 1).repeat(1, channels, 1, 1))

    def maps(self, x_a: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """What x_a says: log-scale and shift of the affine map, (batch, channels, height, width) each, and logits,
        means, log-scales of the mixture, (batch, J, channels, height, width) each."""
        x_a = x_a.contiguous(memory_format=torch.channels_last)
        out = self.conditioner(x_a).contiguous().unflatten(1, (self.outputs, -1))
        logits, mu, log_s = out[:, 2:].chunk(3, dim=1)
        mixture = logits, mu + self.spread, log_s.clamp(-self.log_scale_limit, self.log_scale_limit)
        return self.gain * torch.tanh(out[:, 0]), out[:, 1], mixture

    def forward(self, x_a: Tensor, x_b: Tensor) -> tuple[Tensor, Tensor]:
        """The transformed x_b, and the coupling's ladj, log |det| of its Jacobian, (batch,), eq:coupling."""
        log_scale, shift, mixture = self.maps(x_a)
        ladj = log_scale
        if self.components:
            x_b, ladj_mixture = mixture_logit(x_b, *mixture)
            ladj = ladj + ladj_mixture
        return x_b * torch.exp(log_scale) + shift, ladj.flatten(1).sum(1)

    def inverse(self, x_a: Tensor, z_b: Tensor) -> Tensor:
        """The x_b that `forward` maps to z_b."""
        log_scale, shift, mixture = self.maps(x_a)
        x_b = (z_b - shift) * torch.exp(-log_scale)
        return invert_mixture(x_b, *mixture) if self.components else x_b


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two colours of a grid's checkerboard, no neighbours in either: half of the numbers each.

    A square grid (batch, 1, height, width) gives two halves of shape (batch, 2, height/2, width/2): of its 2 x 2 blocks
    the main diagonals and the others. Such a half, a grid turned by 45 degrees, gives two of (batch, 1, height/2,
    width/2): its even rows and its odd ones, each a square grid again.
    """
    if x.shape[1] == 2:
        return x[:, :1], x[:, 1:]
    blocks = F.pixel_unshuffle(x, 2)  # channels: a block's pixels, row by row
    return blocks[:, ::3], blocks[:, 1:3]


def join(x_a: Tensor, x_b: Tensor) -> Tensor:
    """The inverse of `split`."""
    if x_a.shape[1] == 1:
        return torch.cat((x_a, x_b), 1)
    return F.pixel_shuffle(torch.cat((x_a[:, :1], x_b, x_a[:, 1:]), 1), 2)


class Flow(nn.Module):
    """The chain of couplings between images with values in [0, 256] and z, eq:chain.

    levels: of the checkerboard, each with half as many numbers as the one before; couplings: on each level; shrink: the
    a of eq:logit; settings: of every `Coupling`.
    """

    def __init__(self, levels: int, couplings: int, shrink: float, **settings: float):
        super().__init__()
        self.shrink = shrink
        self.levels = nn.ModuleList(
            nn.ModuleList(Coupling(2 - level % 2, **settings) for _ in range(couplings)) for level in range(levels)
        )
        self.to(memory_format=torch.channels_last)  # on a CPU, convolutions are faster on it

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Images (batch, side, side), side a multiple of 2^(levels/2), to z (batch, side^2) and ladj, (batch,)."""
        y, ladj_logit = to_logits(v, self.shrink)
        ladj = ladj_logit.flatten(1).sum(1)
        rest, done = y.unsqueeze(1), []
        for level in self.levels:
            x_a, x_b = split(rest)
            for coupling in level:
                z_b, ladj_coupling = coupling(x_a, x_b)
                x_a, x_b, ladj = z_b, x_a, ladj + ladj_coupling  # the next one transforms what this one saw
            done.append(x_a.flatten(1))
            rest = x_b
        return torch.cat((*done, rest.flatten(1)), 1), ladj

    def inverse(self, z: Tensor) -> Tensor:
        """z (batch, side^2) to the images (batch, side, side) that `forward` maps to it."""
        side = math.isqrt(z.shape[1]) >> (len(self.levels) + 1) // 2
        rest = z[:, -(z.shape[1] >> len(self.levels)) :].reshape(len(z), -1, side, side)
        for level in reversed(self.levels):
            n = rest[0].numel()
            x_a, x_b = z[:, -2 * n : -n].reshape(rest.shape), rest
            for coupling in reversed(level):
                x_a, x_b = x_b, coupling.inverse(x_b, x_a)
            rest = join(x_a, x_b)
        return from_logits(rest.squeeze(1), self.shrink)


def build(config: dict) -> Flow:
    """The model of a run's config, untrained."""
    names = ("levels", "couplings", "shrink", "hidden", "components", "spread", "log_scale_limit")
    return Flow(**{name: config[name] for name in names})


# Objective


def log_prob(model: Flow, v: Tensor) -> Tensor:
    """log p(v) of images (batch, side, side) with values in [0, 256], eq:flow: (batch,), in nats.

    On [0, 256]^d it integrates to slightly less than 1: eq:logit's shrinking puts some of its mass outside.
    """
    z, ladj = model(v)
    return ladj - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


def bits_per_dim(log_px: Tensor, dimensions: int = mnist.PIXELS) -> Tensor:
    """-log p / (d log 2), eq:bpd, of any shape: a uniform density on [0, 256)^d gives 8."""
    return -log_px / (dimensions * math.log(2))


# Training


def draw_batch(images: Tensor, index: Tensor) -> Tensor:
    """images[index], dequantised by fresh uniform noise: (batch, 28, 28) with values in [0, 256]."""
    pixels = images.index_select(0, index)
    return dequantised(pixels, torch.rand(pixels.shape, device=images.device))


def training_step(model: Flow, optimizer: Optimizer, images: Tensor, index: Tensor, clip: float) -> tuple[Tensor, ...]:
    """One step of Adam down the mean bits per dimension of images[index], (batch,) of images (n, 28, 28) uint8.

    Returns those bits and the gradient's norm before it is clipped, (), detached. Nothing here waits for the device.
    """
    loss = bits_per_dim(log_prob(model, draw_batch(images, index))).mean()
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach(), norm


def train(run: Run, model: Flow, data: mnist.Data) -> None:
    """Minimise bits per dimension for the run's epochs, recording them on fixed noise after each.

    `gradient_norm` is the greatest of an epoch's steps, before clipping. As most is learned in epoch 1, validation is
    also measured a quarter into it: `early_val_bpd`, after `early_seconds` of the run.
    """
    args = run.args
    images = data.train_images
    steps = mnist.steps_per_epoch(len(images), args.batch_size)
    optimizer = training.adam(model.parameters(), args.lr, betas=args.betas)
    run.start(model=model, optimizer=optimizer)
    take_step = training.CapturedStep(lambda i: training_step(model, optimizer, images, i, args.clip), run.device)
    losses, norms = torch.zeros(2, steps, device=run.device)
    train_set = evaluation_set(images[:EVALUATION_IMAGES], "training")
    validation_set = evaluation_set(data.validation_images, "validation")
    for epoch in range(run.first_epoch, args.epochs + 1):
        figures = {}
        if epoch > 0:
            for step, index in run.steps(epoch, mnist.batches(len(images), args.batch_size, run.device), steps):
                training.set_lr(optimizer, args.lr * training.warmup_cosine(step, args.epochs * steps, args.warmup))
                losses[step % steps], norms[step % steps] = take_step(index)
                if step == steps // 4:  # only in epoch 1, as steps are counted over the whole run
                    figures = {"early_val_bpd": mean_bpd(model, validation_set), "early_seconds": run.elapsed}
            training.check_finite(epoch, gradient_norm=norms, loss=losses)
            figures["gradient_norm"] = float(norms.max())
        if run.follows:
            continue
        if epoch in run.panels(0, 0.25, 0.5, 0.75, 1):
            run.frames[epoch] = panel(model).cpu()
        run.record(epoch, train_bpd=mean_bpd(model, train_set), val_bpd=mean_bpd(model, validation_set), **figures)


# Evaluation


def evaluation_set(images: Tensor, label: str) -> Tensor:
    """Images (n, 28, 28) uint8 plus noise that is a function of `label` and the image's index: (n, 28, 28)."""
    return dequantised(images, torch.rand(images.shape, generator=fixed_generator(f"noise, {label}")).to(images.device))


@torch.inference_mode()
def per_image_log_prob(model: Flow, v: Tensor, batch: int = EVALUATION_BATCH) -> Tensor:
    """`log_prob` of any number of images, in batches: (n,) in float64, on the CPU."""
    return torch.cat([log_prob(model, part) for part in v.split(batch)]).cpu().double()


def mean_bpd(model: Flow, v: Tensor) -> float:
    """Bits per dimension of images (n, 28, 28) with values in [0, 256], over all their pixels."""
    return float(bits_per_dim(per_image_log_prob(model, v)).mean())


def importance_weighted_bpd(
    model: Flow, images: Tensor, label: str, draws: int, unfinished: Path | None = None
) -> Tensor:
    """Bits per dimension from log mean_k p(x + u_k), eq:dequantisation, over `draws` draws of the noise.

    Images (n, 28, 28) uint8 to (n,) in float64, on the CPU. It falls with the draws to the bits of the discrete P(x).
    unfinished: as in `experiment.log_mean_exp`.
    """

    def log_p(k: int) -> Tensor:
        return per_image_log_prob(model, evaluation_set(images, f"{label}, importance sample {k}"))

    return bits_per_dim(log_mean_exp(log_p, draws, unfinished))


def evaluate(run: Run, model: Flow, data: mnist.Data) -> dict:
    """The `result` of a trained model, on the test set; the judge's verdict is on samples."""
    draws = run.args.importance_samples
    result = {
        "test_bpd": mean_bpd(model, evaluation_set(data.test_images, "test")),
        "test_bpd_iw": float(
            importance_weighted_bpd(model, data.test_images, "test", draws, run.unfinished(model)).mean()
        ),
        "importance_samples": draws,
        "seconds_per_1000_samples": seconds_per_1000(lambda n: sample(model, n), run.device),
    }
    if judged_by := judge.find(run, data):
        result |= judge.verdict(judged_by, sample(model, judge.JUDGED), data.test_images)
    return result


@torch.inference_mode()
def sample(model: Flow, n: int) -> Tensor:
    """Images of n latents of the prior: (n, 28, 28) uint8, of the same latents in every call."""
    z = fixed_normal("samples", n, mnist.PIXELS).to(next(model.parameters()).device)
    return torch.cat([decoded(model, part) for part in cli.progress(z.split(EVALUATION_BATCH), "samples")])


@torch.inference_mode()
def decoded(model: Flow, z: Tensor) -> Tensor:
    """Latents (n, 784) to images (n, 28, 28) uint8: the inverse, rounded down. Raises RunError if it is not finite."""
    v = model.inverse(z)
    if not v.isfinite().all():
        raise cli.RunError("the inverse of the flow is not finite")
    return v.floor().clamp(0, 255).byte()


# Pictures


def panel(model: Flow) -> Tensor:
    """(16, 28, 28) uint8 of one fixed set of latents, so that an eye can follow an image through training."""
    return decoded(model, fixed_normal("panels", 16, mnist.PIXELS).to(next(model.parameters()).device))


@torch.inference_mode()
def draw(run: Run, model: Flow, data: mnist.Data) -> None:
    """Draw curves and panels from the history and the frames, everything else from the weights."""
    keys, title = ("train_bpd", "val_bpd"), "Bits per dimension (lower is better)"
    pictures.save_training_curves(run.figure("bpd"), run.history, keys, "bits", title, legend="upper right")
    for epoch, images in {**run.frames, run.args.epochs: panel(model)}.items():
        pictures.save_grid(run.figure(f"samples_{run.stamp(epoch)}"), images, columns=4)
    ends = (model(evaluation_set(images, "interpolation"))[0] for images in different_pairs(data))
    path = training.slerp(*ends, POINTS).flatten(0, 1)
    pictures.save_grid(run.figure("interpolation"), decoded(model, path), columns=POINTS)


def different_pairs(data: mnist.Data) -> tuple[Tensor, Tensor]:
    """The first pairs of neighbouring test images of different classes: (INTERPOLATIONS, 28, 28) uint8 twice.

    Others follow where there are too few of them, or no labels; and there may be fewer pairs in all.
    """
    pairs = data.test_images[: len(data.test_images) // 2 * 2].unflatten(0, (-1, 2))
    if data.test_labels is not None:
        classes = data.test_labels[: 2 * len(pairs)].view(-1, 2)
        pairs = pairs[torch.argsort((classes[:, 0] == classes[:, 1]).int(), stable=True)]  # the differing come first
    return pairs[:INTERPOLATIONS, 0], pairs[:INTERPOLATIONS, 1]


# Flags


def flags() -> cli.Parser:
    """The script's flags, with the report's settings as defaults."""
    parser = cli.Parser(__doc__)
    cli.add_flags(parser, epochs=40, batch_size=48, lr=3e-3, betas=(0.9, 0.99))
    count, share, size = cli.positive_int, cli.fraction, cli.positive_float
    parser.add_argument("--levels", type=count, choices=range(1, 5), default=4, metavar="N", help="of the checkerboard")
    parser.add_argument("--couplings", type=cli.layers, default=3, metavar="N", help="on each level")
    parser.add_argument("--hidden", type=count, default=32, metavar="N", help="channels of the conditioners")
    parser.add_argument("--components", type=cli.nonnegative_int, default=4, metavar="J", help="logistics; 0: none")
    parser.add_argument("--shrink", type=share, default=1e-5, metavar="X", help="of pixels: a of eq:logit")
    parser.add_argument("--spread", type=size, default=4.0, metavar="X", help="of a mixture's means at the start")
    parser.add_argument("--log-scale-limit", type=size, default=7.0, metavar="X", help="of a logistic, either way")
    parser.add_argument("--clip", type=size, default=100.0, metavar="X", help="greatest norm of a gradient")
    parser.add_argument("--warmup", type=share, default=0.05, metavar="X", help="share of steps until the peak")
    parser.add_argument("--importance-samples", type=count, default=8, metavar="K", help="per image")
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Train, or with --evaluate or --sample use what was trained."""
    parser = flags()
    args = parser.parse_args(argv)
    run = Run("nf", parser, args, evaluation=("importance_samples",))
    torch.manual_seed(args.seed)
    model = build(run.config).to(run.device)
    if args.evaluate or args.sample:
        run.load(model)
    if args.sample:
        save_samples(run.figure("samples.npz"), sample(model, args.sample))
        return
    data = mnist.load(args.dataset, args.data_dir, run.device)
    if not args.evaluate:
        train(run, model, data)
    run.finish(model, lambda: evaluate(run, model, data), lambda: draw(run, model, data))


if __name__ == "__main__":
    sys.exit(main())
