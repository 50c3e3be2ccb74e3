"""Every pen-and-paper answer of the report, checked by computation; one function a question, named after it.

    python report/theory.py     # some minutes; writes figures/theory.json and figures/theory_*

A function returns what the report quotes, the tests check or a figure shows. Trained models come from the committed
weights; everything is seeded. Likelihoods and divergences are in nats unless said. The figures, and the report's three
diagrams among them, are in the report's own type.
"""

import copy
import gzip
import hashlib
import io
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))

import cli  # noqa: E402
import experiment  # noqa: E402
import judge  # noqa: E402
import mnist  # noqa: E402
import nf  # noqa: E402
import pictures  # noqa: E402
import training  # noqa: E402
import vae  # noqa: E402
from training import fixed_generator, fixed_normal  # noqa: E402

AUTOENCODER_IMAGES, AUTOENCODER_EPOCHS, AUTOENCODER_BATCH = 2000, 40, 200
RING_RADIUS, RING_DEVIATION, RING_STEPS = 2.0, 0.1, 3000
POSTERIOR_IMAGES, POSTERIOR_DRAWS = 250, 1000
GRID_POINTS = 640  # along each axis of a grid over z
MODE_POINTS, MODE_LIMIT = 601, 6.0  # of the grid on which a posterior's modes are found
WORST = 10  # images, by the gap of the bound
GAP_IMAGES, GAP_DRAWS, FITTING_STEPS = 100, 500, 100  # for models whose truth no grid gives
ENCODER_STEPS, ENCODER_BATCH = 300, 200  # of training the encoder alone
WINDOW_POINTS = 181  # along each axis of a posterior that is drawn
WITHIN = 0.95  # share of a posterior, or of a Gaussian in the plane, inside the curve that is drawn around it
RADIUS = math.sqrt(-2 * math.log(1 - WITHIN))  # of the Gaussian's curve, in its deviations
NOISE, DRAWS, REPEATS = 0.3, 1000, 400  # of the linear-Gaussian model, and of its estimates
ASCENT_STEPS = 50  # on the encoder, then on the decoder
CODES = 3500  # of the aggregate posterior
AGGREGATE_POINTS, LIMIT = 601, 6.0  # of the grid over z: along each axis, and at its edge
FREQUENCIES = (0.5, 4.0)  # of a sine whose mean's gradient is estimated
SIZES = (49, 98, 196, 392, 784, 1568)  # of Jacobians
SOURCE = (0.5, 0.25, 0.125, 0.125)  # probabilities of the values 0, 1, 2, 3
BUMP = 0.15  # deviation of a density's bumps in the middle of the cells
SEPARATIONS = [0.25 * n for n in range(33)]  # of two normals, in standard deviations
LINE = torch.linspace(-30, 40, 70_001, dtype=torch.float64)  # for integrals over one dimension
SPACING = float(LINE[1] - LINE[0])
REPORT_TYPE = {  # the figures' type is the report's, Computer Modern, at the size in which it prints them
    "font.family": "serif", "font.serif": ["cmr10"], "mathtext.fontset": "cm", "axes.formatter.use_mathtext": True,
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 7.5,
}  # fmt: skip


# Helpers


def normal_log_prob(x: Tensor, mean: Tensor | float, log_variance: Tensor | float) -> Tensor:
    """log N(x; mean, exp(log_variance) I) over the last dimension: (..., d) to (...), in nats."""
    log_variance = torch.as_tensor(log_variance, dtype=x.dtype)
    squares = (x - mean).square() / torch.exp(log_variance)
    return -0.5 * (squares + log_variance + math.log(2 * math.pi)).sum(-1)


def integral(values: Tensor) -> float:
    """The integral over the line of a function's values at LINE; the function vanishes at its ends."""
    return float(values.sum()) * SPACING


# 1 Variational autoencoders


def q1_1_autoencoder(data: mnist.Data, judged_by: judge.Judge, out: Path) -> dict:
    """Autoencoder and VAE of one architecture and equal training: reconstruction of new images, what noise decodes to.

    The autoencoder is the VAE's own networks without noise on the code and without the KL. Few training images, seen
    often, make the difference of training and test reconstruction, `excess`, visible; both are scored by -log p(x|z) at
    the mean code. Its codes spread as they like, and N(0, I) covers a small part of them. Each with 2 and with 20 code
    units. Frechet distances are of decoded draws. theory_autoencoder.png: the same draws, decoded by each.
    """
    images = data.train_images[:AUTOENCODER_IMAGES].flatten(1)
    seen, _ = vae.evaluation_set(images, "training", 2)
    new, _ = vae.evaluation_set(data.test_images, "test", 2)
    real, _ = judge.features_and_logits(judged_by, data.test_images)
    answer: dict = {"images": len(images), "epochs": AUTOENCODER_EPOCHS}
    rows, labels = [], []
    for z_dim, name in itertools.product((2, 20), ("autoencoder", "vae")):
        model = briefly_trained(images, z_dim, variational=name == "vae")
        with torch.inference_mode():
            of_seen, of_new = (float(reconstruction(model, x).mean()) for x in (seen, new))
            deviation = float(model.encode(new)[0].std(0).mean())
        samples = vae.sample(model, judge.JUDGED)
        features, _ = judge.features_and_logits(judged_by, samples)
        answer.setdefault(f"d{z_dim}", {})[name] = {
            "reconstruction": of_new, "excess": of_new - of_seen, "code_deviation": deviation,
            "fid": judge.frechet_distance(features, real),
        }  # fmt: skip
        rows.append(samples[:10])
        labels.append(f"{'VAE' if name == 'vae' else name}, $d = {z_dim}$")
    fig, (ax,) = pictures.figure(5.3, 1.6)
    grid = pictures.tile(torch.cat(rows), columns=10)
    ax.imshow(grid, cmap="gray", vmin=0, vmax=255)
    ax.set_yticks([(2 * row + 1) * len(grid) / (2 * len(rows)) for row in range(len(rows))], labels)
    ax.set_xticks([])
    ax.set_anchor("E")  # leaves the labels their room
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    pictures.save_figure(out / "theory_autoencoder", fig, pdf=False)
    return answer


def briefly_trained(images: Tensor, z_dim: int, variational: bool) -> vae.VAE:
    """A VAE, or the autoencoder that its networks make, trained on images (n, 784) uint8.

    There are three hidden layers: with vae.py's four the autoencoder learns more slowly than the VAE.
    """
    torch.manual_seed(0)
    model = vae.VAE(z_dim=z_dim, hidden=400, depth=3)
    optimizer = training.adam(model.parameters(), 2e-3)
    steps = AUTOENCODER_EPOCHS * (len(images) // AUTOENCODER_BATCH)
    epochs = (mnist.batches(len(images), AUTOENCODER_BATCH) for _ in range(AUTOENCODER_EPOCHS))
    for step, index in enumerate(itertools.chain.from_iterable(epochs)):
        training.set_lr(optimizer, 2e-3 * training.warmup_cosine(step, steps, 0.05))
        pixels, eps = vae.draw_batch(images, index, z_dim)
        loss = -vae.elbo(model, pixels, eps) if variational else reconstruction(model, pixels)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return model


def reconstruction(model: vae.VAE, x: Tensor) -> Tensor:
    """-log p(x|z) at the mean code of each image (n, 784): (n,), in nats."""
    return -vae.bernoulli_log_prob(x, model.decode(model.encode(x)[0]))


def q1_3_ring(out: Path) -> dict:
    """A small network learns to push N(0, I_2) onto a ring, which a decoder's first layers can do as well.

    It is fitted to the map `onto_ring`, which keeps the angle and so tears the plane at the origin. A continuous
    approximation of it must cover the ring's centre: the share of points within half of the radius is small and not
    zero. theory_ring.png: before and after.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(RING_STEPS):
        training.set_lr(optimizer, 3e-3 * training.warmup_cosine(step, RING_STEPS, 0.05))
        z = torch.randn(512, 2)
        loss = (net(z) - onto_ring(z)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = torch.randn(100_000, 2)
    with torch.inference_mode():
        x = net(z)
    radius, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    fig, panels = pictures.figure(4.8, 2.5, columns=2)
    for ax, points, name in zip(panels, (z, x), ("draws of $N(0, I_2)$", "through the network")):
        ax.scatter(*points[:4000].T.numpy(), s=2, color=pictures.FIRST_COLOUR, alpha=0.4, linewidths=0, rasterized=True)
        ax.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal")
        ax.set_title(name, fontsize=10)
    pictures.save_figure(out / "theory_ring", fig, pdf=False)
    return {
        "radius": RING_RADIUS,
        "deviation": RING_DEVIATION,
        "radius_mean": float(radius.mean()),
        "radius_deviation": float(radius[radius > RING_RADIUS / 2].std()),  # of what is not in the hole
        "angle_resultant": float(torch.hypot(angle.cos().mean(), angle.sin().mean())),  # 0 if uniform
        "percent_in_the_hole": 100 * float((radius < RING_RADIUS / 2).double().mean()),
    }


def onto_ring(z: Tensor) -> Tensor:
    """N(0, I_2) to a ring with a normal radius, (n, 2) to the same.

    The angle stays. The radius r has the distribution function 1 - exp(-r^2/2); that number, put into the inverse
    distribution function of the ring's radius, gives the new one.
    """
    r = z.norm(dim=1, keepdim=True)
    share = -torch.expm1(-0.5 * r.square())
    return z / r * (RING_RADIUS + RING_DEVIATION * torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)))


def q1_4_linear_gaussian() -> dict:
    """Estimates of log p(x), eq:montecarlo and eq:iwae, in a model in which it is known: draws from the prior, and q.

    z ~ N(0, I_d) and x = z + NOISE e with e ~ N(0, I_d), so x ~ N(0, (1 + NOISE^2) I), and the posterior is normal with
    mean x/(1 + NOISE^2) and variance NOISE^2/(1 + NOISE^2). q is the posterior with a standard deviation a fifth too
    large. For each d: KL(posterior || prior), and mean and root mean square of the estimates' errors, in nats. At d = 1
    also the mean of the estimated p(x) over p(x), which is 1 whatever the number of draws, with its standard error and,
    for draws from the prior, what eq:variance makes of that.
    """
    generator = fixed_generator("linear-Gaussian model")
    answer: dict = {"noise": NOISE, "draws": DRAWS, "log_draws": math.log(DRAWS), "repeats": REPEATS}
    for d in (1, 5, 10, 20):
        x = math.sqrt(1 + NOISE**2) * torch.randn(REPEATS, d, generator=generator, dtype=torch.float64)
        exact = normal_log_prob(x, 0.0, math.log(1 + NOISE**2))
        mean, log_variance = x / (1 + NOISE**2), math.log(NOISE**2 / (1 + NOISE**2))
        kl = vae.kl_to_standard_normal(mean, torch.full_like(mean, log_variance))
        row = {"kl_posterior_prior": float(kl.mean()), "kl_posterior_prior_se": float(kl.std() / REPEATS**0.5)}
        for name, centre, log_spread in (("prior", 0 * mean, 0.0), ("q", mean, log_variance + 2 * math.log(1.2))):
            eps = torch.randn(DRAWS, REPEATS, d, generator=generator, dtype=torch.float64)
            z = centre + math.exp(0.5 * log_spread) * eps
            log_w = normal_log_prob(x, z, 2 * math.log(NOISE)) + normal_log_prob(z, 0.0, 0.0)
            log_w -= normal_log_prob(z, centre, log_spread)
            error = torch.logsumexp(log_w, 0) - math.log(DRAWS) - exact
            row |= {f"{name}_bias": float(error.mean()), f"{name}_rms": float(error.square().mean().sqrt())}
            if d == 1:
                ratio = error.exp()
                row |= {f"{name}_ratio": float(ratio.mean()), f"{name}_ratio_se": float(ratio.std() / REPEATS**0.5)}
        if d == 1:
            chi2 = chi_squared(mean, math.exp(log_variance))
            row["prior_ratio_se_expected"] = float((chi2.mean() / DRAWS / REPEATS).sqrt())
        answer[f"d{d}"] = row
    return answer


def chi_squared(mean: Tensor, variance: float) -> Tensor:
    """chi^2(N(mean, variance) || N(0, 1)), in closed form, of any shape. The variance is below 2."""
    return torch.exp(mean.square() / (2 - variance)) / math.sqrt(variance * (2 - variance)) - 1


@torch.inference_mode()
def q1_4_gap(model: vae.VAE, data: mnist.Data, out: Path) -> dict:
    """What the bound of the z = 2 VAE loses: to its family of q, diagonal Gaussians, and to the shared encoder.

    On test images log p(x) comes from a grid. `gap_family` is what an image's own Gaussian would still lose, with the
    moments of its posterior's main mode or, where that is better, the encoder's; the best one loses no more.
    `gap_amortisation` is the rest (Cremer et al. 2018). `from_q` and `from_own`: how far importance sampling from
    either falls short of log p(x), at percentiles of the images. Of the WORST images by the bound's gap: the least
    and the median share of the posterior in its main mode, and how far that is from q's mean, in q's deviations.
    theory_posterior.png: the images nearest to the median, the 90th and the 99th percentile of what sampling from q
    falls short.
    """
    x, _ = (part[:POSTERIOR_IMAGES] for part in vae.evaluation_set(data.test_images, "test", 2))
    exact, mu_own, logvar_own, share = main_modes(model, x)
    mu, logvar = model.encode(x)
    distance = ((mu_own - mu) * torch.exp(-0.5 * logvar)).norm(dim=1)  # in q's deviations
    elbo, elbo_own = (elbo_by_nodes(model, x, *q, nodes=16).double() for q in ((mu, logvar), (mu_own, logvar_own)))
    gap = exact - elbo
    worst = gap.argsort(descending=True)[:WORST]
    answer: dict = {
        "images": len(x), "draws": POSTERIOR_DRAWS, "nll": float(-exact.mean()), "worst": len(worst),
        "worst_share": 100 * float(share[worst].min()), "worst_share_median": 100 * float(share[worst].median()),
        "worst_nearest": float(distance[worst].min()), "worst_farthest": float(distance[worst].max()),
    }  # fmt: skip
    better = (elbo_own > elbo).unsqueeze(1)
    own = torch.where(better, mu_own, mu), torch.where(better, logvar_own, logvar)
    answer |= gap_parts(exact, elbo, torch.maximum(elbo, elbo_own))
    percentiles = {"median": 0.5, "percentile_90": 0.9, "percentile_99": 0.99}
    for name, q in (("from_q", (mu, logvar)), ("from_own", own)):
        short = exact - sampled_log_px(model, x, *q, POSTERIOR_DRAWS)
        answer[name] = {each: float(short.quantile(rank)) for each, rank in percentiles.items()}
        answer[name]["mean"] = float(short.mean())
        if name == "from_q":
            chosen = [int((short - short.quantile(rank)).abs().argmin()) for rank in percentiles.values()]
    titles = ("the median", "the 90th percentile", "the 99th percentile")
    draw_posteriors(model, x[chosen], exact[chosen], [each[chosen] for each in (mu, logvar, *own)], titles, out)
    return answer


def gap_parts(log_px: Tensor, elbo: Tensor, best_elbo: Tensor) -> dict[str, float]:
    """Mean log p(x) - ELBO of images, (n,) each, and its parts; `amortisation_share` is in percent."""
    gap, family = float((log_px - elbo).mean()), float((log_px - best_elbo).mean())
    parts = {"gap": gap, "gap_family": family, "gap_amortisation": gap - family}
    return parts | {"amortisation_share": 100 * (gap - family) / gap}


def main_modes(model: vae.VAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By quadrature over a plane of z: log p(x) of images (n, 784), and the Gaussian of each posterior's main mode.

    Its mean and log-variance, (n, 2) each, are the posterior's within four deviations of the mean, to each side, around
    the greatest density; the last is that region's share of the posterior, (n,).
    """
    axis = torch.linspace(-MODE_LIMIT, MODE_LIMIT, MODE_POINTS)
    spacing = float(axis[1] - axis[0])
    log_joint = []
    for z in torch.cartesian_prod(axis, axis).split(1000):
        logits = model.decode(z)
        log_prior = normal_log_prob(z, 0.0, 0.0)
        log_joint.append(x @ logits.T + (log_prior - F.softplus(logits).sum(-1)))
    log_joint = torch.cat(log_joint, 1)  # (n, MODE_POINTS^2)
    log_px = log_joint.double().logsumexp(1)
    means, log_variances, shares = [], [], []
    for each, total in zip(log_joint, log_px):
        posterior = torch.exp(each - total).view(MODE_POINTS, MODE_POINTS).double()  # z1 down, z2 across
        top = int(posterior.argmax())
        centre, reach = axis[[top // MODE_POINTS, top % MODE_POINTS]].double(), torch.full((2,), 0.25).double()
        for _ in range(10):
            inside = [(axis - c).abs() <= max(r, 2 * spacing) for c, r in zip(centre, reach)]
            part = posterior[inside[0]][:, inside[1]]
            shared, places = part.sum(), [axis[mask].double() for mask in inside]
            sides = [part.sum(1) / shared, part.sum(0) / shared]
            centre = torch.stack([(place * side).sum() for place, side in zip(places, sides)])
            square = torch.stack([((p - c) ** 2 * side).sum() for p, c, side in zip(places, centre, sides)])
            variance = square.clamp(min=(spacing / 2) ** 2)  # a grid shows nothing narrower
            reach = 4 * variance.sqrt()
        means.append(centre)
        log_variances.append(variance.log())
        shares.append(shared)
    modes = (torch.stack(each).float() for each in (means, log_variances))
    return log_px + 2 * math.log(spacing), *modes, torch.stack(shares)


def sampled_log_px(model: vae.VAE, x: Tensor, mu: Tensor, logvar: Tensor, draws: int) -> Tensor:
    """log p(x) of images (n, 784) by importance sampling from N(mu, diag exp(logvar)), (n, z_dim): (n,) in float64."""
    log_w = []
    for k in range(0, draws, 50):
        eps = torch.randn(min(50, draws - k), *mu.shape, generator=fixed_generator(f"importance samples from {k}"))
        log_w.append(vae.log_weight(model, x, mu, logvar, eps))
    return vae.importance_weighted_bound(torch.cat(log_w).double())


def draw_posteriors(
    model: vae.VAE, x: Tensor, log_px: Tensor, gaussians: list[Tensor], titles: Sequence[str], out: Path
) -> None:
    """The posterior of each image, q and the image's own Gaussian: the curve around WITHIN, 95%, of each.

    gaussians: mu and logvar of q, then of the image's own.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Ellipse

    fig, panels = pictures.figure(6.4, 2.75, columns=len(x))
    mu, logvar, mu_own, logvar_own = gaussians
    for n, ax in enumerate(panels):
        reach = torch.stack([mu[n] - mu_own[n], *(5 * torch.exp(0.5 * each[n]) for each in (logvar, logvar_own))])
        side = float(reach.abs().max()) * 0.6 + float((mu[n] - mu_own[n]).abs().max()) / 2
        middle = (mu[n] + mu_own[n]) / 2
        offset = torch.linspace(-side, side, WINDOW_POINTS)
        z2, z1 = torch.meshgrid(middle[1] + offset, middle[0] + offset, indexing="ij")
        z = torch.stack((z1, z2), dim=-1)
        log_joint = vae.bernoulli_log_prob(x[n], model.decode(z)) + normal_log_prob(z, 0.0, 0.0)
        density = torch.exp(log_joint - log_px[n])
        extent = [float(each + way) for each in middle for way in (-side, side)]
        ax.imshow((log_joint - log_px[n]).numpy(), cmap="Greys", origin="lower", extent=extent, vmin=-15, vmax=14)
        ax.contour(z1, z2, density, levels=[density_level(density, WITHIN)], colors="black", linewidths=0.8)
        for centre, spread, colour, style in (
            (mu[n], logvar[n], pictures.SECOND_COLOUR, "-"),
            (mu_own[n], logvar_own[n], pictures.FIRST_COLOUR, "--"),
        ):
            size = (2 * RADIUS * torch.exp(0.5 * spread)).tolist()
            ax.add_patch(Ellipse(centre.tolist(), *size, fill=False, color=colour, linestyle=style, linewidth=1.3))
        inset = ax.inset_axes((0.02, 0.02, 0.25, 0.25))
        inset.imshow(x[n].view(mnist.SIDE, mnist.SIDE).numpy(), cmap="gray", vmin=0, vmax=1)
        inset.set_axis_off()
        ax.set_title(titles[n], fontsize=9)
        ax.set(xlabel="$z_1$", ylabel="$z_2$" if n == 0 else "", aspect="equal")
        ax.locator_params(nbins=4)
    lines = [
        Line2D([], [], color=colour, linestyle=style, label=label)
        for colour, style, label in (
            (pictures.SECOND_COLOUR, "-", "$q$, the encoder's"),
            (pictures.FIRST_COLOUR, "--", "the image's own Gaussian"),
            ("black", "-", "95% of the posterior"),
        )
    ]
    fig.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    pictures.save_figure(out / "theory_posterior", fig, pdf=False)


def density_level(density: Tensor, share: float) -> float:
    """The density above which lies that share of what is shown: a value of `density`, on any grid of equal cells."""
    values = density.flatten().sort(descending=True).values
    return float(values[int((values.cumsum(0) < share * values.sum()).sum())])


def q1_5_kl() -> dict:
    """KL(N(mu, sigma^2) || N(0, 1)) of examples, stable and naive in float32, and by Monte Carlo, in nats.

    Naively, (sigma^2 + mu^2 - 1)/2 - log sigma in float32 loses all its digits where the result is small; with expm1 of
    the log-variance it keeps two or three.
    """
    examples = {
        "tiny": (1e-5, 1.0000200001),
        "half": (0.5, 1.0),
        "wide": (0.0, 4.0),
        "narrow": (2.0, 0.01),
        "far": (100.0, 1.0),
    }
    answer = {}
    for name, (mu, variance) in examples.items():
        m, logvar = (torch.tensor([value], dtype=torch.float64) for value in (mu, math.log(variance)))
        exact = float(vae.kl_to_standard_normal(m, logvar))
        single = float(vae.kl_to_standard_normal(m.float(), logvar.float()))
        eps = torch.randn(100_000, 1, generator=fixed_generator(f"KL, {name}"), dtype=torch.float64)
        z = vae.reparameterize(m, logvar, eps)
        log_ratio = normal_log_prob(z, m, logvar) - normal_log_prob(z, 0.0, 0.0)
        answer[name] = {
            "mu": mu, "variance": variance, "kl": exact, "float32": single, "naive_float32": naive_kl(mu, variance),
            "monte_carlo": float(log_ratio.mean()), "monte_carlo_se": float(log_ratio.std() / len(z) ** 0.5),
        }  # fmt: skip
    return answer


def naive_kl(mu: float, variance: float) -> float:
    """(sigma^2 + mu^2 - 1)/2 - log sigma as it is written, in float32."""
    m, v = torch.tensor(mu), torch.tensor(variance)
    return float((v + m**2 - 1) / 2 - torch.log(v.sqrt()))


def q1_6_lower_bound(model: vae.VAE, data: mnist.Data) -> dict:
    """log p(x) - ELBO is KL(q || posterior), eq:gap, on the trained model; a bound that rises while log p(x) falls.

    The three come from three rules: log p(x) from a grid over z, the ELBO from Gauss-Hermite nodes of q, with the KL to
    the prior in closed form, the KL to the posterior from a grid around q, with a normaliser of its own. The example
    has two values of z with probability 1/2 each, a q that is kept, and a decoder that moves from p(x|z) = (1/2, 1/2)
    to (0.6, 0.36): q's share of its first value is 0.9.
    """
    x = vae.evaluation_set(data.test_images, "test", 2)[0][:8].double()
    model = copy.deepcopy(model).double()
    with torch.inference_mode():
        mu, logvar = model.encode(x)
        exact = vae.quadrature_log_px(model, x, points=651, limit=5.5)
        kl = posterior_kl(model, x, mu, logvar)
        bound = elbo_by_nodes(model, x, mu, logvar)
    before, after = (two_point_bound(*likelihoods, q=0.9) for likelihoods in ((0.5, 0.5), (0.6, 0.36)))
    return {
        "images": len(x),
        "gap_mean": float((exact - bound).mean()),
        "greatest_difference": float((exact - bound - kl).abs().max()),
        "two_point_elbo_before": before[0], "two_point_elbo_after": after[0],
        "two_point_nll_before": -before[1], "two_point_nll_after": -after[1],
    }  # fmt: skip


def elbo_by_nodes(model: vae.VAE, x: Tensor, mu: Tensor, logvar: Tensor, nodes: int = 48) -> Tensor:
    """The ELBO of images (n, 784) with the expectation over a two-dimensional q by Gauss-Hermite nodes: (n,)."""
    places, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(nodes))
    eps = torch.cartesian_prod(places, places).to(mu)
    weight = torch.cartesian_prod(weights, weights).prod(1).to(mu) / (2 * math.pi)
    z = vae.reparameterize(mu.unsqueeze(1), logvar.unsqueeze(1), eps)  # (n, nodes^2, 2)
    log_px = torch.stack([vae.bernoulli_log_prob(one, model.decode(at)) for one, at in zip(x, z)])
    return log_px @ weight - vae.kl_to_standard_normal(mu, logvar)


def posterior_kl(model: vae.VAE, x: Tensor, mu: Tensor, logvar: Tensor, points: int = 161) -> Tensor:
    """KL(q || posterior) of images (n, 784) on a grid of eight deviations around each q: (n,)."""
    normaliser = grid_log_px(model, x)
    axis = torch.linspace(-8, 8, points, dtype=torch.float64)
    eps = torch.cartesian_prod(axis, axis)
    log_q = normal_log_prob(eps, 0.0, 0.0)
    cell = torch.exp(log_q) * float(axis[1] - axis[0]) ** 2  # of q's probability
    kl = []
    for n in range(len(x)):
        z = vae.reparameterize(mu[n], logvar[n], eps)
        log_px = torch.cat([vae.bernoulli_log_prob(x[n], model.decode(part)) for part in z.split(2000)])
        log_posterior = log_px + normal_log_prob(z, 0.0, 0.0) - normaliser[n]
        kl.append((cell * (log_q - 0.5 * logvar[n].sum() - log_posterior)).sum())
    return torch.stack(kl)


def grid_log_px(model: vae.VAE, x: Tensor, limit: float = 5.8) -> Tensor:
    """log p(x) of images (n, 784), once more: by the midpoint rule on a grid that `vae.quadrature_log_px` has not."""
    spacing = 2 * limit / GRID_POINTS
    axis = (torch.arange(GRID_POINTS, dtype=x.dtype) + 0.5) * spacing - limit
    log_joint = []
    for z in torch.cartesian_prod(axis, axis).split(1000):
        logits = model.decode(z)
        log_px = x @ logits.T - F.softplus(logits).sum(1)  # (n, 1000)
        log_joint.append(torch.logsumexp(log_px + normal_log_prob(z, 0.0, 0.0), 1))
    return torch.logsumexp(torch.stack(log_joint), 0) + 2 * math.log(spacing)


def two_point_bound(first: float, second: float, q: float) -> tuple[float, float]:
    """ELBO and log p(x) for two values of z with probability 1/2 each and p(x|z) of (first, second); q of the first."""
    bound = q * math.log(0.5 * first / q) + (1 - q) * math.log(0.5 * second / (1 - q))
    return bound, math.log(0.5 * first + 0.5 * second)


def q1_8_steps(model: vae.VAE, data: mnist.Data) -> dict:
    """Steps on the encoder alone move the bound and not log p(x); steps on the decoder move both.

    From the trained model with its encoder's last layer disturbed, on 20 images: ELBO by nodes and log p(x) by
    quadrature, at the start, after ASCENT_STEPS steps on phi, and after as many more on theta. `others_nll`: of 20
    images that no step sees. `simpler`: two values of z with probability 1/2 each and a q that gives 1/2 to either; the
    decoder moves from p(x|z) = (0.8, 0.2) to (0.5, 0.5), which makes the posterior simpler and leaves log p(x).
    """
    x, others = vae.evaluation_set(data.test_images, "test", 2)[0][:40].double().chunk(2)
    model = copy.deepcopy(model).double()
    generator = fixed_generator("disturbed encoder")
    with torch.no_grad():
        for parameter in model.encoder[-1].parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def measured(when: str) -> dict[str, float]:
        with torch.inference_mode():
            bound = elbo_by_nodes(model, x, *model.encode(x))
        single = copy.deepcopy(model).float()  # half the time
        exact = vae.quadrature_log_px(single, torch.cat((x, others)).float()).chunk(2)
        figures = (bound.mean(), -exact[0].mean(), -exact[1].mean())
        return {f"{name}_{when}": float(value) for name, value in zip(("elbo", "nll", "others_nll"), figures)}

    answer = {"images": len(x), "steps": ASCENT_STEPS} | measured("start")
    for name, network in (("phi", model.encoder), ("theta", model.decoder)):
        model.requires_grad_(False)
        network.requires_grad_(True)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
        for _ in range(ASCENT_STEPS):
            optimizer.zero_grad()
            (-elbo_by_nodes(model, x, *model.encode(x), nodes=12)).mean().backward()
            optimizer.step()
        answer |= measured(f"after_{name}")
    before, after = (two_point_bound(*likelihoods, q=0.5) for likelihoods in ((0.8, 0.2), (0.5, 0.5)))
    names = ("simpler_elbo_before", "simpler_log_px_before", "simpler_elbo_after", "simpler_log_px_after")
    return answer | dict(zip(names, (*before, *after)))


@torch.inference_mode()
def q1_9_regulariser(model: vae.VAE, data: mnist.Data) -> dict:
    """The mean KL to the prior, in closed form, is I(n; z) + KL(aggregate posterior || prior), eq:rate.

    Over N training images. The information, which is at most log N, is by Monte Carlo, with 20 draws of every q; the
    KL of the aggregate is by quadrature over z. `mass` is the aggregate's own integral on that grid.
    """
    x = vae.evaluation_set(data.train_images[:CODES], "training", 2)[0]
    mu, logvar = (each.double() for each in model.encode(x))
    generator = fixed_generator("aggregate posterior")
    information = []
    for _ in range(20):
        z = vae.reparameterize(mu, logvar, torch.randn(mu.shape, generator=generator, dtype=torch.float64))
        information.append((normal_log_prob(z, mu, logvar) - aggregate_log_density(z, mu, logvar)).mean())
    axis = torch.linspace(-LIMIT, LIMIT, AGGREGATE_POINTS, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_aggregate = aggregate_log_density(grid, mu, logvar)
    share = log_aggregate.exp() * float(axis[1] - axis[0]) ** 2  # of the aggregate's probability
    answer = {
        "images": len(x),
        "log_images": math.log(len(x)),
        "mean_kl": float(vae.kl_to_standard_normal(mu, logvar).mean()),
        "information": float(torch.stack(information).mean()),
        "information_se": float(torch.stack(information).std() / len(information) ** 0.5),
        "aggregate_kl": float((share * (log_aggregate - normal_log_prob(grid, 0.0, 0.0))).sum()),
        "mass": float(share.sum()),
    }
    return answer | {"difference": abs(answer["information"] + answer["aggregate_kl"] - answer["mean_kl"])}


def aggregate_log_density(z: Tensor, mu: Tensor, logvar: Tensor, block: int = 1000) -> Tensor:
    """log mean_n N(z; mu_n, diag exp(logvar_n)) at z (m, 2), of codes (N, 2): (m,)."""
    precision = torch.exp(-logvar)
    constant = -0.5 * (mu.square() * precision + logvar).sum(1) - math.log(2 * math.pi) - math.log(len(mu))
    quadratic, linear = -0.5 * precision.T, (mu * precision).T  # the exponent is a polynomial of z
    return torch.cat([torch.logsumexp(p.square() @ quadratic + p @ linear + constant, 1) for p in z.split(block)])


def q1_10_loss(model: vae.VAE, data: mnist.Data) -> dict:
    """The script's ELBO, minus eq:loss's terms, against one that is spelt out number by number; and a common slip.

    On 4 images in float64; only the networks themselves are the script's in both. `wrong_kl` has 1/Sigma in place of
    Sigma, for a mu of 0 and a Sigma of 2: it is negative.
    """
    x, eps = (each[:4].double() for each in vae.evaluation_set(data.test_images, "test", 2))
    model = copy.deepcopy(model).double()
    with torch.inference_mode():
        ours = vae.elbo(model, x, eps)
        mu, logvar = model.encode(x)
    spelt_out = []
    for n in range(len(x)):
        bound = 0.0
        z = [m + math.sqrt(math.exp(v)) * e for m, v, e in zip(mu[n].tolist(), logvar[n].tolist(), eps[n].tolist())]
        logits = model.decode(torch.tensor(z, dtype=torch.float64)).tolist()
        for value, logit in zip(x[n].tolist(), logits):
            probability = 1 / (1 + math.exp(-logit))
            bound += value * math.log(probability) + (1 - value) * math.log(1 / (1 + math.exp(logit)))
        for mean, log_variance in zip(mu[n].tolist(), logvar[n].tolist()):
            bound -= 0.5 * (math.exp(log_variance) + mean**2 - 1 - log_variance)
        spelt_out.append(bound)
    differences = (ours - torch.tensor(spelt_out, dtype=torch.float64)).abs()
    variance = 2.0
    wrong = 0.5 * (1 / variance - 1 - math.log(variance))  # mu of 0
    return {"images": len(x), "greatest_difference": float(differences.max()), "wrong_kl": wrong}


def q1_11_gradients() -> dict:
    """Variance of two unbiased estimators of the gradient of E|z|^2 with respect to mu, z ~ N(mu, I_d).

    One draw each: 2z by reparameterization, |z|^2 (z - mu) by the score function. The mean over the components, for mu
    of ones, from 20,000 draws; the gradient is 2 mu.
    """
    answer = {}
    for d in (1, 10, 100):
        eps = torch.randn(20_000, d, generator=fixed_generator(f"gradient, {d}"), dtype=torch.float64)
        z = 1 + eps
        estimates = {"reparameterized": 2 * z, "score": z.square().sum(1, keepdim=True) * eps}
        row = {}
        for name, values in estimates.items():
            row[f"{name}_mean"] = float(values.mean())
            row[f"{name}_mean_se"] = float(values.mean(1).std() / len(values) ** 0.5)
            row[f"{name}_variance"] = float(values.var(0).mean())
        answer[f"d{d}"] = row
    eps = torch.randn(100_000, generator=fixed_generator("gradient, sine"), dtype=torch.float64)
    for k in FREQUENCIES:
        estimates = {"reparameterized": k * torch.cos(k * eps), "score": torch.sin(k * eps) * eps}
        answer[f"sine_{k:g}"] = {f"{name}_variance": float(values.var()) for name, values in estimates.items()}
    return answer


def q1_13_gap(models: dict[str, vae.VAE], z2: vae.VAE, data: mnist.Data) -> dict:
    """The parts of the bound's gap, as in `q1_4_gap`, where no grid gives log p(x), and under either gradient.

    For each of `models`: on test images, log p(x) by importance sampling from the image's own Gaussian, which is fitted
    by FITTING_STEPS steps up its ELBO. Then `z2`'s encoder alone is trained further on training images, by the stopped
    gradient and by the plain one, from the same start and on the same draws: log p(x) and the family's part stay, and
    the mean ELBO of test images moves by what amortisation loses less.
    """
    answer: dict = {"images": GAP_IMAGES, "draws": GAP_DRAWS, "steps": ENCODER_STEPS}
    for name, model in models.items():
        x, _ = (part[:GAP_IMAGES] for part in vae.evaluation_set(data.test_images, "test", model.z_dim))
        with torch.no_grad():
            q = model.encode(x)
        own = own_gaussians(model, x, *q)
        with torch.inference_mode():
            elbo, best = (sampled_elbo(model, x, *each, GAP_DRAWS) for each in (q, own))
            log_px = sampled_log_px(model, x, *own, GAP_DRAWS)
        better = torch.maximum(elbo, best)
        answer[name] = gap_parts(log_px, elbo, better) | {"gap_se": float((log_px - elbo).std() / len(x) ** 0.5)}
    x, eps = vae.evaluation_set(data.test_images, "test", 2)
    answer["elbo_start"] = float(vae.per_image_elbo(z2, x, eps).mean())
    images = data.train_images.flatten(1)
    for name in ("stopped", "plain"):
        torch.manual_seed(0)
        model = copy.deepcopy(z2)
        model.decoder.requires_grad_(False)
        optimizer = training.adam(model.encoder.parameters(), 1e-3)
        batches = itertools.chain.from_iterable(mnist.batches(len(images), ENCODER_BATCH) for _ in itertools.count())
        for step, index in enumerate(itertools.islice(batches, ENCODER_STEPS)):
            training.set_lr(optimizer, 1e-3 * training.warmup_cosine(step, ENCODER_STEPS, 0.05))
            loss = -vae.elbo(model, *vae.draw_batch(images, index, 2), stopped=name == "stopped").mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.encoder.parameters(), 500.0)
            optimizer.step()
        answer[f"elbo_{name}"] = float(vae.per_image_elbo(model, x, eps).mean())
    return answer


def own_gaussians(model: vae.VAE, x: Tensor, mu: Tensor, logvar: Tensor, draws: int = 8) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of each image's own Gaussian, (n, z_dim) each: its ELBO's ascent from those of q."""
    shift, log_ratio = torch.zeros_like(mu, requires_grad=True), torch.zeros_like(mu, requires_grad=True)
    optimizer = torch.optim.Adam((shift, log_ratio))
    generator = fixed_generator("own Gaussians")

    def gaussian() -> tuple[Tensor, Tensor]:
        return mu + torch.exp(0.5 * logvar) * shift, logvar + log_ratio

    for step in range(FITTING_STEPS):
        training.set_lr(optimizer, 0.1 * training.warmup_cosine(step, FITTING_STEPS, 0.05))
        eps = torch.randn(draws, *mu.shape, generator=generator)
        loss = -vae.log_weight(model, x, *gaussian(), eps, stopped=True).mean(0).sum()
        shift.grad, log_ratio.grad = torch.autograd.grad(loss, (shift, log_ratio))
        optimizer.step()
    return tuple(each.detach() for each in gaussian())


def sampled_elbo(model: vae.VAE, x: Tensor, mu: Tensor, logvar: Tensor, draws: int) -> Tensor:
    """The ELBO of images (n, 784) under q = N(mu, diag exp(logvar)), a mean over draws: (n,) in float64."""
    generator = fixed_generator("ELBO")
    noise = (torch.randn(mu.shape, generator=generator) for _ in range(draws))
    return torch.stack([vae.log_weight(model, x, mu, logvar, eps).double() for eps in noise]).mean(0)


# 2 Generative adversarial networks


def q2_3_value(out: Path) -> dict:
    """V, eq:game, under the best D, eq:optimum, between data N(s, 1) and samples N(0, 1): 2 JSD - log 4, up to 0.

    theory_value: V against the separation, in standard deviations.
    """
    values = [value_and_divergence(s) for s in SEPARATIONS]
    fig, (ax,) = pictures.figure(3.15, 2.2)
    ax.plot(SEPARATIONS, [value for value, _ in values], color=pictures.FIRST_COLOUR)
    ax.axhline(-math.log(4), color=pictures.MARK_COLOUR, linestyle=":", linewidth=1)
    ax.annotate("$-\\log 4$", (7.9, -math.log(4) + 0.04), ha="right", color=pictures.MARK_COLOUR)
    ax.set(xlabel="separation $\\Delta$, standard deviations", ylabel="$V(D^*, G)$, nats")
    ax.grid(alpha=0.3)
    pictures.save_figure(out / "theory_value", fig)
    return {
        "separations": SEPARATIONS,
        "values": [value for value, _ in values],
        "at": {str(s): value_and_divergence(s)[0] for s in (0, 1, 2, 4, 8)},
        "greatest_difference": max(abs(value - other) for value, other in values),
    }


def value_and_divergence(separation: float) -> tuple[float, float]:
    """V under the best D between N(separation, 1) and N(0, 1), and 2 JSD - log 4 by the definition of the JSD."""
    log_p, log_g = (normal_log_prob(LINE.unsqueeze(1), mean, 0.0) for mean in (separation, 0.0))
    p, g = log_p.exp(), log_g.exp()
    logit = log_p - log_g  # of the best D
    value = -integral(p * F.softplus(-logit, threshold=40)) - integral(g * F.softplus(logit, threshold=40))
    log_middle = torch.logaddexp(log_p, log_g) - math.log(2)
    jsd = 0.5 * integral(p * (log_p - log_middle)) + 0.5 * integral(g * (log_g - log_middle))
    return value, 2 * jsd - math.log(4)


def q2_4_saturation(out: Path) -> dict:
    """How strongly each of G's losses pulls under the best D, as the data N(s, 1) and the samples N(0, 1) part.

    theory_saturation: both gradients against the separation, in standard deviations.
    """
    gradients = [generator_gradients(s) for s in SEPARATIONS[1:]]
    fig, (ax,) = pictures.figure(3.15, 2.2)
    styles = (
        ("$\\log(1 - D)$, saturating", pictures.FIRST_COLOUR, "-"),
        ("$-\\log D$", pictures.SECOND_COLOUR, "--"),
    )
    for (label, colour, style), values in zip(styles, zip(*gradients)):
        ax.semilogy(SEPARATIONS[1:], values, style, color=colour, label=label)
    ax.set(xlabel="separation $\\Delta$, standard deviations", ylabel="norm of $G$'s gradient")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    pictures.save_figure(out / "theory_saturation", fig)
    names = ("saturating", "non_saturating")
    answer: dict = {"separations": SEPARATIONS[1:], **dict(zip(names, map(list, zip(*gradients))))}
    return answer | {"at": {str(s): dict(zip(names, generator_gradients(s))) for s in (1, 2, 4, 8)}}


def generator_gradients(separation: float) -> tuple[float, float]:
    """Of E log(1 - D(G(z))) and of -E log D(G(z)) for the shift theta of G(z) = z + theta at 0: absolute values.

    Data N(separation, 1), D the best one. Its logit is separation * x - separation^2 / 2, so the slope at every x is
    the separation, and eq:saturation has the rest.
    """
    logit = separation * LINE - separation**2 / 2
    g = normal_log_prob(LINE.unsqueeze(1), 0.0, 0.0).exp()
    return separation * integral(g * torch.sigmoid(logit)), separation * integral(g * torch.sigmoid(-logit))


def q2_7_paths() -> dict:
    """Mean norms along three paths between draws of N(0, I_100), at 1/4, 1/2 and 3/4: spherical, linear, by the CDF.

    Draws have norms near 10; a point that has not is an input that the generator never saw.
    """
    start, end = fixed_normal("paths", 4000, 100).double().chunk(2)
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64).view(-1, 1)
    ends = start.unsqueeze(1), end.unsqueeze(1)
    paths = {
        "spherical": training.slerp(start, end, 5)[:, 1:4],
        "linear": torch.lerp(*ends, shares),
        "cdf": torch.special.ndtri(torch.lerp(*map(torch.special.ndtr, ends), shares)),
    }
    norms = {name: path.norm(dim=2).mean(0).tolist() for name, path in paths.items()}
    return {"ends": float(start.norm(dim=1).mean()), **norms}


# 3 Normalizing flows


def q3_1_determinant(flow: nf.Flow, data: mnist.Data) -> dict:
    """The running sum of the log-determinants, eq:chain, against slogdet of the whole Jacobian, by autograd.

    The trained flow, whose convolutions take any size, on the 8 x 8 middle of a test image, in float64.
    """
    flow = copy.deepcopy(flow).double()
    images, noise = nf.evaluation_set(data.test_images[:1], "test")
    v = (images + noise)[:, 10:18, 10:18].double()
    with torch.no_grad():
        ladj = flow(v)[1]
    jacobian = torch.autograd.functional.jacobian(lambda image: flow(image)[0], v).reshape(64, 64)
    expected = torch.linalg.slogdet(jacobian)[1]
    return {"ladj": float(ladj), "slogdet": float(expected), "difference": float((ladj - expected).abs())}


def q3_3_cost(flow: nf.Flow, images: int, out: Path) -> dict:
    """Milliseconds for log |det| of one d x d Jacobian: forming it, its LU, and the sum over a known diagonal.

    It is formed by d backward passes through one fully connected layer. Medians of three. `times_lu`: how much dearer
    forming it is than its LU at the largest d. `epoch_hours`: both, at the size of its level, for every coupling of the
    flow and every training image. theory_cost: against d, with a guide in proportion to d^3.
    """
    answer: dict = {f"d{d}": determinant_costs(d) for d in SIZES}
    fig, (ax,) = pictures.figure(3.15, 2.4)
    styles = {
        "formed_ms": ("forming the Jacobian", pictures.MARK_COLOUR, ":"),
        "dense_ms": ("its LU", pictures.FIRST_COLOUR, "-"),
        "triangular_ms": ("sum over a known diagonal", pictures.SECOND_COLOUR, "--"),
    }
    for name, (label, colour, style) in styles.items():
        ax.loglog(SIZES, [row[name] for row in answer.values()], style, marker=".", color=colour, label=label)
    guide = [answer[f"d{SIZES[-1]}"]["dense_ms"] / 3 * (d / SIZES[-1]) ** 3 for d in SIZES]
    ax.loglog(SIZES, guide, color="0.75", linewidth=1, zorder=1)
    ax.annotate("$\\propto d^3$", (SIZES[-2], guide[-2]), xytext=(0, -9), textcoords="offset points", color="0.5")
    ax.set(xlabel="dimension $d$", ylabel="milliseconds")
    ax.grid(alpha=0.3)
    largest = answer[f"d{SIZES[-1]}"]
    ax.set_ylim(top=1000 * largest["formed_ms"])  # room for the legend
    ax.legend(frameon=False, loc="upper left")
    pictures.save_figure(out / "theory_cost", fig)
    seconds = 0.0  # an image
    for number, level in enumerate(flow.levels):
        at = answer[f"d{mnist.PIXELS >> number}"]  # each level has half as many numbers as the one before
        seconds += len(level) * (at["formed_ms"] + at["dense_ms"]) / 1000
    return answer | {
        "times_lu": largest["formed_ms"] / largest["dense_ms"],
        "couplings": sum(len(level) for level in flow.levels),
        "epoch_hours": seconds * images / 3600,
    }


def determinant_costs(d: int) -> dict[str, float]:
    """`q3_3_cost` for one d."""
    weight = torch.randn(d, d, generator=fixed_generator(f"Jacobian, {d}")) / math.sqrt(d)

    def jacobian() -> Tensor:
        return torch.autograd.functional.jacobian(lambda x: torch.tanh(weight @ x), weight[0])

    matrix = jacobian()
    return {
        "formed_ms": milliseconds(jacobian),
        "dense_ms": milliseconds(lambda: torch.linalg.slogdet(matrix)),
        "triangular_ms": milliseconds(lambda: matrix.diagonal().abs().log().sum()),
    }


def milliseconds(function: Callable[[], object]) -> float:
    """Wall time of a call, the median of three after one that warms up."""
    taken = []
    for _ in range(4):
        begin = time.perf_counter()
        function()
        taken.append(1000 * (time.perf_counter() - begin))
    return sorted(taken[1:])[1]


def q3_4_dequantisation(out: Path) -> dict:
    """On discrete data a density has no limit; with uniform noise its bits are real ones, with Gaussian noise not.

    The source has four values with probabilities 1/2, 1/4, 1/8, 1/8 and an entropy of 1.75 bits. `spikes`: bits of a
    density that puts normal spikes of a deviation on the values, without noise. `uniform`: bits, with uniform noise, of
    the density that is constant on every cell. `gaussian`: bits, with N(0, deviation^2) noise, of the very density of
    the noisy values; they fall below the entropy where the deviation is below `threshold`, 1/sqrt(2 pi e), or, as the
    spikes then overlap, somewhat above it. theory_dequantisation draws them.
    """
    probability = torch.tensor(SOURCE, dtype=torch.float64)
    entropy = float(-(probability * probability.log2()).sum())
    deviations = [0.01 * 1.15**n for n in range(34)]
    bits = [gaussian_noise_bits(probability, deviation) for deviation in deviations]
    crossing = float(np.interp(entropy, bits, deviations))
    fig, (ax,) = pictures.figure(3.15, 2.4)
    ax.semilogx(deviations, bits, color=pictures.FIRST_COLOUR, label="Gaussian noise")
    ax.axhline(entropy, color=pictures.SECOND_COLOUR, linestyle="--", label="uniform noise: entropy of the source")
    threshold = 1 / math.sqrt(2 * math.pi * math.e)
    ax.plot([threshold] * 2, [min(bits), entropy], ":", color=pictures.MARK_COLOUR, linewidth=1)  # not into the legend
    ax.plot([crossing], [entropy], "o", color=pictures.FIRST_COLOUR, markersize=4)
    ax.annotate(
        f"from {crossing:.2f} down\nbelow the entropy", (crossing, entropy), xytext=(6, -48), ha="left",
        textcoords="offset points", arrowprops={"arrowstyle": "-", "color": pictures.MARK_COLOUR, "linewidth": 0.7},
        color=pictures.MARK_COLOUR, fontsize=7,
    )  # fmt: skip
    ax.set(xlabel="standard deviation of the noise", ylabel="bits")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="upper left")
    ax.set_ylim(top=4.5)
    pictures.save_figure(out / "theory_dequantisation", fig)
    return {
        "crossing": crossing,
        "deviations": deviations,
        "bits": bits,
        "entropy": entropy,
        "uniform": uniform_noise_bits(probability),
        "spikes": {f"at_{w:g}": spike_bits(probability, w) for w in (0.1, 0.01, 0.001)},
        "gaussian": {f"at_{w:g}": gaussian_noise_bits(probability, w) for w in (0.05, 0.1, 0.2, 0.5)},
        "threshold": threshold,
    }


def spike_bits(probability: Tensor, deviation: float) -> float:
    """Bits of the values 0, 1, ... of these probabilities, under normal spikes of that deviation on all of them."""
    log_density = spikes_log_density(torch.arange(len(probability), dtype=torch.float64), probability, deviation)
    return float(-(probability * log_density).sum()) / math.log(2)


def spikes_log_density(x: Tensor, probability: Tensor, deviation: float) -> Tensor:
    """The log-density at x (n,) of the values 0, 1, ... of these probabilities plus N(0, deviation^2): (n,)."""
    log_parts = [
        p.log() + normal_log_prob(x.unsqueeze(1), float(n), 2 * math.log(deviation)) for n, p in enumerate(probability)
    ]
    return torch.logsumexp(torch.stack(log_parts), 0)


def uniform_noise_bits(probability: Tensor) -> float:
    """Bits of values of these probabilities plus uniform noise, under the density that is constant on each cell.

    By Monte Carlo over the noise, which may not leave a cell.
    """
    values = torch.arange(len(probability), dtype=torch.uint8).unsqueeze(1).expand(-1, 10_000)
    v = values + torch.rand(values.shape, generator=fixed_generator("cells"), dtype=torch.float64)
    density = probability[v.floor().long()]
    return float(-(probability.unsqueeze(1) * density.log2()).mean(1).sum())


def gaussian_noise_bits(probability: Tensor, deviation: float) -> float:
    """Differential entropy in bits of values 0, 1, ... of these probabilities plus N(0, deviation^2), by quadrature."""
    line = torch.linspace(-8, len(probability) + 7, 300_001, dtype=torch.float64)
    log_density = spikes_log_density(line, probability, deviation)
    return float(-(log_density.exp() * log_density).sum() * (line[1] - line[0])) / math.log(2)


def q3_4_learned() -> dict:
    """What noise q(u|x) that is fitted to the model wins over uniform noise, and that its gap is a KL, eq:variational.

    A model of SOURCE whose density is a normal bump of deviation BUMP in the middle of each cell. `discrete`: its bits
    by the exact probabilities of the cells. `uniform`, `learned`: bits of the bounds, the latter with u the logistic
    function of `scale` times the logit of uniform noise, the scale fitted. `above_*`: bits above `discrete`.
    `greatest_difference`: between a gap and the KL from the noise to the model's own p(u|x).
    """
    probability = torch.tensor(SOURCE, dtype=torch.float64)
    edges = torch.arange(len(SOURCE) + 1, dtype=torch.float64)
    middles = edges[:-1] + 0.5
    below = torch.special.ndtr((edges.unsqueeze(1) - middles) / BUMP) @ probability
    log_cell = below.diff().log()  # log P(x)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    log_p = spikes_log_density((edges[:-1, None] + u - 0.5).flatten(), probability, BUMP).view(len(SOURCE), -1)

    def bound_and_kl(scale: float) -> tuple[float, float]:
        log_q = stretched_log_density(u, scale)
        bound = ((log_p - log_q) * log_q.exp()).mean(1)
        kl = ((log_q - (log_p - log_cell.unsqueeze(1))) * log_q.exp()).mean(1)
        return float(-(probability * bound).sum()) / math.log(2), float((probability * kl).sum()) / math.log(2)

    scale = min((0.01 * n for n in range(5, 101)), key=lambda each: bound_and_kl(each)[0])
    discrete = float(-(probability * log_cell).sum()) / math.log(2)
    answer, differences = {"bump": BUMP, "scale": scale, "discrete": discrete}, []
    for name, each in (("uniform", 1.0), ("learned", scale)):
        bits, kl = bound_and_kl(each)
        answer |= {name: bits, f"above_{name}": bits - discrete}
        differences.append(abs(bits - discrete - kl))
    return answer | {"greatest_difference": max(differences)}


def stretched_log_density(u: Tensor, scale: float) -> Tensor:
    """log q(u) of u = sigmoid(scale logit(e)), e uniform on (0, 1), at u (n,): (n,). A scale of 1 gives uniform u."""
    logit = torch.logit(u) / scale  # of e
    return nf.log_sigmoid_slope(logit) - math.log(scale) - torch.log(u * (1 - u))


def q3_8_yardsticks(data: mnist.Data) -> dict:
    """What simple codes need for the test images, beside which the models' nats and bits have a meaning.

    `pixels_nll`: nats of a binarised image under independent Bernoulli pixels with the training images' means.
    `pixels_bpd`: bits of a pixel under independent histograms of the 256 grey values. `png_bpd`, `gzip_bpd`: bits of a
    pixel of all test images in one file, as one picture and as plain bytes.
    """
    from PIL import Image

    images, test = data.train_images.flatten(1), data.test_images.flatten(1)
    x, _ = vae.evaluation_set(data.test_images, "test", 2)
    mean = (images.double().sum(0) / 255 + 0.5) / (len(images) + 1)
    nll = -(x.double() @ torch.logit(mean) + torch.log1p(-mean).sum())
    counts = torch.stack([column.bincount(minlength=256) for column in images.int().T]).double() + 1
    log_share = torch.log2(counts / counts.sum(1, keepdim=True))  # (784, 256)
    bits = -log_share.gather(1, test.long().T)
    buffer = io.BytesIO()
    Image.fromarray(pictures.tile(data.test_images, columns=100, gap=0)).save(buffer, "PNG", optimize=True)
    files = {"png": len(buffer.getvalue()), "gzip": len(gzip.compress(test.numpy().tobytes(), mtime=0))}
    return {
        "pixels_nll": float(nll.mean()),
        "pixels_bpd": float(bits.mean()),
        **{f"{name}_bpd": 8 * size / test.numel() for name, size in files.items()},
    }


# Diagrams


def pyramid(side: int, levels: int) -> list[np.ndarray]:
    """What a pixel of a (side, side) image is to each level of the flow: 0 seen, 1 transformed, 2 done before.

    By `nf.split` itself. The half that the last coupling of a level transforms is done with it.
    """
    state = np.zeros(side * side, int)
    rest, levels_of = torch.arange(side * side).view(1, 1, side, side).float(), []
    for _ in range(levels):
        rest, transformed = nf.split(rest)
        state[transformed.flatten().long()] = 1
        levels_of.append(state.reshape(side, side).copy())
        state[state == 1] = 2
    return levels_of


def draw_pyramid(out: Path) -> None:
    """The checkerboards of the flow's four levels."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    fig, panels = pictures.figure(5.6, 1.75, columns=4)
    colours = (pictures.SECOND_COLOUR, pictures.FIRST_COLOUR, "0.88")
    for level, (ax, state) in enumerate(zip(panels, pyramid(8, 4)), 1):
        ax.pcolormesh(state[::-1], cmap=ListedColormap(colours), vmin=0, vmax=2, edgecolors="white", linewidth=1)
        ax.set(title=f"level {level}", aspect="equal")
        ax.set_axis_off()
    names = ("seen", "transformed", "done: part of $z$")
    fig.legend(
        handles=[Patch(color=colour, label=name) for colour, name in zip(colours, names)],
        loc="outside lower center", ncols=3, frameon=False,
    )  # fmt: skip
    pictures.save_figure(out / "theory_pyramid", fig)


def node(ax, place: tuple[float, float], text: str, shape: str = "round", colour: str = "black") -> None:
    """A labelled box, or a circle for what is random."""
    style = {"round": "round,pad=0.35", "circle": "circle,pad=0.3"}[shape]
    box = {"boxstyle": style, "facecolor": "white" if shape == "round" else "0.9", "edgecolor": colour}
    ax.text(*place, text, ha="center", va="center", bbox=box, zorder=3)


def arrow(ax, start: tuple, end: tuple, colour: str = "black", style: str = "-", bend: float = 0.0) -> None:
    """An arrow between two places, ending short of the boxes around them."""
    ax.annotate(
        "", end, start,
        arrowprops={
            "arrowstyle": "-|>", "color": colour, "linestyle": style, "shrinkA": 14, "shrinkB": 14,
            "connectionstyle": f"arc3,rad={bend}", "linewidth": 1.1,
        },
    )  # fmt: skip


def blank(width: float, height: float, columns: int, limits: tuple[float, float]):
    """A figure whose panels have no axes and end at the limits."""
    fig, panels = pictures.figure(width, height, columns=columns)
    for ax in panels:
        ax.set(xlim=(0, limits[0]), ylim=(0.3, limits[1]))
        ax.set_axis_off()
    return fig, panels


def draw_reparameterised(out: Path) -> None:
    """Where a gradient flows to the encoder and where it is lost: z drawn, and z computed from noise."""
    fig, panels = blank(6.4, 1.7, 2, (10, 4))
    names = ("$x$", "$\\mu, \\Sigma$", "$z$", "$\\mathcal{L}$")
    places = [(1, 1.3), (3.7, 1.3), (6.5, 1.3), (9.2, 1.3)]
    for ax, title, random in zip(panels, ("$z$ is drawn", "$z$ is computed from noise"), (2, None)):
        ax.set_title(title)
        for index, (name, place) in enumerate(zip(names, places)):
            node(ax, place, name, "circle" if index == random else "round")
        for start, end, label in zip(places, places[1:], ("encoder $\\phi$", "", "decoder $\\theta$")):
            arrow(ax, start, end)
            ax.text((start[0] + end[0]) / 2, 1.75, label, ha="center", fontsize=7)
        back = [(x, 0.95) for x, _ in places]
        arrow(ax, back[3], back[2], pictures.SECOND_COLOUR, "--", bend=-0.35)
        if random is None:
            node(ax, (6.5, 3.3), "$\\varepsilon$", "circle")
            arrow(ax, (6.5, 3.4), (6.5, 1.2))
            ax.text(7.0, 2.35, "$z = \\mu + \\Sigma^{1/2} \\varepsilon$", fontsize=7, va="center")
            arrow(ax, back[2], back[1], pictures.SECOND_COLOUR, "--", bend=-0.35)
            arrow(ax, back[1], back[0], pictures.SECOND_COLOUR, "--", bend=-0.35)
        else:
            ax.text(5.1, 0.5, "$\\times$  lost", color=pictures.SECOND_COLOUR, ha="center", fontsize=9)
    pictures.save_figure(out / "theory_reparameterised", fig)


def draw_paths(out: Path) -> None:
    """The two gradients of the GAN: of D's loss, which ends before G, and of G's, which passes through D."""
    fig, panels = blank(6.4, 1.7, 2, (10, 4))
    z, g, fake, real, d, loss = (0.7, 1), (2.7, 1), (4.9, 1), (4.9, 3.2), (7.1, 2.1), (9.3, 2.1)
    for ax, name, of_g in zip(panels, ("$L_D$", "$L_G$"), (False, True)):
        ax.set_title("a step of $G$" if of_g else "a step of $D$")
        moved = pictures.FIRST_COLOUR
        node(ax, z, "$z$", "circle")
        node(ax, g, "$G$", colour=moved if of_g else "black")
        node(ax, fake, "$G(z)$")
        node(ax, d, "$D$", colour="black" if of_g else moved)
        node(ax, loss, name)
        forward = [(z, g), (g, fake), (fake, d), (d, loss)]
        if not of_g:
            node(ax, real, "$x$", "circle")
            forward.append((real, d))
        for start, end in forward:
            arrow(ax, start, end)
        backward = [(loss, d)] + ([(d, fake), (fake, g)] if of_g else [])
        for start, end in backward:
            arrow(ax, start, end, pictures.SECOND_COLOUR, "--", bend=-0.4)
        if not of_g:
            ax.text(6.5, 0.9, "$\\times$  stops", color=pictures.SECOND_COLOUR, fontsize=9)
    pictures.save_figure(out / "theory_paths", fig)


# All of them


def flags() -> cli.Parser:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=cli.path, default=ROOT, metavar="DIR", help="writes DIR/figures/theory*")
    cli.add_data_flags(parser, device=False, dataset_too=False)
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Compute every answer and write figures/theory.json."""
    args = flags().parse_args(argv)
    out = experiment.folder(args.out / "figures")
    z2, z20, best = (experiment.committed(f"vae_{name}", vae.build) for name in ("z2", "z20", "best"))
    flow = experiment.committed("nf", nf.build)
    data = mnist.load("mnist", args.data_dir)
    judged_by = judge.load(torch.device("cpu"))
    questions: dict[str, Callable[[], dict]] = {
        "q1_1": lambda: q1_1_autoencoder(data, judged_by, out),
        "q1_3": lambda: q1_3_ring(out),
        "q1_4": lambda: q1_4_gap(z2, data, out),
        "q1_4_linear": q1_4_linear_gaussian,
        "q1_5": q1_5_kl,
        "q1_6": lambda: q1_6_lower_bound(z2, data),
        "q1_8": lambda: q1_8_steps(z2, data),
        "q1_9": lambda: q1_9_regulariser(z2, data),
        "q1_10": lambda: q1_10_loss(z2, data),
        "q1_11": q1_11_gradients,
        "q1_13": lambda: q1_13_gap({"vae_z20": z20, "vae_best": best}, z2, data),
        "q2_3": lambda: q2_3_value(out),
        "q2_4": lambda: q2_4_saturation(out),
        "q2_7": q2_7_paths,
        "q3_1": lambda: q3_1_determinant(flow, data),
        "q3_3": lambda: q3_3_cost(flow, len(data.train_images), out),
        "q3_4": lambda: q3_4_dequantisation(out),
        "q3_4_learned": q3_4_learned,
        "q3_8_yardsticks": lambda: q3_8_yardsticks(data),
    }
    answers, seconds = {}, {}
    pictures.STYLE.update(REPORT_TYPE)
    draw_pyramid(out)
    draw_reparameterised(out)
    draw_paths(out)
    for name, question in questions.items():
        begin = time.process_time()  # of all threads: other programs do not count
        answers[name] = question()
        seconds[name] = time.process_time() - begin
        cli.say(f"{name}  {seconds[name]:.1f} s")
    weights = {
        f"{name}_sha256": hashlib.sha256((ROOT / "weights" / f"{name}.pt").read_bytes()).hexdigest()
        for name in ("vae_z2", "vae_z20", "vae_best", "nf", "judge")
    }
    content = {"environment": experiment.environment(torch.device("cpu")), **weights, **answers, "seconds": seconds}
    experiment.write(out / "theory.json", experiment.json_bytes(content))


if __name__ == "__main__":
    sys.exit(main())
