"""Normalizing flow of MNIST: checkerboard couplings (Dinh et al. 2017) of logistic mixtures (Ho et al. 2019).

Pixels x, dequantised by learned noise, v = x + u, go through the logit and a chain of couplings to a standard normal
z = f(v). Each coupling sees one colour of a checkerboard and transforms the other, by an increasing map of known
derivative. After each level one colour is finished, and the other is coloured anew.

    log p(v) = log N(f(v); 0, I) + log |det df/dv|                         eq:flow
    bits per dimension = -(log p(v) - log q(u|x)) / (784 log 2)             eq:bpd

    python code/nf.py    # test 0.986 bits per dimension, 0.977 with 8 draws of the noise; 3098 s
    (seeds 0 to 2, means; times of seed 0; AMD EPYC, 2 threads, torch 2.14.1+cu130)
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

EVALUATION_IMAGES = 10_000  # of the training images, or all if there are fewer
EVALUATION_BATCH = 250
INTERPOLATIONS, POINTS = 8, 9  # rows, and images in a row, both ends included
TEMPERATURES = (0.7, 0.8, 0.9)  # of samples, besides 1
BEST = {"epochs": 26, "hidden": 48, "blocks": 3, "components": 16, "clip": 1.0}  # the record run's settings
FARTHEST = 100.0  # shift of a coupling: an image that one network sends astray must not be sent farther by the next
FLOOR = 1e-6, 0.1  # weight and rate of a logistic around 0 that every mixture has besides its own


# Model


def to_logits(v: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """The logit of r1 = lambda/2 + (1 - lambda) v/256, eq:logit, and each number's ladj: v (...) to (...) twice.

    shrink: lambda. r0 = 1 - r1 is computed from 256 - v, not from r1, which keeps its digits near 256.
    """
    log_r1, log_r0 = (torch.log(shrink / 2 + (1 - shrink) / 256 * part) for part in (v, 256 - v))
    return log_r1 - log_r0, math.log1p(-shrink) - math.log(256) - log_r1 - log_r0


def from_logits(y: Tensor, shrink: float) -> Tensor:
    """The inverse of `to_logits`: values from 256 (0 - lambda/2)/(1 - lambda) to 256 (1 - lambda/2)/(1 - lambda)."""
    return 256 * (torch.sigmoid(y) - shrink / 2) / (1 - shrink)


def mixture_logit(x: Tensor, weight: Tensor, mu: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """z = logit F(x) with the CDF F of a mixture of logistics, and its ladj, log dz/dx, eq:mixture.

    x: (batch, ...); weights w, which need not sum to 1, means mu, rates 1/s: (batch, J, ...). Returns (batch, ...)
    twice. With u_j = (x - mu_j) / s_j, A = sum_j w_j sigmoid(u_j), B = sum_j w_j sigmoid(-u_j) and C = sum_j w_j
    sigmoid(u_j) sigmoid(-u_j) / s_j, A + B is the sum of the weights: F = A / (A + B), 1 - F = B / (A + B), and the
    density is C / (A + B), so z = log A - log B and ladj = log C + log(A + B) - log A - log B. One more logistic, the
    FLOOR, keeps the sums from underflowing far out.
    """
    floor_weight, floor_rate = FLOOR
    below, above = floor_weight * torch.sigmoid(floor_rate * x), torch.sigmoid(-floor_rate * x)
    a, b, c = below, floor_weight * above, floor_rate * below * above
    u = (x.unsqueeze(1) - mu) * rate
    below, above = weight * torch.sigmoid(u), torch.sigmoid(-u)
    a, b, c = a + below.sum(1), b + (weight * above).sum(1), c + (below * above * rate).sum(1)
    log_a, log_b = torch.log(a), torch.log(b)
    return log_a - log_b, torch.log(c) + torch.log(a + b) - log_a - log_b


def invert_mixture(z: Tensor, weight: Tensor, mu: Tensor, rate: Tensor) -> Tensor:
    """x with logit F(x) = z: z (batch, ...) to (batch, ...), the mixture as in mixture_logit.

    logit F lies between the least and the greatest u_j, the FLOOR's among them, hence x between those of mu_j + s_j z.
    Newton's method inside that bracket, which every evaluation narrows; a bisection step where Newton's would leave it
    or is more than half as long as the one before. Numbers that have converged are put aside when they are a quarter of
    those at work. Where the sums underflow, for |z| beyond about 80 in float32 and 700 in float64, x is finite and far
    out. Raises RunError if a number has not converged after 300 steps.
    """
    floor = z / FLOOR[1]
    ends = mu + z.unsqueeze(1) / rate
    start = (weight * ends).sum(1) / weight.sum(1)
    low, high = torch.minimum(ends.amin(1), floor), torch.maximum(ends.amax(1), floor)
    numbers = torch.stack((z, start, low, high, high - low)).flatten(1)  # (5, n)
    mixture = torch.stack((weight, mu, rate)).transpose(1, 2).flatten(2)  # (3, J, n)
    found, places = torch.empty_like(z).flatten(), torch.arange(z.numel(), device=z.device)
    precision = 4 * torch.finfo(z.dtype).eps
    for _ in range(300):
        target, x, low, high, length = numbers
        reached, ladj = (each[0] for each in mixture_logit(x[None], *mixture[:, None]))
        low, high = torch.where(reached < target, x, low), torch.where(reached > target, x, high)
        step = (target - reached) * torch.exp(-ladj)
        close = precision * (1 + x.abs())
        done = (step.abs() <= close) | (high - low <= close)
        done |= (target - reached).abs() <= precision * (1 + target.abs())
        found[places] = x  # of those that are not done, for the time being
        left = (~done).nonzero().squeeze(1)
        if not len(left):
            return found.view_as(z)
        newton, middle = x + step, low + (high - low) / 2
        new = torch.where((low < newton) & (newton < high) & (step.abs() <= length / 2), newton, middle)
        new = torch.where(done, x, new)
        numbers = torch.stack((target, new, low, high, (new - x).abs()))
        if len(left) <= 0.75 * len(x):
            numbers, mixture, places = numbers[:, left], mixture[:, :, left], places[left]
    raise cli.RunError(f"the inverse of a mixture did not converge for {len(left)} of {z.numel()} numbers")


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

    hidden, blocks: channels and residual blocks of the conditioner. components: J logistics in the mixture before the
    affine map, with means from -spread to spread before training, and logarithms of weights and rates within a limit;
    with 0 there is the affine map alone.
    """

    def __init__(self, channels: int, hidden: int, blocks: int, components: int, spread: float, limit: float):
        super().__init__()
        self.components, self.limit = components, limit
        self.outputs = 1, 1, 2 * components, components  # for each number
        last = nn.Conv2d(hidden, channels * sum(self.outputs), 1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conditioner = nn.Sequential(first, *(Residual(hidden) for _ in range(blocks)), nn.SiLU(), last)
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))
        means = torch.linspace(-spread, spread, components)  # components alike would stay alike
        self.spread = nn.Parameter(means.view(-1, 1, 1, 1).repeat(1, channels, 1, 1))

    def maps(self, x_a: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """What x_a says: log-scale and shift of the affine map, (batch, channels, height, width) each, and
        weights, means, rates of the mixture, (batch, J, channels, height, width) each."""
        x_a = x_a.contiguous(memory_format=torch.channels_last)
        out = self.conditioner(x_a).contiguous().unflatten(1, (-1, x_a.shape[1]))
        log_scale, shift, logs, mu = out.split(self.outputs, 1)
        weight, rate = torch.exp(F.hardtanh(logs, -self.limit, self.limit)).chunk(2, 1)
        shift = F.hardtanh(shift.squeeze(1), -FARTHEST, FARTHEST)
        return self.gain * torch.tanh(log_scale.squeeze(1)), shift, (weight, mu + self.spread, rate)

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


class Dequantiser(nn.Module):
    """q(u|x), the distribution of the noise given the image (Ho et al. 2019), eq:variational.

    Each pixel's u is the sigmoid of a standard logistic variable, scaled and shifted by a network that sees 14 x 14
    pixels around its 2 x 2 square. It starts as uniform noise. hidden: channels of the network.
    """

    def __init__(self, hidden: int):
        super().__init__()
        last = nn.Conv2d(hidden, 8, 3, padding=1)  # a log-scale and a shift for each pixel of a 2 x 2 block
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        first = nn.Conv2d(4, hidden, 3, padding=1)
        self.network = nn.Sequential(first, Residual(hidden), nn.SiLU(), last)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Grey values and uniform noise, (batch, side, side) each, to u in [0, 1], as large, and log q, (batch,)."""
        blocks = F.pixel_unshuffle(images.unsqueeze(1) / 128 - 1, 2)
        out = self.network(blocks.contiguous(memory_format=torch.channels_last))
        log_scale, shift = F.pixel_shuffle(out.contiguous(), 2).unbind(1)
        log_scale = 2 * torch.tanh(log_scale)
        logistic = torch.logit(noise.clamp(2**-25, 1 - 2**-24))  # finite
        y = logistic * torch.exp(log_scale) + shift
        # log du/dy = log u (1 - u), log dy/dnoise = log-scale - log noise (1 - noise); q(u|x) = 1 / (du/dnoise)
        ladj = log_scale + log_sigmoid_slope(y) - log_sigmoid_slope(logistic)
        return torch.sigmoid(y), -ladj.flatten(1).sum(1)


def log_sigmoid_slope(y: Tensor) -> Tensor:
    """log of the sigmoid's derivative, sigmoid(y) sigmoid(-y), of any shape."""
    return F.logsigmoid(y) + F.logsigmoid(-y)


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

    levels: of the checkerboard, each with half as many numbers as the one before; couplings: on each level; shrink:
    lambda of eq:logit; hidden: channels of the networks; learned: whether images are dequantised by a `Dequantiser` and
    not by uniform noise; settings: `Coupling`'s other arguments.
    """

    def __init__(self, levels: int, couplings: int, shrink: float, hidden: int, learned: bool, **settings: float):
        super().__init__()
        self.shrink = shrink
        self.dequantiser = Dequantiser(hidden) if learned else None
        self.levels = nn.ModuleList(
            nn.ModuleList(Coupling(2 - level % 2, hidden, **settings) for _ in range(couplings))
            for level in range(levels)
        )
        self.to(memory_format=torch.channels_last)  # on a CPU, convolutions are faster on it

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Images (batch, side, side) to z (batch, side^2) and ladj, (batch,).

        side: a multiple of 2^((levels + 1) // 2).
        """
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
    names = ("levels", "couplings", "shrink", "hidden", "blocks", "components", "spread", "limit")
    return Flow(learned=config["noise"] == "learned", **{name: config[name] for name in names})


# Objective


def log_prob(model: Flow, v: Tensor) -> Tensor:
    """log p(v) of images (batch, side, side) with values in [0, 256], eq:flow: (batch,), in nats.

    On [0, 256]^d it integrates to slightly less than 1: eq:logit's shrinking puts some of its mass outside.
    """
    z, ladj = model(v)
    return ladj - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


def dequantise(model: Flow, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """v = x + u in [0, 256], and log q(u|x), eq:variational: (batch, side, side) and (batch,).

    images: grey values 0 to 255; noise: uniform in [0, 1), both (batch, side, side). Where none is learned, u is the
    noise itself, whose log-density is 0.
    """
    images = images.to(noise.dtype)
    if model.dequantiser is None:
        return images + noise, noise.new_zeros(len(noise))
    u, log_q = model.dequantiser(images, noise)
    return images + u, log_q


def bound(model: Flow, images: Tensor, noise: Tensor) -> Tensor:
    """log p(x + u) - log q(u|x) at one draw of u, (batch,), in nats: its mean is at most log P(x), eq:variational."""
    v, log_q = dequantise(model, images, noise)
    return log_prob(model, v) - log_q


def bits_per_dim(log_px: Tensor, dimensions: int = mnist.PIXELS) -> Tensor:
    """-log p / (d log 2) of densities or their bounds, eq:bpd, of any shape: a uniform one on [0, 256)^d gives 8."""
    return -log_px / (dimensions * math.log(2))


# Training


def draw_batch(images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """images[index], uint8, and fresh uniform noise for their pixels: (batch, 28, 28) both."""
    return images.index_select(0, index), torch.rand(len(index), *images.shape[1:], device=images.device)


def training_step(model: Flow, optimizer: Optimizer, images: Tensor, index: Tensor, clip: float) -> tuple[Tensor, ...]:
    """One step of Adam down the mean bits per dimension of images[index], (batch,) of images (n, 28, 28) uint8.

    Returns those bits and the gradient's norm before it is clipped, (), detached. Nothing here waits for the device.
    """
    loss = bits_per_dim(bound(model, *draw_batch(images, index))).mean()
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
                    figures = {"early_val_bpd": mean_bpd(model, *validation_set), "early_seconds": run.elapsed}
            training.check_finite(epoch, gradient_norm=norms, loss=losses)
            figures["gradient_norm"] = float(norms.max())
        if run.follows:
            continue
        if epoch in run.panels(0, 0.25, 0.5, 0.75, 1):
            run.frames[epoch] = panel(model).cpu()
        train_bpd, val_bpd = (mean_bpd(model, *each) for each in (train_set, validation_set))
        run.record(epoch, train_bpd=train_bpd, val_bpd=val_bpd, **figures)


# Evaluation


def evaluation_set(images: Tensor, label: str) -> tuple[Tensor, Tensor]:
    """Images (n, 28, 28) uint8, and uniform noise that is a function of `label` and the image's index, as large."""
    return images, torch.rand(images.shape, generator=fixed_generator(f"noise, {label}")).to(images.device)


@torch.inference_mode()
def per_image_bound(model: Flow, images: Tensor, noise: Tensor, batch: int = EVALUATION_BATCH) -> Tensor:
    """`bound` of any number of images, in batches: (n,) in float64, on the CPU."""
    return torch.cat([bound(model, *each) for each in zip(images.split(batch), noise.split(batch))]).cpu().double()


def mean_bpd(model: Flow, images: Tensor, noise: Tensor) -> float:
    """Bits per dimension of images (n, 28, 28) uint8 at one draw of the noise each, over all their pixels."""
    return float(bits_per_dim(per_image_bound(model, images, noise)).mean())


def importance_weighted_bpd(
    model: Flow, images: Tensor, label: str, draws: int, unfinished: Path | None = None
) -> Tensor:
    """Bits per dimension from log mean_k p(x + u_k) / q(u_k|x), eq:iwae, over `draws` draws of the noise.

    Images (n, 28, 28) uint8 to (n,) in float64, on the CPU. It falls with the draws to the bits of the discrete P(x).
    unfinished: as in `experiment.log_mean_exp`.
    """

    def log_w(k: int) -> Tensor:
        return per_image_bound(model, *evaluation_set(images, f"{label}, importance sample {k}"))

    return bits_per_dim(log_mean_exp(log_w, draws, unfinished))


def evaluate(run: Run, model: Flow, data: mnist.Data) -> dict:
    """The `result` of a trained model, on the test set; the judge's verdicts are on samples, at 1 and TEMPERATURES."""
    images, draws = data.test_images, run.args.importance_samples
    result = {
        "test_bpd": mean_bpd(model, *evaluation_set(images, "test")),
        "test_bpd_iw": float(
            importance_weighted_bpd(model, images, "test", draws, run.unfinished(model, images)).mean()
        ),
        "importance_samples": draws,
        "seconds_per_1000_samples": seconds_per_1000(lambda n: sample(model, n), run.device),
    }
    if judged_by := judge.find(run, data):
        real = judge.described(judged_by, images)

        def judged(temperature: float) -> dict:
            return judge.compared(judge.described(judged_by, sample(model, judge.JUDGED, temperature)), real)

        result |= judged(1.0) | {"at_temperature": {str(t): judged(t) for t in TEMPERATURES}}
    return result


@torch.inference_mode()
def sample(model: Flow, n: int, temperature: float = 1.0) -> Tensor:
    """Images of n latents of N(0, temperature^2 I), of the prior at 1: (n, 28, 28) uint8, the same in every call."""
    z = temperature * fixed_normal("samples", n, mnist.PIXELS).to(next(model.parameters()).device)
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
    noisy = (dequantise(model, *evaluation_set(images, "interpolation"))[0] for images in different_pairs(data))
    path = training.slerp(*(model(v)[0] for v in noisy), POINTS).flatten(0, 1)
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
    parser = cli.Parser(__doc__, BEST)
    cli.add_flags(parser, epochs=40, batch_size=96, lr=8e-3, betas=(0.9, 0.99))
    count, share, size = cli.positive_int, cli.open_fraction, cli.positive_float
    parser.add_argument("--levels", type=count, choices=range(1, 5), default=4, metavar="N", help="of the checkerboard")
    parser.add_argument("--couplings", type=cli.layers, default=3, metavar="N", help="on each level")
    parser.add_argument("--hidden", type=count, default=32, metavar="N", help="channels of the networks")
    parser.add_argument("--blocks", type=count, default=2, metavar="N", help="residual blocks of the conditioners")
    parser.add_argument("--components", type=cli.nonnegative_int, default=8, metavar="J", help="logistics; 0: none")
    parser.add_argument("--noise", choices=("learned", "uniform"), default="learned", help="what dequantises images")
    parser.add_argument("--shrink", type=share, default=1e-5, metavar="X", help="of pixels: lambda of eq:logit")
    parser.add_argument("--spread", type=size, default=4.0, metavar="X", help="of a mixture's means at the start")
    parser.add_argument("--limit", type=size, default=7.0, metavar="X", help="of log-weights and log-rates")
    parser.add_argument("--clip", type=size, default=100.0, metavar="X", help="greatest norm of a gradient")
    parser.add_argument("--warmup", type=cli.fraction, default=0.05, metavar="X", help="share of steps until the peak")
    parser.add_argument("--temperature", type=size, default=1.0, metavar="T", help="with --sample: z of N(0, T^2 I)")
    parser.add_argument("--importance-samples", type=count, default=8, metavar="K", help="per image")
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Train, or with --evaluate or --sample use what was trained."""
    parser = flags()
    args = parser.parse_args(argv)
    if args.temperature != 1 and not args.sample:
        raise cli.UserError("--temperature is that of samples: add --sample N")
    run = Run("nf_best" if args.best else "nf", parser, args, evaluation=("importance_samples",))
    torch.manual_seed(args.seed)
    model = build(run.config).to(run.device)
    if args.evaluate or args.sample:
        run.load(model)
    if args.sample:
        save_samples(run.figure("samples.npz"), sample(model, args.sample, args.temperature))
        return
    data = mnist.load(args.dataset, args.data_dir, run.device)
    if not args.evaluate:
        train(run, model, data)
    run.finish(model, lambda: evaluate(run, model, data), lambda: draw(run, model, data))


if __name__ == "__main__":
    sys.exit(main())
