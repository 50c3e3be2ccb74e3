"""Every pen-and-paper answer of the report, checked by computation; one function a question.

    python code/theory.py       # seconds; writes figures/theory.json and figures/theory_*.png

It takes the trained z = 2 VAE from the committed weights.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import experiment
import mnist
import pictures
import vae
from experiment import UserError, fixed_normal

POSTERIOR_IMAGES = 1000
WINDOW, WINDOW_POINTS = 0.8, 241  # of the posterior that is drawn: from the mean of q, to each side


def q1_4_importance_sampling(model: vae.VAE, data: mnist.Data, out: Path) -> dict:
    """Where importance sampling from the encoder falls short of log p(x), and why.

    On test images it is compared with quadrature, which needs no encoder. The median image differs little. Some differ
    by many nats: there most of the posterior lies where q(z|x), one narrow Gaussian, never draws, so the estimate
    has seen the rest of the integral not once. Drawing every second z from the prior instead closes the gap, which
    shows that it is q's. theory_posterior.png draws posteriors and q at the median, 90th and 99th percentile.
    """
    x, _ = (part[:POSTERIOR_IMAGES] for part in vae.evaluation_set(data.test_images, "test", 2))
    exact = vae.quadrature_log_px(model, x, vae.QUADRATURE_POINTS)
    sampled = vae.importance_sampled_log_px(model, x, draws=500)
    defensive = defensive_log_px(model, x, draws=10_000)
    gap = exact - sampled
    percentiles = {"median": 0.5, "percentile_90": 0.9, "percentile_99": 0.99}
    chosen = [int((gap - gap.quantile(share)).abs().argmin()) for share in percentiles.values()]
    draw_posteriors(model, x[chosen], gap[chosen], out)
    return {
        "images": len(x),
        "nll_quadrature": float(-exact.mean()),
        "nll_importance_sampling": float(-sampled.mean()),
        "nll_half_from_the_prior": float(-defensive.mean()),
        **{f"gap_{name}": float(gap.quantile(share)) for name, share in percentiles.items()},
    }


@torch.inference_mode()
def defensive_log_px(model: vae.VAE, x: Tensor, draws: int, batch: int = 100) -> Tensor:
    """log p(x) by importance sampling from (q(z|x) + p(z)) / 2, half of the draws from each: (n,) in float64.

    The prior's draws are shared by all images, whose products with the decoded logits then are one matrix product.
    """
    half = draws // 2
    z = fixed_normal("z, defensive", half, model.z_dim)
    logits = model.decode(z)
    estimates = []
    for part in x.split(batch):
        mu, logvar = (each[:, None] for each in model.encode(part))  # (batch, 1, z_dim)
        eps = fixed_normal("eps, defensive", half // 10, model.z_dim)  # q is narrow: a tenth as many draws suffice
        own = vae.reparametrise(mu, logvar, eps)  # (batch, half // 10, z_dim)
        log_own = part[:, None] * (own_logits := model.decode(own)) - F.softplus(own_logits)
        log_shared = part @ logits.T - F.softplus(logits).sum(-1)
        mixed = []
        for points, log_px in ((own, log_own.sum(-1)), (z[None], log_shared)):
            log_prior = -0.5 * points.square().sum(-1)
            log_q = -0.5 * ((points - mu).square() / logvar.exp() + logvar).sum(-1)
            log_w = log_px + log_prior - torch.logaddexp(log_q, log_prior) + math.log(2)
            mixed.append(vae.importance_weighted_bound(log_w.double().T))
        estimates.append(torch.logaddexp(*mixed) - math.log(2))
    return torch.cat(estimates)


@torch.inference_mode()
def draw_posteriors(model: vae.VAE, x: Tensor, gap: Tensor, out: Path) -> None:
    """The posterior of each image near q(z|x), and two standard deviations of q(z|x) around its mean."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Ellipse

    whole = Figure(figsize=(7.2, 2.6), layout="constrained")
    mu, logvar = model.encode(x)
    offset = torch.linspace(-WINDOW, WINDOW, WINDOW_POINTS)
    for n, axes in enumerate(whole.subplots(1, len(x))):
        z2, z1 = torch.meshgrid(mu[n, 1] + offset, mu[n, 0] + offset, indexing="ij")
        z = torch.stack((z1, z2), dim=-1)
        logits = model.decode(z)
        log_joint = vae.bernoulli_log_prob(x[n], logits) - 0.5 * z.square().sum(-1)
        (left, right), (bottom, top) = ((float(each - WINDOW), float(each + WINDOW)) for each in mu[n])
        shown = axes.imshow(
            log_joint - log_joint.max(),
            cmap="Greys",
            origin="lower",
            extent=(left, right, bottom, top),
            vmin=-20,
            vmax=0,
        )
        size = (4 * torch.exp(0.5 * logvar[n])).tolist()  # two standard deviations to each side
        axes.add_patch(Ellipse(mu[n].tolist(), *size, fill=False, color=pictures.VALIDATION_COLOUR, linewidth=1.5))
        inset = axes.inset_axes((0.02, 0.7, 0.28, 0.28))
        inset.imshow(x[n].view(mnist.SIDE, mnist.SIDE), cmap="gray", vmin=0, vmax=1)
        inset.set_axis_off()
        axes.set_title(f"{gap[n]:.2f} nats short", fontsize=10)
        axes.set(xlabel="$z_1$", ylabel="$z_2$" if n == 0 else "")
        axes.tick_params(labelsize=8)
    whole.colorbar(shown, ax=whole.axes[: len(x)], label="log posterior, less its maximum", shrink=0.9)
    pictures.save_figure(out / "theory_posterior", whole, pdf=False)


def flags() -> experiment.Parser:
    """The script's flags."""
    parser = experiment.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=experiment.ROOT, metavar="DIR", help="writes DIR/figures/theory*")
    experiment.add_data_dir_flag(parser)
    return parser


@experiment.exit_status
def main(argv: list[str] | None = None) -> None:
    """Compute every answer and write figures/theory.json."""
    args = flags().parse_args(argv)
    figures = experiment.folder(args.out / "figures")
    path = experiment.ROOT / "weights" / "vae_z2.pt"
    if not path.exists():
        raise UserError(f"no weights at {path}: train them with: python code/vae.py --z-dim 2")
    model = vae.VAE(2)
    model.load_state_dict(experiment.load_archive(path, "the weights")["model"])
    data = mnist.load("mnist", args.data_dir)
    answers = {"q1_4": q1_4_importance_sampling(model, data, figures)}
    content = {"environment": experiment.environment(torch.device("cpu")), **answers}
    experiment.write(figures / "theory.json", experiment.json_bytes(content))
    print(experiment.json_bytes(answers).decode(), end="")


if __name__ == "__main__":
    sys.exit(main())
