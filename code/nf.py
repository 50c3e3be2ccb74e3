"""Normalizing flow of MNIST: checkerboard couplings (Dinh et al. 2017) of logistic mixtures (Ho et al. 2019).

Pixels, dequantised by uniform noise, go through the logit and a chain of couplings to a standard normal z = f(v). Each
coupling sees one colour of a checkerboard and transforms the other, by an increasing map whose derivative is known; at
every level one colour is then done, and the other is a grid to colour anew.

    log p(v) = log N(f(v); 0, I) + log |det df/dv|,    bits per dimension = -log p(v) / (784 log 2)    eq:flow, eq:bpd

    python code/nf.py    # test 1.044 bits per dimension, 1.034 with 8 draws of the noise; 4224 s
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import experiment
import judge
import mnist
import pictures
from experiment import Run, RunError, fixed_generator, fixed_normal

LEVELS = 4  # each with half as many numbers as the one before
COUPLINGS = 3  # a level
HIDDEN = 32  # channels of the conditioners
SHRINK = 1e-5  # the a of eq:logit
SPREAD = 4.0  # of the mixture's means before training
LOG_SCALE_LIMIT = 7.0  # of a logistic, either way: no component becomes a spike or vanishes
BETAS = (0.9, 0.99)  # Adam's
CLIP = 100.0  # the gradient's norm
WARMUP = 0.05  # of all steps
EVALUATION_IMAGES = 10_000  # of the training images; validation and test have as many
EVALUATION_BATCH = 250
IMPORTANCE_SAMPLES = 8
INVERSE_STEPS = 300  # at most; far fewer are needed
INTERPOLATIONS, POINTS = 8, 9  # rows, and images of a row, both ends included


# Model


def dequantised(images: Tensor, noise: Tensor) -> Tensor:
    """Grey values 0 to 255 plus noise in [0, 1), of any one shape: values in [0, 256], eq:dequantisation."""
    return images.to(noise.dtype) + noise


def to_logits(v: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of p = a/2 + (1 - a) v/256, eq:logit, with the log-derivative of each number: v (...) to (...) twice.

    1 - p is computed from 256 - v, not from p, which keeps its digits near 256.
    """
    log_p = torch.log(SHRINK / 2 + (1 - SHRINK) / 256 * v)
    log_q = torch.log(SHRINK / 2 + (1 - SHRINK) / 256 * (256 - v))
    return log_p - log_q, math.log1p(-SHRINK) - math.log(256) - log_p - log_q


def from_logits(y: Tensor) -> Tensor:
    """The inverse of `to_logits`: values from 256 (0 - a/2)/(1 - a) to 256 (1 - a/2)/(1 - a)."""
    return 256 * (torch.sigmoid(y) - SHRINK / 2) / (1 - SHRINK)


def log_sum_exp(terms: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_j exp(terms_j) over dimension 1, and the softmax, whose terms are its gradient."""
    top = terms.amax(1, keepdim=True)
    shares = torch.exp(terms - top)
    total = shares.sum(1, keepdim=True)
    return (top + torch.log(total)).squeeze(1), shares.div_(total)


class MixtureLogit(torch.autograd.Function):
    """z = logit F(x) with the CDF F of a mixture of logistics, and log dz/dx, eq:mixture.

    With u_j = (x - mu_j) / s_j, F = sum_j pi_j sigmoid(u_j), 1 - F = sum_j pi_j sigmoid(-u_j) and the density f =
    sum_j pi_j sigmoid(u_j) sigmoid(-u_j) / s_j, all three by their logarithms, z = log F - log(1 - F) and log dz/dx =
    log f - log F - log(1 - F). The gradient is written out; bench.py measures what autograd would take instead.
    """

    @staticmethod
    def forward(ctx, x: Tensor, logits: Tensor, mu: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, ...); logits of pi, mu, log s: (batch, J, ...). Returns z and log dz/dx, (batch, ...)."""
        inverse_s = torch.exp(-log_s)
        u = (x.unsqueeze(1) - mu).mul_(inverse_s)
        softplus = F.softplus(u, threshold=40)  # -log sigmoid(-u); the default threshold of 20 costs 2e-9 in float64
        log_sigmoid = u - softplus
        total, pi = log_sum_exp(logits)
        log_pi = logits - total.unsqueeze(1)
        log_above, above = log_sum_exp(log_pi - softplus)
        log_below, below = log_sum_exp(log_pi + log_sigmoid)
        log_density, density = log_sum_exp(log_pi + log_sigmoid - softplus - log_s)
        ctx.save_for_backward(u, inverse_s, pi, above, below, density)
        return log_below - log_above, log_density - log_below - log_above

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_z: Tensor, grad_log: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With b_j, a_j, d_j the shares of component j in F, 1 - F and f, and g_z, g_l the gradients given,
        d/dlog pi_j = (g_z - g_l) b_j - (g_z + g_l) a_j + g_l d_j, and
        d/du_j = (g_z - g_l) b_j (1 - sigmoid(u_j)) + (g_z + g_l) a_j sigmoid(u_j) + g_l d_j (1 - 2 sigmoid(u_j)).
        """
        u, inverse_s, pi, above, below, density = ctx.saved_tensors
        grad_log = grad_log.unsqueeze(1)
        grad_z = grad_z.unsqueeze(1)
        of_below, of_above = below * (grad_z - grad_log), above * (-grad_z - grad_log)
        of_density = density * grad_log
        grad_pi = of_below + of_above + of_density
        grad_u = of_below + of_density - torch.sigmoid(u) * (grad_pi + of_density)
        grad_x = grad_u * inverse_s
        return grad_x.sum(1), grad_pi + pi * grad_log, -grad_x, -grad_u * u - of_density


def invert_mixture(z: Tensor, logits: Tensor, mu: Tensor, log_s: Tensor) -> Tensor:
    """x with logit F(x) = z: z (batch, ...) to (batch, ...), the mixture as in MixtureLogit.

    logit F lies between the least and the greatest u_j, hence x between the least and the greatest of mu_j + s_j z.
    Newton's steps within that bracket, which every point narrows; its middle instead where a step would leave it, or is
    more than half as long as the one before. Raises RunError if a number has not converged to the last digits.
    """
    ends = mu + torch.exp(log_s) * z.unsqueeze(1)
    low, high = ends.amin(1), ends.amax(1)
    x, length = low + (high - low) / 2, high - low
    done = torch.zeros_like(x, dtype=torch.bool)
    precision = 4 * torch.finfo(x.dtype).eps
    for _ in range(INVERSE_STEPS):
        reached, log_slope = MixtureLogit.apply(x, logits, mu, log_s)
        low, high = torch.where(reached < z, x, low), torch.where(reached > z, x, high)
        step = (z - reached) * torch.exp(-log_slope)
        close = precision * (1 + x.abs())
        done |= (step.abs() <= close) | (high - low <= close) | ((z - reached).abs() <= precision * (1 + z.abs()))
        if done.all():
            return x
        newton, middle = x + step, low + (high - low) / 2
        new = torch.where((low < newton) & (newton < high) & (step.abs() <= length / 2), newton, middle)
        x, length = torch.where(done, x, new), (new - x).abs()
    raise RunError(f"the inverse of a mixture did not converge for {int((~done).sum())} of {done.numel()} numbers")


class Residual(nn.Module):
    """h + W2 SiLU(W1 SiLU(h)) with a 3 x 3 and a 1 x 1 convolution, (batch, HIDDEN, height, width) to the same."""

    def __init__(self):
        super().__init__()
        self.near = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1)
        self.mix = nn.Conv2d(HIDDEN, HIDDEN, 1)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mix(F.silu(self.near(F.silu(h))))


class Coupling(nn.Module):
    """Transforms one half of the numbers by what it sees of the other, (batch, channels, height, width) each.

    components: J logistics in the mixture before the affine map; with 0 there is the affine map alone.
    """

    def __init__(self, channels: int, components: int):
        super().__init__()
        self.components = components
        self.outputs = 2 + 3 * components  # for each number
        last = nn.Conv2d(HIDDEN, channels * self.outputs, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = nn.Conv2d(channels, HIDDEN, 3, padding=1)
        self.conditioner = nn.Sequential(first, Residual(), nn.SiLU(), last)
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))
        spread = torch.linspace(-SPREAD, SPREAD, components)  # components alike would stay alike
        self.spread = nn.Parameter(spread.view(-1, 1, 1, 1).repeat(1, channels, 1, 1))

    def maps(self, seen: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """What the seen half says: log-scale and shift of the affine map, (batch, channels, height, width) each, and
        logits, means, log-scales of the mixture, (batch, J, channels, height, width) each."""
        seen = seen.contiguous(memory_format=torch.channels_last)
        out = self.conditioner(seen).contiguous().unflatten(1, (self.outputs, -1))
        logits, mu, log_s = out[:, 2:].chunk(3, dim=1)
        mixture = logits, mu + self.spread, log_s.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)
        return self.gain * torch.tanh(out[:, 0]), out[:, 1], mixture

    def forward(self, seen: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transformed half, and log |det| of the Jacobian, (batch,), eq:coupling."""
        log_scale, shift, mixture = self.maps(seen)
        ladj = log_scale
        if self.components:
            x, log_slope = MixtureLogit.apply(x, *mixture)
            ladj = ladj + log_slope
        return x * torch.exp(log_scale) + shift, ladj.flatten(1).sum(1)

    def inverse(self, seen: Tensor, z: Tensor) -> Tensor:
        """The half that `forward` makes z of."""
        log_scale, shift, mixture = self.maps(seen)
        x = (z - shift) * torch.exp(-log_scale)
        return invert_mixture(x, *mixture) if self.components else x


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


def join(one: Tensor, other: Tensor) -> Tensor:
    """The inverse of `split`."""
    if one.shape[1] == 1:
        return torch.cat((one, other), 1)
    return F.pixel_shuffle(torch.cat((one[:, :1], other, one[:, 1:]), 1), 2)


class Flow(nn.Module):
    """The chain of couplings between images with values in [0, 256] and z, eq:chain."""

    def __init__(self, components: int):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList(Coupling(2 - level % 2, components) for _ in range(COUPLINGS)) for level in range(LEVELS)
        )
        self.to(memory_format=torch.channels_last)  # on a CPU, convolutions are faster on it

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Images (batch, side, side), side a multiple of 2^(LEVELS/2), to z (batch, side^2) and log |det|, (batch,)."""
        y, log_slope = to_logits(v)
        ladj = log_slope.flatten(1).sum(1)
        rest, done = y.unsqueeze(1), []
        for level in self.levels:
            seen, other = split(rest)
            for coupling in level:
                transformed, of_coupling = coupling(seen, other)
                seen, other, ladj = transformed, seen, ladj + of_coupling
            done.append(seen.flatten(1))
            rest = other
        return torch.cat((*done, rest.flatten(1)), 1), ladj

    def inverse(self, z: Tensor) -> Tensor:
        """z (batch, side^2) to the images (batch, side, side) that `forward` makes it of."""
        side = math.isqrt(z.shape[1]) >> (LEVELS + 1) // 2
        rest = z[:, -(z.shape[1] >> LEVELS) :].reshape(len(z), -1, side, side)
        for level in reversed(self.levels):
            n = rest[0].numel()
            seen, other = z[:, -2 * n : -n].reshape(rest.shape), rest
            for coupling in reversed(level):
                seen, other = other, coupling.inverse(other, seen)
            rest = join(seen, other)
        return from_logits(rest.squeeze(1))


# Objective


def log_prob(model: Flow, v: Tensor) -> Tensor:
    """log p(v) of images (batch, side, side) with values in [0, 256], eq:flow: (batch,), in nats.

    Over [0, 256]^d the density integrates to 1 but for what it has outside, which eq:logit's shrinking lets it have.
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


def training_step(
    model: Flow, optimizer: torch.optim.Optimizer, images: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of Adam down the mean bits per dimension of images[index], (batch,) of images (n, 28, 28) uint8.

    Returns those bits and the gradient's norm before it is clipped at CLIP, (), detached. Nothing here waits for the
    device.
    """
    loss = bits_per_dim(log_prob(model, draw_batch(images, index))).mean()
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.detach(), norm


def train(run: Run, model: Flow, data: mnist.Data) -> None:
    """Minimise bits per dimension for the run's epochs, recording them on fixed noise after each.

    Most is learned in epoch 1, so validation is also measured a quarter into it: `early_val_bpd`, after `early_seconds`
    of the run. `gradient_norm` is the greatest of an epoch's steps, before clipping.
    """
    args = run.args
    optimizer = experiment.adam(model.parameters(), args.lr, betas=BETAS)
    run.start(model=model, optimizer=optimizer)
    images = data.train_images
    take_step = experiment.Captured(lambda index: training_step(model, optimizer, images, index), run.device)
    evaluated = {
        "train_bpd": evaluation_set(images[:EVALUATION_IMAGES], "training"),
        "val_bpd": evaluation_set(data.validation_images, "validation"),
    }
    steps = len(images) // args.batch_size  # an epoch's
    losses, norms = torch.zeros(2, steps, device=run.device)
    for epoch in run.epochs():
        figures = {}
        if epoch > 0:
            for step, index in run.steps(mnist.batches(len(images), args.batch_size, run.device), steps):
                experiment.set_lr(optimizer, args.lr * experiment.warmup_cosine(step, args.epochs * steps, WARMUP))
                losses[step % steps], norms[step % steps] = take_step(index)
                if step == steps // 4:  # only in epoch 1, as steps are counted over the whole run
                    figures = {"early_val_bpd": mean_bpd(model, evaluated["val_bpd"]), "early_seconds": run.elapsed}
            run.check_finite(gradient_norm=norms, loss=losses)
            figures["gradient_norm"] = float(norms.max())
        if epoch in run.panels(0, 0.25, 0.5, 0.75, 1):
            run.frames.setdefault("samples", {})[epoch] = decoded(model, panel_latents(run)).cpu()
        run.record(**{name: mean_bpd(model, v) for name, v in evaluated.items()}, **figures)


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


def importance_weighted_bpd(model: Flow, images: Tensor, label: str, draws: int) -> Tensor:
    """Bits per dimension from log mean_k p(x + u_k), eq:dequantisation, over `draws` draws of the noise.

    Images (n, 28, 28) uint8 to (n,) in float64, on the CPU. It falls with the draws to the bits of the discrete P(x).
    """
    bar = experiment.progress(range(draws), "importance samples")
    log_p = [per_image_log_prob(model, evaluation_set(images, f"{label}, importance sample {k}")) for k in bar]
    return bits_per_dim(torch.logsumexp(torch.stack(log_p), dim=0) - math.log(draws))


def evaluate(run: Run, model: Flow, data: mnist.Data, judged_by: judge.Judge | None) -> dict:
    """The `result` of a trained model, on the test set; with a judge, also its verdict on samples."""
    result = {
        "test_bpd": mean_bpd(model, evaluation_set(data.test_images, "test")),
        "test_bpd_iw": float(importance_weighted_bpd(model, data.test_images, "test", IMPORTANCE_SAMPLES).mean()),
        "importance_samples": IMPORTANCE_SAMPLES,
        "seconds_per_1000_samples": experiment.seconds_per_1000(lambda n: sample(model, n), run.device),
    }
    if judged_by is not None:
        result |= judge.verdict(judged_by, sample(model, judge.JUDGED), data.test_images)
    return result


@torch.inference_mode()
def sample(model: Flow, n: int) -> Tensor:
    """Images of n latents of the prior: (n, 28, 28) uint8, of the same latents in every call."""
    z = fixed_normal("samples", n, mnist.PIXELS).to(next(model.parameters()).device)
    parts = experiment.progress(z.split(EVALUATION_BATCH), "samples")
    return torch.cat([decoded(model, part) for part in parts])


@torch.inference_mode()
def decoded(model: Flow, z: Tensor) -> Tensor:
    """Latents (n, 784) to images (n, 28, 28) uint8: the inverse of the flow, rounded down to a grey level.

    Raises RunError where the inverse is not finite.
    """
    v = model.inverse(z)
    if not v.isfinite().all():
        raise RunError("the inverse of the flow is not finite")
    return v.floor().clamp(0, 255).byte()


@torch.inference_mode()
def encoded(model: Flow, v: Tensor) -> Tensor:
    """Images (n, 28, 28) with values in [0, 256] to their latents, (n, 784)."""
    return model(v)[0]


# Pictures


def panel_latents(run: Run) -> Tensor:
    """(16, 784): the same through all training, so that an eye can follow an image."""
    return fixed_normal("panels", 16, mnist.PIXELS).to(run.device)


def draw_training(run: Run) -> None:
    """The pictures of the course of the training, from the history and the frames alone."""
    keys, title = ("train_bpd", "val_bpd"), "Bits per dimension (lower is better)"
    pictures.save_training_curves(run.figure("bpd"), run.history, keys, "bits", title, legend="upper right")
    for epoch, images in run.frames.get("samples", {}).items():
        pictures.save_grid(run.figure(f"samples_{run.stamp(epoch)}"), images, columns=4)


def draw_final(run: Run, model: Flow, data: mnist.Data) -> None:
    """The pictures of the trained model, from its weights and the data alone."""
    pictures.save_grid(
        run.figure(f"samples_{run.stamp(run.args.epochs)}"), decoded(model, panel_latents(run)), columns=4
    )
    ends = (encoded(model, evaluation_set(images, "interpolation")) for images in different_pairs(data))
    path = experiment.spherical_path(*ends, POINTS).flatten(0, 1)
    pictures.save_grid(run.figure("interpolation"), decoded(model, path), columns=POINTS)


def different_pairs(data: mnist.Data) -> tuple[Tensor, Tensor]:
    """The first pairs of neighbouring test images of different classes: (INTERPOLATIONS, 28, 28) uint8 twice."""
    differ = data.test_labels[0::2] != data.test_labels[1::2]
    index = 2 * differ.nonzero().squeeze(1)[:INTERPOLATIONS]
    return data.test_images[index], data.test_images[index + 1]


# Flags


def flags() -> experiment.Parser:
    """The script's flags, with the report's settings as defaults."""
    parser = experiment.Parser(description=__doc__.partition("\n")[0])
    experiment.add_flags(parser, epochs=40, batch_size=48, lr=3e-3)
    parser.add_argument(
        "--components", type=experiment.whole, default=4, metavar="J", help="logistics in each map; 0: affine alone"
    )
    return parser


@experiment.exit_status
def main(argv: list[str] | None = None) -> None:
    """Train, or with --evaluate or --sample use what was trained."""
    parser = flags()
    args = parser.parse_args(argv)
    config = {
        "dataset": args.dataset, "levels": LEVELS, "couplings": COUPLINGS, "hidden": HIDDEN,
        "components": args.components, "shrink": SHRINK, "spread": SPREAD, "log_scale_limit": LOG_SCALE_LIMIT,
        "epochs": args.epochs, "lr": args.lr, "betas": list(BETAS), "clip": CLIP, "batch_size": args.batch_size,
        "warmup": WARMUP, "seed": args.seed, "importance_samples": IMPORTANCE_SAMPLES,
    }  # fmt: skip
    experiment.check_batch_size(args.batch_size, mnist.TRAIN)
    run = Run("nf", parser, args, config)
    torch.manual_seed(args.seed)
    model = Flow(args.components).to(run.device)
    if args.evaluate or args.sample:
        run.load_weights(model, but_for=("importance_samples",))
    if args.sample:
        run.save_samples(sample(model, args.sample))
        return
    judged_by = judge.load(run.device) if args.dataset == "mnist" else None
    data = mnist.load(args.dataset, args.data_dir, run.device)
    if args.evaluate:
        run.recall()
    else:
        train(run, model, data)
    if run.history:
        draw_training(run)
    draw_final(run, model, data)
    run.conclude(model, lambda: evaluate(run, model, data, judged_by))


if __name__ == "__main__":
    sys.exit(main())
