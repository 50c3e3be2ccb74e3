"""Normalizing flow of MNIST: checkerboard couplings (Dinh et al. 2017) of logistic mixtures (Ho et al. 2019).

Pixels, dequantised by uniform noise, go through the logit and a chain of couplings to a standard normal z = f(x). Each
coupling sees one colour of a checkerboard and transforms the other, by an increasing map whose derivative is known; at
every level one colour is then done, and the other is a grid to colour anew.

    log p(x) = log N(f(x); 0, I) + log |det df/dx|,    bits per dimension = -log p(x) / (784 log 2)    eq:flow, eq:bpd

    python code/nf.py    # not measured yet
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import experiment
import judge
import mnist
import pictures
from experiment import Run, RunError, UserError, fixed_generator, fixed_normal

LEVELS = 4  # each with a grid of half as many numbers
COUPLINGS = 3  # a level
HIDDEN = 32  # channels of the conditioners
SHRINK = 1e-5  # the a of eq:logit
SPREAD = 4.0  # of the mixture's means before training
LOG_SCALE_LIMIT = 7.0
BETAS = (0.9, 0.99)  # Adam's
CLIP = 100.0  # the gradient's norm
WARMUP = 0.05  # of all steps
EVALUATION_IMAGES = 10_000  # of the training images; validation and test have as many
EVALUATION_BATCH = 250
IMPORTANCE_SAMPLES = 8
INVERSE_STEPS = 300  # at most; a bracket of any floats is halved to nothing in fewer
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
    """log sum_k exp(terms_k) over dimension 1, and the softmax, whose terms are its gradient."""
    top = terms.amax(1, keepdim=True)
    shares = torch.exp(terms - top)
    total = shares.sum(1, keepdim=True)
    return (top + torch.log(total)).squeeze(1), shares.div_(total)


class MixtureLogit(torch.autograd.Function):
    """z = logit F(x) with the CDF F of a mixture of logistics, and log dz/dx, eq:mixture.

    With u_k = (x - mu_k) / s_k, F = sum_k pi_k sigmoid(u_k), 1 - F = sum_k pi_k sigmoid(-u_k) and the density f =
    sum_k pi_k sigmoid(u_k) sigmoid(-u_k) / s_k, all three by their logarithms, z = log F - log(1 - F) and log dz/dx =
    log f - log F - log(1 - F). The gradient is written out, in a third of the passes that autograd takes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, logits: Tensor, mu: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
        """x: (batch, ...); logits of pi, mu, log s: (batch, K, ...). Returns z and log dz/dx, (batch, ...)."""
        inverse_s = torch.exp(-log_s)
        u = (x.unsqueeze(1) - mu).mul_(inverse_s)
        softplus = F.softplus(u, threshold=40)  # log sigmoid(-u) = -softplus, log sigmoid(u) = u - softplus
        total, pi = log_sum_exp(logits)
        log_pi = logits - total.unsqueeze(1)
        log_above, above = log_sum_exp(log_pi - softplus)
        log_below, below = log_sum_exp(log_pi + u - softplus)
        log_density, density = log_sum_exp(log_pi + u - 2 * softplus - log_s)
        ctx.save_for_backward(u, inverse_s, pi, above, below, density)
        return log_below - log_above, log_density - log_below - log_above

    @staticmethod
    def backward(ctx, grad_z: Tensor, grad_log: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With b_k, a_k, d_k the shares of component k in F, 1 - F and f, and g_z, g_l the gradients given,
        d/dlog pi_k = (g_z - g_l) b_k - (g_z + g_l) a_k + g_l d_k, and
        d/du_k = (g_z - g_l) b_k (1 - sigmoid(u_k)) + (g_z + g_l) a_k sigmoid(u_k) + g_l d_k (1 - 2 sigmoid(u_k)).
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

    logit F lies between the least and the greatest u_k, hence x between the least and the greatest of mu_k + s_k z.
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

    components: K logistics in the mixture before the affine map; with 0 there is the affine map alone.
    """

    def __init__(self, channels: int, components: int):
        super().__init__()
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
        logits, means, log-scales of the mixture, (batch, K, channels, height, width) each."""
        seen = seen.contiguous(memory_format=torch.channels_last)
        out = self.conditioner(seen).contiguous().unflatten(1, (self.outputs, -1))
        logits, mu, log_s = out[:, 2:].chunk(3, dim=1)
        mixture = logits, mu + self.spread, log_s.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)
        return self.gain * torch.tanh(out[:, 0]), out[:, 1], mixture

    def forward(self, seen: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transformed half, and log |det| of the Jacobian, (batch,), eq:coupling."""
        log_scale, shift, mixture = self.maps(seen)
        ladj = log_scale
        if self.spread.numel():
            x, log_slope = MixtureLogit.apply(x, *mixture)
            ladj = ladj + log_slope
        return x * torch.exp(log_scale) + shift, ladj.flatten(1).sum(1)

    def inverse(self, seen: Tensor, z: Tensor) -> Tensor:
        """The half that `forward` makes z of."""
        log_scale, shift, mixture = self.maps(seen)
        x = (z - shift) * torch.exp(-log_scale)
        return invert_mixture(x, *mixture) if self.spread.numel() else x


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two colours of a grid's checkerboard, no neighbours in either: half of the numbers each.

    A square grid (batch, 1, height, width) gives two halves of shape (batch, 2, height/2, width/2): of its 2 x 2 blocks
    the main diagonals and the others. Such a half, a grid turned by 45 degrees, gives two of (batch, 1, height/2,
    width/2): its even rows and its odd ones, each a square grid again.
    """
    if x.shape[1] == 2:
        return x[:, :1], x[:, 1:]
    blocks = F.pixel_unshuffle(x, 2)  # channels: a block's pixels, row by row
    return blocks[:, [0, 3]], blocks[:, [1, 2]]


def join(one: Tensor, other: Tensor) -> Tensor:
    """The inverse of `split`."""
    if one.shape[1] == 1:
        return torch.cat((one, other), 1)
    return F.pixel_shuffle(torch.cat((one, other), 1)[:, [0, 2, 3, 1]], 2)


class Flow(nn.Module):
    """The chain of couplings between images with values in [0, 256] and z, eq:flow."""

    def __init__(self, components: int):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList(Coupling(2 - level % 2, components) for _ in range(COUPLINGS)) for level in range(LEVELS)
        )
        self.to(memory_format=torch.channels_last)  # on a CPU, convolutions are nearly twice as fast on it

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Square images (batch, side, side), side a multiple of 4, to z (batch, side^2) and log |det|, (batch,)."""
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
        side = math.isqrt(z.shape[1])
        halvings = range(1, len(self.levels) + 1)
        *done, rest = z.split([*(z.shape[1] >> n for n in halvings), z.shape[1] >> len(self.levels)], dim=1)
        for n, level, seen in reversed(list(zip(halvings, self.levels, done))):
            shape = len(z), 2 - (n - 1) % 2, *[side >> (n + 1) // 2] * 2
            seen, other = seen.view(shape), rest.view(shape)
            for coupling in reversed(level):
                seen, other = other, coupling.inverse(other, seen)
            rest = join(seen, other)
        return from_logits(rest.squeeze(1))


# Objective


def log_prob(model: Flow, v: Tensor) -> Tensor:
    """log p(v) of images (batch, side, side) with values in [0, 256], a density there: (batch,), in nats."""
    z, ladj = model(v)
    return ladj - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


def bits_per_dim(log_px: Tensor, dimensions: int = mnist.PIXELS) -> Tensor:
    """-log p / (D log 2), eq:bpd, of any shape: a uniform density on [0, 256)^D gives 8."""
    return -log_px / (dimensions * math.log(2))


# Training


def draw_batch(images: Tensor, index: Tensor) -> Tensor:
    """images[index], dequantised by fresh uniform noise: (batch, 28, 28) with values in [0, 256]."""
    pixels = images.index_select(0, index)
    return dequantised(pixels, torch.rand(pixels.shape, device=images.device))


def make_optimizer(model: Flow, lr: float) -> torch.optim.Optimizer:
    """Adam in one pass over the parameters."""
    return torch.optim.Adam(model.parameters(), lr=lr, betas=BETAS, fused=True)


def training_step(
    model: Flow, optimizer: torch.optim.Optimizer, images: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of Adam down the mean bits per dimension of images[index], the gradient's norm clipped at CLIP.

    Returns those bits and the norm before clipping, (), detached. Nothing here waits for the device.
    """
    loss = bits_per_dim(log_prob(model, draw_batch(images, index))).mean()
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.detach(), norm


def train(run: Run, model: Flow, data: mnist.Data) -> None:
    """Minimise bits per dimension for the run's epochs, recording them on fixed noise after each.

    As much is learned in the first epoch, it gets a look in between: after a quarter, `early_val_bpd`.
    """
    args = run.args
    optimizer = make_optimizer(model, args.lr)
    run.start(model=model, optimizer=optimizer)
    images = data.train_images
    steps = len(images) // args.batch_size  # an epoch's
    losses, norms = torch.zeros(2, steps, device=run.device)
    for epoch in run.epochs():
        early = {}
        if epoch > 0:
            for step, index in run.steps(mnist.batches(len(images), args.batch_size, run.device), steps):
                experiment.set_lr(optimizer, args.lr * experiment.warmup_cosine(step, args.epochs * steps, WARMUP))
                losses[step % steps], norms[step % steps] = training_step(model, optimizer, images, index)
                if step == steps // 4:
                    early = {"early_val_bpd": mean_bpd(model, data.validation_images, "validation")}
                    early["early_seconds"] = run.elapsed
            run.check_finite(gradient_norm=norms, loss=losses)
        if epoch in run.panels(0, 0.25, 0.5, 0.75, 1):
            run.frames.setdefault("samples", {})[epoch] = decoded(model, panel_latents(run)).cpu()
        run.record(
            train_bpd=mean_bpd(model, images[:EVALUATION_IMAGES], "training"),
            val_bpd=mean_bpd(model, data.validation_images, "validation"),
            **early,
        )


# Evaluation


@torch.inference_mode()
def per_image_log_prob(model: Flow, images: Tensor, label: str, batch: int = EVALUATION_BATCH) -> Tensor:
    """log p(v) of any number of images (n, 28, 28) uint8, dequantised by noise that is a function of `label` and the
    image's index: (n,) in nats, float64, on the CPU."""
    noise = torch.rand(images.shape, generator=fixed_generator(f"dequantisation, {label}")).to(images.device)
    parts = zip(images.split(batch), noise.split(batch))
    return torch.cat([log_prob(model, dequantised(*part)).cpu().double() for part in parts])


def mean_bpd(model: Flow, images: Tensor, label: str) -> float:
    """Bits per dimension of images (n, 28, 28) uint8, one draw of the noise each, over all their pixels."""
    return float(bits_per_dim(per_image_log_prob(model, images, label)).mean())


def importance_weighted_bpd(model: Flow, images: Tensor, label: str, draws: int) -> Tensor:
    """Bits per dimension from log mean_k p(x + u_k) over `draws` draws of the noise: (n,) in float64, on the CPU.

    eq:dequantisation with K draws; it falls with them to the bits of the discrete P(x).
    """
    bar = experiment.progress(range(draws), "importance samples")
    log_p = torch.stack([per_image_log_prob(model, images, f"{label}, importance sample {k}") for k in bar])
    return bits_per_dim(torch.logsumexp(log_p, dim=0) - math.log(draws))


def evaluate(run: Run, model: Flow, data: mnist.Data, judged_by: judge.Judge | None) -> dict:
    """The `result` of a trained model, on the test set; with a judge, also its verdict on samples."""
    result = {
        "test_bpd": mean_bpd(model, data.test_images, "test"),
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
    return torch.cat([decoded(model, part) for part in z.split(EVALUATION_BATCH)])


@torch.inference_mode()
def decoded(model: Flow, z: Tensor) -> Tensor:
    """Latents (n, 784) to images (n, 28, 28) uint8: the inverse of the flow, rounded down to a grey level."""
    return model.inverse(z).floor().clamp(0, 255).byte()


@torch.inference_mode()
def encoded(model: Flow, images: Tensor, label: str) -> Tensor:
    """z (n, 784) of images (n, 28, 28) uint8, dequantised by noise that is a function of `label` and the index."""
    noise = torch.rand(images.shape, generator=fixed_generator(f"dequantisation, {label}")).to(images.device)
    return model(dequantised(images, noise))[0]


# Pictures


def panel_latents(run: Run) -> Tensor:
    """(16, 784): the same through all training, so that an eye can follow an image."""
    return fixed_normal("panels", 16, mnist.PIXELS).to(run.device)


def draw_training(run: Run) -> None:
    """The pictures of the course of the training, from the history and the frames alone."""
    keys, title = ("train_bpd", "val_bpd"), "Bits per dimension"
    ylabel = "bits per dimension (lower is better)"
    pictures.save_training_curves(run.figure("bpd"), run.history, keys, ylabel, title, legend="upper right")
    for epoch, images in run.frames["samples"].items():
        pictures.save_grid(run.figure(f"samples_{run.stamp(epoch)}"), images, columns=4)


def draw_final(run: Run, model: Flow, data: mnist.Data) -> None:
    """The pictures of the trained model, from its weights and the data alone."""
    pictures.save_grid(run.figure(f"samples_{run.stamp(run.args.epochs)}"), decoded(model, panel_latents(run)), 4)
    start, end = (encoded(model, images, label) for images, label in zip(different_pairs(data), ("start", "end")))
    path = experiment.spherical_path(start, end, POINTS).flatten(0, 1)
    pictures.save_grid(run.figure("interpolation"), decoded(model, path), columns=POINTS)


def different_pairs(data: mnist.Data) -> tuple[Tensor, Tensor]:
    """The first pairs of neighbouring test images of different classes: (INTERPOLATIONS, 28, 28) uint8 twice."""
    index = torch.arange(0, len(data.test_images), 2)[: 10 * INTERPOLATIONS]
    index = index[data.test_labels[index].cpu() != data.test_labels[index + 1].cpu()][:INTERPOLATIONS]
    return data.test_images[index], data.test_images[index + 1]


# Flags


def flags() -> experiment.Parser:
    """The script's flags, with the report's settings as defaults."""
    parser = experiment.Parser(description=__doc__.partition("\n")[0])
    experiment.add_flags(parser, epochs=40, batch_size=64, lr=2e-3)
    parser.add_argument(
        "--components", type=experiment.whole, default=4, metavar="K", help="logistics in each map; 0: affine alone"
    )
    return parser


@experiment.exit_status
def main(argv: list[str] | None = None) -> None:
    """Train, or with --evaluate or --sample use what was trained."""
    parser = flags()
    args = parser.parse_args(argv)
    config = {
        "dataset": args.dataset, "levels": LEVELS, "couplings": COUPLINGS, "hidden": HIDDEN,
        "components": args.components, "shrink": SHRINK, "epochs": args.epochs, "lr": args.lr, "betas": list(BETAS),
        "clip": CLIP, "batch_size": args.batch_size, "warmup": WARMUP, "seed": args.seed,
        "importance_samples": IMPORTANCE_SAMPLES,
    }  # fmt: skip
    if args.batch_size > mnist.TRAIN:
        raise UserError(f"--batch-size {args.batch_size} is larger than the {mnist.TRAIN} training images")
    run = Run("nf", parser, args, config)
    torch.manual_seed(args.seed)
    model = Flow(args.components).to(run.device)
    if args.evaluate or args.sample:
        run.load_weights(model)
    if args.sample:
        run.save_samples(sample(model, args.sample))
        return
    judged_by = judge.load(run.device) if args.dataset == "mnist" else None
    data = mnist.load(args.dataset, args.data_dir, run.device)
    if not args.evaluate:
        train(run, model, data)
        draw_training(run)
    draw_final(run, model, data)
    run.conclude(model, lambda: evaluate(run, model, data, judged_by))


if __name__ == "__main__":
    sys.exit(main())
