"""Variational autoencoder of binarised MNIST (Kingma & Welling 2014; Rezende, Mohamed & Wierstra 2014).

An encoder q(z|x) = N(mu(x), diag exp(logvar(x))) and a decoder p(x|z) of independent Bernoulli pixels, both fully
connected, maximise the evidence lower bound on log p(x) with one reparameterized sample,

    ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z)).                                             eq:elbo of the report

The prior p(z) is N(0, I) or, with --prior flow, what a small normalizing flow makes of it.

    python code/vae.py              # z of 20: test ELBO -89.10 nats, -log p(x) 85.97; 195 s
    python code/vae.py --z-dim 2    # z of 2: test ELBO -133.94 nats, -log p(x) 130.07; 150 s
    python code/vae.py --best       # z of 32: test ELBO -83.84 nats, -log p(x) 81.61; 1227 s
    (seeds 0 to 2, means; times of seed 0; AMD EPYC, 2 threads, torch 2.14.1+cu130;
    Intel(R) Xeon(R) Processor, 2 threads, torch 2.14.1+cu130)
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
EVALUATION_BATCH = 1000
MANIFOLD_SIDE = 20  # images along each axis
BEST = {  # of the record run
    "z_dim": 32, "prior": "flow", "hidden": 512, "depth": 3, "epochs": 140, "batch_size": 500, "lr": 4e-3,
    "weight_decay": 0.1, "importance_samples": 5000,
}  # fmt: skip


# Model


class Residual(nn.Module):
    """h + SiLU(W h + b), (..., hidden) to the same: the sum lets a larger learning rate train a deeper network."""

    def __init__(self, hidden: int):
        super().__init__()
        self.linear = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.silu(self.linear(h))


def mlp(inputs: int, hidden: int, depth: int, outputs: int) -> nn.Sequential:
    """`depth` hidden layers, all but the first residual: (..., inputs) to (..., outputs)."""
    residual = (Residual(hidden) for _ in range(depth - 1))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), *residual, nn.Linear(hidden, outputs))


class Coupling(nn.Module):
    """z_b (..., moved), scaled and shifted by what a network with two hidden layers makes of z_a (..., seen)."""

    def __init__(self, seen: int, moved: int, hidden: int):
        super().__init__()
        last = nn.Linear(hidden, 2 * moved)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        first = nn.Linear(seen, hidden)
        self.conditioner = nn.Sequential(first, nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), last)

    def maps(self, z_a: Tensor) -> tuple[Tensor, Tensor]:
        """What z_a says: log-scale and shift, (..., moved) each."""
        log_scale, shift = self.conditioner(z_a).chunk(2, dim=-1)
        return torch.tanh(log_scale), shift

    def forward(self, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
        """The moved z_b, and the coupling's ladj, log |det| of its Jacobian, (...), eq:coupling."""
        log_scale, shift = self.maps(z_a)
        return z_b * torch.exp(log_scale) + shift, log_scale.sum(-1)

    def inverse(self, z_a: Tensor, u_b: Tensor) -> Tensor:
        """The z_b that `forward` maps to u_b."""
        log_scale, shift = self.maps(z_a)
        return (u_b - shift) * torch.exp(-log_scale)


class Prior(nn.Module):
    """p(z) of z = g(u), u of N(0, I) and g the inverse of a chain of couplings; without any, p(z) is N(0, I).

    The couplings are nf.py's without its mixtures, on vectors: MLPs where those need convolutions, so that a shared
    class would have nothing left but one line of arithmetic.
    """

    def __init__(self, z_dim: int, couplings: int, hidden: int):
        super().__init__()
        self.moved = z_dim // 2
        self.couplings = nn.ModuleList(Coupling(z_dim - self.moved, self.moved, hidden) for _ in range(couplings))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., z_dim) to u, (..., z_dim), and the ladj, log |det du/dz|, (...)."""
        ladj = z.new_zeros(z.shape[:-1])
        for coupling in self.couplings:
            z_a, z_b = z.tensor_split([z.shape[-1] - self.moved], dim=-1)
            u_b, ladj_coupling = coupling(z_a, z_b)
            z, ladj = torch.cat((u_b, z_a), dim=-1), ladj + ladj_coupling  # the next one moves what this one saw
        return z, ladj

    def inverse(self, u: Tensor) -> Tensor:
        """z = g(u), (..., z_dim) to the same."""
        for coupling in reversed(self.couplings):
            u_b, z_a = u.tensor_split([self.moved], dim=-1)
            u = torch.cat((z_a, coupling.inverse(z_a, u_b)), dim=-1)
        return u


class VAE(nn.Module):
    """Encoder and decoder, each with `depth` hidden layers of `hidden` units, and the prior.

    couplings, prior_hidden: of the prior and its networks; without couplings it is N(0, I).
    """

    def __init__(self, z_dim: int, hidden: int, depth: int, couplings: int = 0, prior_hidden: int = 0):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = mlp(mnist.PIXELS, hidden, depth, 2 * z_dim)
        self.decoder = mlp(z_dim, hidden, depth, mnist.PIXELS)
        self.prior = Prior(z_dim, couplings, prior_hidden)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (batch, 784) to mu and logvar of q(z|x), (batch, z_dim) each.

        An output a means a variance of exp(a) from exp(-12) to 1, the normal prior's, and 1 + a beyond. With exp alone,
        one image whose a strays to 13 costs exp(13) / 2 = 221,000 nats; and where q is narrower than the posterior, the
        stopped gradient's noise, which grows as 1/sigma, drives a further down, until it is not finite (docs/vae.md).
        """
        mu, a = self.encoder(x).chunk(2, dim=-1)
        return mu, a.clamp(-12, 0) + torch.log1p(a.clamp(min=0))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (..., z_dim) to the logits of the pixels' Bernoulli means, (..., 784)."""
        return self.decoder(z)


def build(config: dict) -> VAE:
    """The model of a run's config, untrained."""
    couplings = config["couplings"] if config["prior"] == "flow" else 0
    return VAE(config["z_dim"], config["hidden"], config["depth"], couplings, config["prior_hidden"])


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


def log_weight(model: VAE, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor, stopped: bool = False) -> Tensor:
    """log w = log p(x|z) + log p(z) - log q(z|x) at z = mu + exp(logvar/2) eps, eq:weight; (..., batch), in nats.

    x: (batch, 784); mu, logvar: (batch, z_dim) of q(z|x); eps: (..., batch, z_dim) standard normal. The densities of z
    share their (2 pi)^(-z_dim/2), which is left out of both. With `stopped`, log q's own mu and logvar are constants to
    the gradient, which loses a term of mean zero, eq:stopped (Roeder et al. 2017): where q is the posterior, log w is
    the same for every z, and its gradient with respect to mu and logvar vanishes.
    """
    z = reparameterize(mu, logvar, eps)
    u, ladj = model.prior(z)
    log_prior = ladj - 0.5 * u.square().sum(-1)
    if stopped:
        mu, logvar = mu.detach(), logvar.detach()
    log_q = -0.5 * (logvar + (z - mu).square() * torch.exp(-logvar)).sum(-1)
    return bernoulli_log_prob(x, model.decode(z)) + log_prior - log_q


def elbo(model: VAE, x: Tensor, eps: Tensor, stopped: bool = False) -> Tensor:
    """The evidence lower bound at one sample of q(z|x), eq:elbo: x (batch, 784), eps (batch, z_dim) to (batch,), nats.

    It is `log_weight`, whose log p(z) - log q(z|x) is replaced by its mean, minus the KL, where that has a closed form
    and the gradient is the plain one.
    """
    mu, logvar = model.encode(x)
    if stopped or model.prior.couplings:
        return log_weight(model, x, mu, logvar, eps, stopped)
    logits = model.decode(reparameterize(mu, logvar, eps))
    return bernoulli_log_prob(x, logits) - kl_to_standard_normal(mu, logvar)


def importance_weighted_bound(log_w: Tensor) -> Tensor:
    """L_K = log mean_k w_k, eq:iwae (Burda et al. 2016): (K, batch) to (batch,). Its mean rises with K to log p(x)."""
    return torch.logsumexp(log_w, dim=0) - math.log(len(log_w))


# Training


def draw_batch(images: Tensor, index: Tensor, z_dim: int) -> tuple[Tensor, Tensor]:
    """Fresh Bernoulli pixels (batch, 784) of images[index], and eps (batch, z_dim), on the images' device."""
    x = binarise(images.index_select(0, index))
    return x, torch.randn(len(index), z_dim, device=images.device)


def training_step(
    model: VAE, optimizer: Optimizer, images: Tensor, index: Tensor, stopped: bool, clip: float
) -> tuple[Tensor, ...]:
    """One step of Adam up the mean `elbo` of images[index], (batch,) of images (n, 784) uint8.

    It follows eq:stopped, or, if not `stopped` and under a normal prior, goes down eq:loss. Returns minus that mean and
    the gradient's norm before it is clipped, (), detached. Nothing here waits for the device.
    """
    x, eps = draw_batch(images, index, model.z_dim)
    loss = -elbo(model, x, eps, stopped).mean()
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach(), norm


def train(run: Run, model: VAE, data: mnist.Data) -> None:
    """Maximise the ELBO for the run's epochs, recording it on fixed pixels and fixed eps after each.

    `gradient_norm` is the greatest of an epoch's steps, before clipping.
    """
    args = run.args
    images = data.train_images.flatten(1)
    steps = mnist.steps_per_epoch(len(images), args.batch_size)
    optimizer = training.adam(model.parameters(), args.lr, args.weight_decay, betas=args.betas)
    run.start(model=model, optimizer=optimizer)
    settings = args.gradient == "stopped", args.clip
    take_step = training.CapturedStep(lambda i: training_step(model, optimizer, images, i, *settings), run.device)
    losses, norms = torch.zeros(2, steps, device=run.device)
    train_set = evaluation_set(images[:EVALUATION_IMAGES], "training", model.z_dim)
    validation_set = evaluation_set(data.validation_images, "validation", model.z_dim)
    for epoch in range(run.first_epoch, args.epochs + 1):
        figures = {}
        if epoch > 0:
            for step, index in run.steps(epoch, mnist.batches(len(images), args.batch_size, run.device), steps):
                training.set_lr(optimizer, args.lr * training.warmup_cosine(step, args.epochs * steps, args.warmup))
                losses[step % steps], norms[step % steps] = take_step(index)
            training.check_finite(epoch, gradient_norm=norms, loss=losses)
            figures["gradient_norm"] = float(norms.max())
        if run.follows:
            continue
        if model.z_dim == 2 or epoch in run.panels(0, 0.25, 0.5, 0.75, 1):
            run.frames[epoch] = panel(model).cpu()
        train_elbo, val_elbo = (float(per_image_elbo(model, *each).mean()) for each in (train_set, validation_set))
        run.record(epoch, train_elbo=train_elbo, val_elbo=val_elbo, **figures)


# Evaluation


def evaluation_set(images: Tensor, label: str, z_dim: int) -> tuple[Tensor, Tensor]:
    """Binarised pixels (n, 784) and eps (n, z_dim) for images (n, ...), a function of `label` and the image's index."""
    images = images.flatten(1)
    eps = fixed_normal(f"eps, {label}", len(images), z_dim).to(images.device)
    return binarise(images, fixed_generator(f"pixels, {label}")), eps


@torch.inference_mode()
def per_image_elbo(model: VAE, x: Tensor, eps: Tensor, batch: int = EVALUATION_BATCH) -> Tensor:
    """`elbo` of any number of images, in batches: (n,) in float64, on the CPU."""
    return torch.cat([elbo(model, *each) for each in zip(x.split(batch), eps.split(batch))]).cpu().double()


@torch.inference_mode()
def importance_sampled_log_px(
    model: VAE, x: Tensor, draws: int, batch: int = EVALUATION_BATCH, unfinished: Path | None = None
) -> Tensor:
    """log p(x) of every image by L_K, eq:iwae, with K = `draws` samples of q(z|x): (n,) in nats, float64, on the CPU.

    unfinished: as in `experiment.log_mean_exp`.
    """
    encoded = [model.encode(part) for part in x.split(batch)]

    def log_w(k: int) -> Tensor:
        eps = fixed_normal(f"eps, importance sample {k}", len(x), model.z_dim).to(x)
        parts = zip(x.split(batch), encoded, eps.split(batch))
        return torch.cat([log_weight(model, part, *q, noise) for part, q, noise in parts])

    return log_mean_exp(log_w, draws, unfinished)


@torch.inference_mode()
def quadrature_log_px(model: VAE, x: Tensor, points: int = 601, limit: float = 6.0, block: int = 1000) -> Tensor:
    """log p(x) of every image by the trapezoid rule over a two-dimensional u: (n,) in nats, float64, on the CPU.

    The grid has `points` along each axis of [-limit, limit]^2. For a smooth integrand that vanishes at its edge the
    rule's error falls faster than any power of the step (with the kinks of a flow prior, like its square).
    """
    axis = torch.linspace(-limit, limit, points, dtype=torch.float64)
    step = 2 * limit / (points - 1)
    grid = torch.cartesian_prod(axis, axis)
    log_cell = 2 * math.log(step) - math.log(2 * math.pi) - 0.5 * grid.square().sum(-1)  # log p(u) du
    total = torch.full((len(x),), -math.inf, dtype=torch.float64)
    for u, log_measure in cli.progress(list(zip(grid.split(block), log_cell.split(block))), "quadrature"):
        logits = model.decode(model.prior.inverse(u.to(x)))
        log_joint = x @ logits.T + (log_measure.to(x) - F.softplus(logits).sum(-1))  # (n, block)
        total = torch.logaddexp(total, log_joint.logsumexp(-1).cpu().double())
    return total


def evaluate(run: Run, model: VAE, data: mnist.Data) -> dict:
    """The `result` of a trained model, on the test set; the judge's verdict is on decoder means."""
    draws = run.args.importance_samples
    x, eps = evaluation_set(data.test_images, "test", model.z_dim)
    log_px = importance_sampled_log_px(model, x, draws, unfinished=run.unfinished(model, x))
    result = {
        "test_elbo": float(per_image_elbo(model, x, eps).mean()),
        "test_nll": float(-log_px.mean()),
        "test_nll_se": float(log_px.std() / math.sqrt(len(log_px))),
        "importance_samples": draws,
        "seconds_per_1000_samples": seconds_per_1000(lambda n: sample(model, n), run.device),
    }
    if model.z_dim == 2:
        result["test_nll_quadrature"] = float(-quadrature_log_px(model, x).mean())
    if judged_by := judge.find(run, data):
        result |= judge.verdict(judged_by, sample(model, judge.JUDGED), data.test_images)
    return result


@torch.inference_mode()
def sample(model: VAE, n: int) -> Tensor:
    """The pixels' means for n latents of the prior: (n, 28, 28) uint8, of the same latents in every call."""
    u = fixed_normal("samples", n, model.z_dim).to(next(model.parameters()).device)
    return torch.cat([decoder_means(model, model.prior.inverse(part)) for part in u.split(EVALUATION_BATCH)])


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


@torch.inference_mode()
def panel(model: VAE) -> Tensor:
    """Means at one fixed set of latents, so that an eye can follow an image through training: (n, 28, 28) uint8.

    For z of 2 they are the manifold's, else 16 draws from the prior.
    """
    u = manifold_latents(MANIFOLD_SIDE) if model.z_dim == 2 else fixed_normal("panels", 16, model.z_dim)
    return decoder_means(model, model.prior.inverse(u.to(next(model.parameters()).device)))


def manifold_latents(side: int) -> Tensor:
    """u (side^2, 2), row by row from the top left: the normal quantiles of (i + 1/2) / side on each axis."""
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    u2, u1 = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack((u1, u2), dim=-1).view(-1, 2)


@torch.inference_mode()
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
    u = fixed_normal("panels", 16, model.z_dim).to(run.device)
    pictures.save_grid(run.figure("draws"), decoder_draws(model, model.prior.inverse(u)), columns=4)
    x, eps = (part[:10] for part in evaluation_set(data.validation_images, "validation", model.z_dim))
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
    letter = "u" if run.args.prior == "flow" else "z"
    labels = {"xlabel": f"${letter}_1$ (at quantiles of the prior)", "ylabel": f"${letter}_2$"}
    ax.set(**labels, title=f"Decoder means, epoch {epoch}")
    pictures.save_figure(run.figure(f"manifold_{run.stamp(epoch)}"), fig, pdf=False)


# Flags


def flags() -> cli.Parser:
    """The script's flags, with the report's settings as defaults."""
    parser = cli.Parser(__doc__, BEST)
    cli.add_flags(parser, epochs=40, batch_size=320, lr=3e-3, betas=(0.9, 0.999))
    count = cli.positive_int
    parser.add_argument("--z-dim", type=count, default=20, metavar="N", help="latents; 2 draws a manifold")
    parser.add_argument("--hidden", type=count, default=400, metavar="N", help="units of every hidden layer")
    parser.add_argument(
        "--depth", type=cli.layers, default=4, metavar="N", help="hidden layers of encoder and of decoder"
    )
    parser.add_argument("--prior", choices=("normal", "flow"), default="normal", help="the latents' distribution")
    parser.add_argument("--couplings", type=cli.layers, default=8, metavar="N", help="of the flow prior")
    parser.add_argument("--prior-hidden", type=count, default=128, metavar="N", help="units of its hidden layers")
    what = "stopped: of log q through its sample alone, not through its mean and variance"
    parser.add_argument("--gradient", choices=("stopped", "plain"), default="stopped", help=what)
    parser.add_argument(
        "--weight-decay",
        type=cli.fraction,
        default=0.0,
        metavar="X",
        help="of matrices, decoupled from the gradient (AdamW)",
    )
    parser.add_argument(
        "--clip", type=cli.positive_float, default=500.0, metavar="X", help="greatest norm of a gradient"
    )
    parser.add_argument("--warmup", type=cli.fraction, default=0.05, metavar="X", help="share of steps until the peak")
    parser.add_argument("--importance-samples", type=count, default=500, metavar="K", help="per image")
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Train, or with --evaluate or --sample use what was trained."""
    parser = flags()
    args = parser.parse_args(argv)
    if args.prior == "flow" and args.z_dim == 1:
        raise cli.UserError("--prior flow moves one half of z by the other: --z-dim must be 2 or more")
    name, report = ("vae_best", ({},)) if args.best else (f"vae_z{args.z_dim}", ({}, {"z_dim": 2}))
    run = Run(name, parser, args, report=report, evaluation=("importance_samples",))
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
