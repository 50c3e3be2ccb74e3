"""Every pen-and-paper answer of the report, checked by computation; one function a question.

    python code/theory.py       # about a minute; writes figures/theory.json and figures/theory_*.png

It takes the trained z = 2 VAE from the committed weights.
"""

import hashlib
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

import experiment
import mnist
import pictures
import vae
from experiment import UserError, fixed_normal

POSTERIOR_IMAGES, POSTERIOR_DRAWS = 500, 4000
WINDOW, WINDOW_POINTS = 0.8, 241  # of the posterior that is drawn: from the mean of q, to each side


def q1_4_importance_sampling(model: vae.VAE, data: mnist.Data, out: Path) -> dict:
    """Where importance sampling from the encoder falls short of log p(x), and why.

    On test images it is compared with quadrature, which needs no encoder. The median image differs little. Some differ
    by many nats: there most of the posterior lies where q(z|x), one narrow Gaussian, never draws, so that the estimate
    never sees the rest of the integral. As many draws, but half of them from the prior, close the gap, which shows that
    it is q's. theory_posterior.png draws posteriors and q at the median, the 90th and the 99th percentile.
    """
    x, _ = (part[:POSTERIOR_IMAGES] for part in vae.evaluation_set(data.test_images, "test", 2))
    exact = vae.quadrature_log_px(model, x, vae.QUADRATURE_POINTS)
    from_q = vae.importance_sampled_log_px(model, x, POSTERIOR_DRAWS)
    from_both = defensive_log_px(model, x, POSTERIOR_DRAWS)
    gap = exact - from_q
    percentiles = {"gap_median": 0.5, "gap_percentile_90": 0.9, "gap_percentile_99": 0.99}
    chosen = [int((gap - gap.quantile(share)).abs().argmin()) for share in percentiles.values()]
    draw_posteriors(model, x[chosen], exact[chosen], gap[chosen], out)
    return {
        "images": len(x),
        "draws": POSTERIOR_DRAWS,
        "nll_quadrature": float(-exact.mean()),
        "nll_from_q": float(-from_q.mean()),
        "nll_from_q_and_prior": float(-from_both.mean()),
        **{name: float(gap.quantile(share)) for name, share in percentiles.items()},
    }


@torch.inference_mode()
def defensive_log_px(model: vae.VAE, x: Tensor, draws: int) -> Tensor:
    """log p(x) by importance sampling from (q(z|x) + p(z)) / 2, half of the draws from each: (n,) in float64.

    All images share the draws from the prior.
    """
    shared = fixed_normal("z, defensive", draws // 2, model.z_dim)
    shared_logits = model.decode(shared)
    eps = fixed_normal("eps, defensive", draws // 2, model.z_dim)
    mu, logvar = model.encode(x)
    estimates = []
    for n in range(len(x)):
        own = vae.reparametrise(mu[n], logvar[n], eps)
        z = torch.cat((own, shared))  # (draws, z_dim)
        log_px = vae.bernoulli_log_prob(x[n], torch.cat((model.decode(own), shared_logits)))
        log_prior = -0.5 * z.square().sum(-1)
        log_q = -0.5 * ((z - mu[n]).square() / logvar[n].exp() + logvar[n]).sum(-1)
        log_w = log_px + log_prior - torch.logaddexp(log_q, log_prior) + math.log(2)
        estimates.append(vae.importance_weighted_bound(log_w.double()))
    return torch.stack(estimates)


@torch.inference_mode()
def draw_posteriors(model: vae.VAE, x: Tensor, log_px: Tensor, gap: Tensor, out: Path) -> None:
    """The posterior of each image near q(z|x), and two standard deviations of q(z|x) around its mean."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Ellipse

    whole = Figure(figsize=(7.2, 2.6), layout="constrained")
    mu, logvar = model.encode(x)
    offset = torch.linspace(-WINDOW, WINDOW, WINDOW_POINTS)
    for n, axes in enumerate(whole.subplots(1, len(x))):
        z2, z1 = torch.meshgrid(mu[n, 1] + offset, mu[n, 0] + offset, indexing="ij")
        z = torch.stack((z1, z2), dim=-1)
        log_joint = vae.bernoulli_log_prob(x[n], model.decode(z)) - 0.5 * z.square().sum(-1) - math.log(2 * math.pi)
        extent = [float(each + side) for each in mu[n] for side in (-WINDOW, WINDOW)]
        shown = axes.imshow(log_joint - log_px[n], cmap="Greys", origin="lower", extent=extent, vmin=-15, vmax=5)
        size = (4 * torch.exp(0.5 * logvar[n])).tolist()  # two standard deviations to each side
        axes.add_patch(Ellipse(mu[n].tolist(), *size, fill=False, color=pictures.SECOND_COLOUR, linewidth=1.5))
        inset = axes.inset_axes((0.02, 0.7, 0.28, 0.28))
        inset.imshow(x[n].view(mnist.SIDE, mnist.SIDE), cmap="gray", vmin=0, vmax=1)
        inset.set_axis_off()
        axes.set_title(f"{gap[n]:.2f} nats short", fontsize=10)
        axes.set(xlabel="$z_1$", ylabel="$z_2$" if n == 0 else "")
        axes.tick_params(labelsize=8)
    bar = whole.colorbar(shown, ax=whole.axes[: len(x)], ticks=(-15, -10, -5, 0, 5), shrink=0.9)
    bar.ax.set_title("log density", fontsize=8)
    bar.ax.tick_params(labelsize=8)
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
    experiment.load_state(model, experiment.load_archive(path, "the weights"), path, "the weights")
    data = mnist.load("mnist", args.data_dir)
    answers = {"q1_4": q1_4_importance_sampling(model, data, figures)}
    weights = {"vae_z2_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    content = {"environment": experiment.environment(torch.device("cpu")), **weights, **answers}
    experiment.write(figures / "theory.json", experiment.json_bytes(content))
    print(experiment.json_bytes(answers).decode(), end="")


if __name__ == "__main__":
    sys.exit(main())
