"""Variational autoencoder of binarised MNIST (Kingma & Welling 2014; Rezende, Mohamed & Wierstra 2014).

An encoder q(z|x) = N(mu(x), diag exp(logvar(x))) and a decoder p(x|z) of independent Bernoulli pixels, both fully
connected, maximise the evidence lower bound on log p(x) with one reparameterized sample,

    ELBO = E_q[log p(x|z)] - KL(q(z|x) || N(0, I)).                                          eq:elbo of the report

    python code/vae.py              # z of 20: test ELBO -90.12 nats, -log p(x) 86.78; 153 s
    python code/vae.py --z-dim 2    # z of 2: test ELBO -135.08 nats, -log p(x) 131.41; 158 s
    (seed 0; AMD EPYC, 2 threads, torch 2.15.0+cu132)
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import cli
import judge
import mnist
import pictures
import training
from experiment import Run, save_samples, seconds_per_1000
from training import fixed_generator, fixed_normal

EVALUATION_IMAGES = 10_000  # of the training images; validation and test have as many
EVALUATION_BATCH = 1000
MANIFOLD_SIDE = 20  # images along each axis


# Model


class Residual(nn.Module):
    """h + SiLU(W h + b), (..., hidden) to the same: the sum lets a larger learning rate train a deeper network."""

    def __init__(self, hidden: int):
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.silu(self.linear(h))


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three hidden layers, the last two residual: (..., inputs) to (..., outputs)."""
    layers = nn.Linear(inputs, hidden), nn.SiLU(), Residual(hidden), Residual(hidden), nn.Linear(hidden, outputs)
    return nn.Sequential(*layers)


class VAE(nn.Module):
    """Encoder and decoder, two networks of the same shape with `hidden` units in every hidden layer."""

    def __init__(self, z_dim: int, hidden: int):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = mlp(mnist.PIXELS, hidden, 2 * z_dim)
        self.decoder = mlp(z_dim, hidden, mnist.PIXELS)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (batch, 784) to mu and logvar of q(z|x), (batch, z_dim) each."""
        return self.encoder(x).chunk(2, dim=-1)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (..., z_dim) to the logits of the pixels' Bernoulli means, (..., 784)."""
        return self.decoder(z)


def build(config: dict) -> VAE:
    """The model of a run's config, untrained."""
    return VAE(config["z_dim"], config["hidden"])


# Objective


def binarise(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Bernoulli pixels with mean value/255, 0. or 1., of uint8 images of any shape.

    Exactly `value` of the 255 equally likely integers 0 to 254 are below `value`. With a generator, which must be the
    CPU's, the pixels are the same on every device.
    """
    place = {"device": images.device} if generator is None else {"generator": generator}
    return (torch.randint(255, images.shape, dtype=torch.uint8, **place).to(images.device) < images).float()


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """A sample of N(mu, diag exp(logvar)) from one of N(0, I), eq:reparametrisation; all (..., z_dim)."""
    return mu + torch.exp(0.5 * logvar) * eps


def kl_to_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, diag exp(logvar)) || N(0, I)), eq:kl of the report.

    mu, logvar: (batch, z_dim). Returns (batch,), in nats, never negative: the textbook's exp(lv) - 1 - lv cancels
    for small lv, expm1(lv) - lv does so only in its last bit, which the clamp takes care of.
    """
    return 0.5 * (mu.square() + (torch.expm1(logvar) - logvar).clamp(min=0)).sum(-1)


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x|z) of independent Bernoulli pixels, eq:bernoulli: x and logits (..., 784) to (...), in nats."""
    return (x * logits).sum(-1) - F.softplus(logits).sum(-1)


def elbo(model: VAE, x: Tensor, eps: Tensor) -> Tensor:
    """The evidence lower bound, eq:elbo: log p(x|z) at one sample of q(z|x), less the KL in closed form.

    x: (batch, 784) of 0 and 1; eps: (batch, z_dim) standard normal. Returns (batch,), in nats. This is
    `importance_weighted_bound` with K = 1 and log p(z) - log q(z|x) replaced by its mean, which is -KL.
    """
    mu, logvar = model.encode(x)
    logits = model.decode(reparameterize(mu, logvar, eps))
    return bernoulli_log_prob(x, logits) - kl_to_standard_normal(mu, logvar)


def log_weight(model: VAE, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """log w = log p(x|z) + log p(z) - log q(z|x) at z = mu + exp(logvar/2) eps, eq:weight; (..., batch), in nats.

    x: (batch, 784); mu, logvar: (batch, z_dim) of q(z|x); eps: (..., batch, z_dim). The two densities share their
    (2 pi)^(-z_dim/2), which is left out of both.
    """
    z = reparameterize(mu, logvar, eps)
    log_prior = -0.5 * z.square().sum(-1)
    log_q = -0.5 * (logvar + eps.square()).sum(-1)
    return bernoulli_log_prob(x, model.decode(z)) + log_prior - log_q


def importance_weighted_bound(log_w: Tensor) -> Tensor:
    """L_K = log mean_k w_k, eq:iwae (Burda et al. 2016): (K, batch) to (batch,). Its mean rises with K to log p(x)."""
    return torch.logsumexp(log_w, dim=0) - math.log(len(log_w))


# Training


def draw_batch(images: Tensor, index: Tensor, z_dim: int) -> tuple[Tensor, Tensor]:
    """Fresh Bernoulli pixels (batch, 784) of images[index], and eps (batch, z_dim), on the images' device."""
    x = binarise(images.index_select(0, index))
    return x, torch.randn(len(index), z_dim, device=images.device)


def training_step(model: VAE, optimizer: Optimizer, images: Tensor, index: Tensor) -> Tensor:
    """One step of Adam down eq:loss on images[index], (batch,) of images (n, 784) uint8: minus the mean ELBO, detached.

    Nothing here waits for the device.
    """
    x, eps = draw_batch(images, index, model.z_dim)
    loss = -elbo(model, x, eps).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(run: Run, model: VAE, data: mnist.Data) -> None:
    """Maximise the ELBO for the run's epochs, recording it on fixed pixels and fixed eps after each."""
    args = run.args
    images = data.train_images.flatten(1)
    steps = mnist.steps_per_epoch(len(images), args.batch_size)
    optimizer = training.adam(model.parameters(), args.lr, betas=args.betas)
    run.start(model=model, optimizer=optimizer)
    take_step = training.CapturedStep(lambda index: training_step(model, optimizer, images, index), run.device)
    losses = torch.zeros(steps, device=run.device)
    train_set = evaluation_set(images[:EVALUATION_IMAGES], "training", model.z_dim)
    validation_set = evaluation_set(data.validation_images, "validation", model.z_dim)
    for epoch in range(run.first_epoch, args.epochs + 1):
        if epoch > 0:
            for step, index in run.steps(epoch, mnist.batches(len(images), args.batch_size, run.device), steps):
                training.set_lr(optimizer, args.lr * training.warmup_cosine(step, args.epochs * steps, args.warmup))
                losses[step % steps] = take_step(index)
            training.check_finite(epoch, loss=losses)
        if model.z_dim == 2 or epoch in run.panels(0, 0.25, 0.5, 0.75, 1):
            run.frames[epoch] = panel(model).cpu()
        train_elbo, val_elbo = (float(per_image_elbo(model, *each).mean()) for each in (train_set, validation_set))
        run.record(epoch, train_elbo=train_elbo, val_elbo=val_elbo)


# Evaluation


def evaluation_set(images: Tensor, split: str, z_dim: int) -> tuple[Tensor, Tensor]:
    """Binarised pixels (n, 784) and eps (n, z_dim) for images (n, ...), a function of `split` and the image's index."""
    images = images.flatten(1)
    eps = fixed_normal(f"eps, {split}", len(images), z_dim).to(images.device)
    return binarise(images, fixed_generator(f"pixels, {split}")), eps


@torch.inference_mode()
def per_image_elbo(model: VAE, x: Tensor, eps: Tensor, batch: int = EVALUATION_BATCH) -> Tensor:
    """`elbo` of any number of images, in batches: (n,) in float64, on the CPU."""
    return torch.cat([elbo(model, *pair) for pair in zip(x.split(batch), eps.split(batch))]).cpu().double()


@torch.inference_mode()
def importance_sampled_log_px(model: VAE, x: Tensor, draws: int, batch: int = EVALUATION_BATCH) -> Tensor:
    """log p(x) of every image by L_K with K = `draws` samples of q(z|x): (n,) in nats, float64, on the CPU."""
    encoded = [model.encode(part) for part in x.split(batch)]
    log_w = torch.empty(draws, len(x), dtype=x.dtype)
    for k in cli.progress(range(draws), "importance samples"):
        eps = fixed_normal(f"eps, importance sample {k}", len(x), model.z_dim).to(x)
        parts = zip(x.split(batch), encoded, eps.split(batch))
        log_w[k] = torch.cat([log_weight(model, part, *q, noise) for part, q, noise in parts])
    return torch.cat([importance_weighted_bound(part.double()) for part in log_w.split(batch, dim=1)])


@torch.inference_mode()
def quadrature_log_px(model: VAE, x: Tensor, points: int = 601, limit: float = 6.0, block: int = 1000) -> Tensor:
    """log p(x) of every image by the trapezoid rule over a two-dimensional z: (n,) in nats, float64, on the CPU.

    The grid has `points` along each axis of [-limit, limit]^2. For a smooth integrand that vanishes at its edge the
    rule's error falls faster than any power of the step.
    """
    axis = torch.linspace(-limit, limit, points, dtype=torch.float64)
    step = 2 * limit / (points - 1)
    grid = torch.cartesian_prod(axis, axis)
    log_cell = 2 * math.log(step) - math.log(2 * math.pi) - 0.5 * grid.square().sum(-1)  # log p(z) dz
    total = torch.full((len(x),), -math.inf, dtype=torch.float64)
    for z, log_measure in cli.progress(list(zip(grid.split(block), log_cell.split(block))), "quadrature"):
        logits = model.decode(z.to(x))
        log_joint = x @ logits.T + (log_measure.to(x) - F.softplus(logits).sum(-1))  # (n, block)
        total = torch.logaddexp(total, log_joint.logsumexp(-1).cpu().double())
    return total


def evaluate(run: Run, model: VAE, data: mnist.Data) -> dict:
    """The `result` of a trained model, on the test set; the judge's verdict is on decoder means."""
    draws = run.args.importance_samples
    x, eps = evaluation_set(data.test_images, "test", model.z_dim)
    log_px = importance_sampled_log_px(model, x, draws)
    result = {
        "test_elbo": float(per_image_elbo(model, x, eps).mean()),
        "test_nll": float(-log_px.mean()),
        "test_nll_se": float(log_px.std() / math.sqrt(len(log_px))),
        "importance_samples": draws,
        "seconds_per_1000_samples": seconds_per_1000(lambda n: sample(model, n), run.device),
    }
    if model.z_dim == 2:
        result["test_nll_quadrature"] = float(-quadrature_log_px(model, x).mean())
    if judged_by := judge.find(run):
        result |= judge.verdict(judged_by, sample(model, judge.JUDGED), data.test_images)
    return result


@torch.inference_mode()
def sample(model: VAE, n: int) -> Tensor:
    """The pixels' means for n latents of the prior: (n, 28, 28) uint8, of the same latents in every call."""
    z = fixed_normal("samples", n, model.z_dim).to(next(model.parameters()).device)
    return torch.cat([decoder_means(model, part) for part in z.split(EVALUATION_BATCH)])


@torch.inference_mode()
def decoder_means(model: VAE, z: Tensor) -> Tensor:
    """The pixels' means as images, (n, z_dim) to (n, 28, 28) uint8: what p(x|z) looks like, not a draw from it."""
    return pictures.to_uint8(torch.sigmoid(model.decode(z))).view(-1, mnist.SIDE, mnist.SIDE)


@torch.inference_mode()
def decoder_draws(model: VAE, z: Tensor) -> Tensor:
    """Pixels drawn from p(x|z), (n, z_dim) to (n, 28, 28) uint8, 0 or 255; the noise is the same in every call."""
    means = torch.sigmoid(model.decode(z))
    noise = torch.rand(means.shape, generator=fixed_generator("draws")).to(means)
    return pictures.to_uint8((noise < means).float()).view(-1, mnist.SIDE, mnist.SIDE)


# Pictures


def panel(model: VAE) -> Tensor:
    """Means at one fixed set of latents, so that an eye can follow an image through training: (n, 28, 28) uint8.

    For z of 2 they are the manifold's, else 16 draws from the prior.
    """
    z = manifold_latents(MANIFOLD_SIDE) if model.z_dim == 2 else fixed_normal("panels", 16, model.z_dim)
    return decoder_means(model, z.to(next(model.parameters()).device))


def manifold_latents(side: int) -> Tensor:
    """Latents (side^2, 2), row by row from the top left: normal quantiles of u_i = (i + 1/2) / side on each axis."""
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    z2, z1 = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack((z1, z2), dim=-1).view(-1, 2)


def draw(run: Run, model: VAE, data: mnist.Data) -> None:
    """Draw curves and panels from the history and the frames, everything else from the weights."""
    frames = {**run.frames, run.args.epochs: panel(model)}
    keys, title = ("train_elbo", "val_elbo"), f"Evidence lower bound, z of {model.z_dim}"
    pictures.save_training_curves(run.figure("elbo"), run.history, keys, "nats per image (higher is better)", title)
    if model.z_dim == 2:
        for epoch in frames.keys() & run.panels(0, 0.5, 1):
            draw_manifold(run, epoch, frames[epoch])
        tiles = [pictures.tile(images, MANIFOLD_SIDE, gap=0) for images in run.frames.values()]
        pictures.save_gif(run.figure("manifold"), tiles)
        return
    for epoch, images in frames.items():
        pictures.save_grid(run.figure(f"samples_{run.stamp(epoch)}"), images, columns=4)
    z = fixed_normal("panels", 16, model.z_dim).to(run.device)
    pictures.save_grid(run.figure("draws"), decoder_draws(model, z), columns=4)
    x, eps = (part[:10] for part in evaluation_set(data.validation_images, "validation", model.z_dim))
    with torch.inference_mode():
        means = decoder_means(model, reparameterize(*model.encode(x), eps))
    rows = (data.validation_images[:10], pictures.to_uint8(x).view_as(means), means)
    pictures.save_grid(run.figure("reconstructions"), torch.cat(rows), columns=10)


def draw_manifold(run: Run, epoch: int, images: Tensor) -> None:
    """Decoder means over the plane of latents, at the prior's quantiles: equal steps are equal shares of the prior."""
    fig, (ax,) = pictures.figure(5.2, 5.4)
    ax.imshow(pictures.tile(images, MANIFOLD_SIDE, gap=0), cmap="gray", vmin=0, vmax=255, extent=(0, 1, 0, 1))
    values = (-2, -1, 0, 1, 2)
    positions = torch.special.ndtr(torch.tensor(values, dtype=torch.float64)).tolist()
    ax.set_xticks(positions, map(str, values))
    ax.set_yticks(positions, map(str, values))
    ax.set(xlabel="$z_1$ (at quantiles of the prior)", ylabel="$z_2$", title=f"Decoder means, epoch {epoch}")
    pictures.save_figure(run.figure(f"manifold_{run.stamp(epoch)}"), fig, pdf=False)


# Flags


def flags() -> cli.Parser:
    """The script's flags, with the report's settings as defaults."""
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    cli.add_flags(parser, epochs=40, batch_size=320, lr=3e-3, betas=(0.9, 0.999))
    parser.add_argument("--z-dim", type=cli.positive_int, default=20, metavar="N", help="latents; 2 draws a manifold")
    parser.add_argument("--hidden", type=cli.positive_int, default=416, metavar="N", help="units of every hidden layer")
    parser.add_argument("--warmup", type=cli.fraction, default=0.05, metavar="X", help="share of steps until the peak")
    parser.add_argument("--importance-samples", type=cli.positive_int, default=500, metavar="K", help="per image")
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Train, or with --evaluate or --sample use what was trained."""
    parser = flags()
    args = parser.parse_args(argv)
    run = Run(f"vae_z{args.z_dim}", parser, args, report=({}, {"z_dim": 2}), evaluation=("importance_samples",))
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
    draw(run, model, data)
    run.finish(model, lambda: evaluate(run, model, data))


if __name__ == "__main__":
    sys.exit(main())
