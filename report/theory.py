"""Every pen-and-paper answer of the report, checked by computation; one function a question, named after it.

    python report/theory.py     # some minutes; writes figures/theory.json and figures/theory_*

A function returns what the report quotes, the tests check or a figure shows. Trained models come from the committed
weights; everything is seeded. Likelihoods and divergences are in nats unless said.
"""

import copy
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable
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
from cli import UserError  # noqa: E402
from training import fixed_generator, fixed_normal  # noqa: E402

AUTOENCODER_EPOCHS = 4
RING_RADIUS, RING_DEVIATION, RING_STEPS = 2.0, 0.1, 3000
POSTERIOR_IMAGES, POSTERIOR_DRAWS = 250, 5000
GRID_POINTS = 640  # along each axis of a grid over z
WINDOW, WINDOW_POINTS = 0.8, 241  # of the posterior that is drawn: from the mean of q, to each side
NOISE, DRAWS, REPEATS = 0.3, 1000, 400  # of the linear-Gaussian model, and of its estimates
ASCENT_STEPS = 50  # on the encoder, then on the decoder
CODES = 3500  # of the aggregate posterior
AGGREGATE_POINTS, LIMIT = 601, 6.0  # of the grid over z: along each axis, and at its edge
SIZES = (49, 98, 196, 392, 784, 1568)  # of Jacobians
SOURCE = (0.5, 0.25, 0.125, 0.125)  # probabilities of the values 0, 1, 2, 3
SEPARATIONS = [0.25 * n for n in range(33)]  # of two normals, in standard deviations
LINE = torch.linspace(-30, 40, 70_001, dtype=torch.float64)  # for integrals over one dimension
SPACING = float(LINE[1] - LINE[0])


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
    """An autoencoder and a VAE of one architecture and equal training: what they reconstruct, what noise decodes to.

    The autoencoder is the VAE's own networks without noise on the code and without the KL. Its codes spread as they
    like, and N(0, I) covers a small part of them. There are three hidden layers: with vae.py's four the autoencoder
    learns too slowly to reconstruct better than the VAE after so few epochs. theory_autoencoder.png: ten draws decoded
    by the autoencoder, and below them by the VAE. Reconstructions are scored by -log p(x|z) at the mean code; shares of
    classes are in percent.
    """
    images = data.train_images.flatten(1)
    x, _ = vae.evaluation_set(data.test_images, "test", 2)
    answer, rows = {"epochs": AUTOENCODER_EPOCHS}, []
    for name, variational in (("autoencoder", False), ("vae", True)):
        torch.manual_seed(0)
        model = vae.VAE(z_dim=2, hidden=400, depth=3)
        optimizer = training.adam(model.parameters(), 2e-3)
        steps = AUTOENCODER_EPOCHS * (len(images) // 320)
        epochs = (mnist.batches(len(images), 320) for _ in range(AUTOENCODER_EPOCHS))
        for step, index in enumerate(itertools.chain.from_iterable(epochs)):
            training.set_lr(optimizer, 2e-3 * training.warmup_cosine(step, steps, 0.05))
            pixels, eps = vae.draw_batch(images, index, 2)
            loss = -vae.elbo(model, pixels, eps) if variational else reconstruction(model, pixels)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        with torch.inference_mode():
            answer[f"{name}_reconstruction"] = float(reconstruction(model, x).mean())
            answer[f"{name}_code_deviation"] = float(model.encode(x)[0].std(0).mean())
        samples = vae.sample(model, judge.JUDGED)
        verdict = judge.verdict(judged_by, samples, data.test_images)
        shares = sorted(100 * count / judge.JUDGED for count in verdict["class_counts"])  # percent
        answer |= {f"{name}_fid": verdict["fid"], f"{name}_rarest": shares[0], f"{name}_commonest": shares[-1]}
        rows.append(samples[:10])
    pictures.save_grid(out / "theory_autoencoder", torch.cat(rows), columns=10)
    return answer


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
    also the mean of the estimated p(x) over p(x), which is 1 whatever the number of draws, with its standard error; its
    variance over draws and x, and what eq:variance says of that.
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


def q1_4_importance_sampling(model: vae.VAE, data: mnist.Data, out: Path) -> dict:
    """Where importance sampling from the encoder falls short of log p(x), and why.

    On test images it is compared with quadrature, which needs no encoder. The median image differs little. Some differ
    by many nats: there most of the posterior lies where q(z|x), one narrow Gaussian, never draws, so that the estimate
    never sees the rest of the integral. As many draws, but half of them from the prior, close the gap, which shows that
    it is q's. theory_posterior.png draws posteriors and q at the median, the 90th and the 99th percentile.
    """
    x, _ = (part[:POSTERIOR_IMAGES] for part in vae.evaluation_set(data.test_images, "test", 2))
    exact = vae.quadrature_log_px(model, x)
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
        own = vae.reparameterize(mu[n], logvar[n], eps)
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
    from matplotlib.patches import Ellipse

    fig, panels = pictures.figure(7.2, 2.6, columns=len(x))
    mu, logvar = model.encode(x)
    offset = torch.linspace(-WINDOW, WINDOW, WINDOW_POINTS)
    for n, ax in enumerate(panels):
        z2, z1 = torch.meshgrid(mu[n, 1] + offset, mu[n, 0] + offset, indexing="ij")
        z = torch.stack((z1, z2), dim=-1)
        log_joint = vae.bernoulli_log_prob(x[n], model.decode(z)) + normal_log_prob(z, 0.0, 0.0)
        extent = [float(each + side) for each in mu[n] for side in (-WINDOW, WINDOW)]
        shown = ax.imshow(
            (log_joint - log_px[n]).numpy(), cmap="Greys", origin="lower", extent=extent, vmin=-15, vmax=5
        )
        size = (4 * torch.exp(0.5 * logvar[n])).tolist()  # two standard deviations to each side
        ax.add_patch(Ellipse(mu[n].tolist(), *size, fill=False, color=pictures.SECOND_COLOUR, linewidth=1.5))
        inset = ax.inset_axes((0.02, 0.7, 0.28, 0.28))
        inset.imshow(x[n].view(mnist.SIDE, mnist.SIDE).numpy(), cmap="gray", vmin=0, vmax=1)
        inset.set_axis_off()
        ax.set_title(f"{gap[n]:.2f} nats short", fontsize=10)
        ax.set(xlabel="$z_1$", ylabel="$z_2$" if n == 0 else "")
        ax.tick_params(labelsize=8)
    bar = fig.colorbar(shown, ax=panels, ticks=(-15, -10, -5, 0, 5), shrink=0.9)
    bar.ax.set_title("log density", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    pictures.save_figure(out / "theory_posterior", fig, pdf=False)


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
    eps = torch.cartesian_prod(places, places)
    weight = torch.cartesian_prod(weights, weights).prod(1) / (2 * math.pi)
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
        log_px = vae.bernoulli_log_prob(x.unsqueeze(1), model.decode(z))  # (n, 1000)
        log_joint.append(torch.logsumexp(log_px + normal_log_prob(z, 0.0, 0.0), 1))
    return torch.logsumexp(torch.stack(log_joint), 0) + 2 * math.log(spacing)


def two_point_bound(first: float, second: float, q: float) -> tuple[float, float]:
    """ELBO and log p(x) for two values of z with probability 1/2 each and p(x|z) of (first, second); q of the first."""
    bound = q * math.log(0.5 * first / q) + (1 - q) * math.log(0.5 * second / (1 - q))
    return bound, math.log(0.5 * first + 0.5 * second)


def q1_8_steps(model: vae.VAE, data: mnist.Data) -> dict:
    """Steps on the encoder alone move the bound and not log p(x); steps on the decoder move both.

    From the trained model with its encoder's last layer disturbed, on 20 images: ELBO by nodes and log p(x) by
    quadrature, at the start, after ASCENT_STEPS steps on phi, and after as many more on theta.
    """
    x = vae.evaluation_set(data.test_images, "test", 2)[0][:20].double()
    model = copy.deepcopy(model).double()
    generator = fixed_generator("disturbed encoder")
    with torch.no_grad():
        for parameter in model.encoder[-1].parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def measured() -> tuple[float, float]:
        with torch.inference_mode():
            bound = elbo_by_nodes(model, x, *model.encode(x))
        exact = vae.quadrature_log_px(copy.deepcopy(model).float(), x.float())  # half the time
        return float(bound.mean()), float(-exact.mean())

    answer = {"images": len(x), "steps": ASCENT_STEPS} | dict(zip(("elbo_start", "nll_start"), measured()))
    for name, network in (("phi", model.encoder), ("theta", model.decoder)):
        model.requires_grad_(False)
        network.requires_grad_(True)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
        for _ in range(ASCENT_STEPS):
            optimizer.zero_grad()
            (-elbo_by_nodes(model, x, *model.encode(x), nodes=12)).mean().backward()
            optimizer.step()
        answer |= dict(zip((f"elbo_after_{name}", f"nll_after_{name}"), measured()))
    return answer


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
    """The script's ELBO, eq:loss, against one that is spelt out number by number; and the slip that is common.

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
    return answer


# 2 Generative adversarial networks


def q2_3_value(out: Path) -> dict:
    """V, eq:game, under the best D, eq:optimum, between data N(s, 1) and samples N(0, 1): 2 JSD - log 4, up to 0.

    theory_value: V against the separation s, in standard deviations.
    """
    values = [value_and_divergence(s) for s in SEPARATIONS]
    fig, (ax,) = pictures.figure(4.2, 2.9)
    ax.plot(SEPARATIONS, [value for value, _ in values], color=pictures.FIRST_COLOUR)
    ax.axhline(-math.log(4), color=pictures.MARK_COLOUR, linestyle=":", linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8, "color": pictures.MARK_COLOUR}
    ax.annotate("-log 4", (1.01, -math.log(4)), **place)
    ax.set(xlabel="separation s, standard deviations", ylabel="V, nats", title="The game's value under the best D")
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

    theory_saturation: both gradients against the separation s, in standard deviations.
    """
    gradients = [generator_gradients(s) for s in SEPARATIONS[1:]]
    fig, (ax,) = pictures.figure(4.2, 2.9)
    styles = (("log(1 - D), saturating", pictures.FIRST_COLOUR, "-"), ("-log D", pictures.SECOND_COLOUR, "--"))
    for (label, colour, style), values in zip(styles, zip(*gradients)):
        ax.semilogy(SEPARATIONS[1:], values, style, color=colour, label=label)
    ax.set(xlabel="separation s, standard deviations", ylabel="norm of the gradient", title="G's gradient")
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
    v = nf.evaluation_set(data.test_images[:1], "test")[:, 10:18, 10:18].double()
    with torch.no_grad():
        ladj = flow(v)[1]
    jacobian = torch.autograd.functional.jacobian(lambda image: flow(image)[0], v).reshape(64, 64)
    expected = torch.linalg.slogdet(jacobian)[1]
    return {"ladj": float(ladj), "slogdet": float(expected), "difference": float((ladj - expected).abs())}


def q3_3_cost(out: Path) -> dict:
    """Milliseconds for log |det| of one d x d Jacobian: forming it, its LU, and what a triangular one takes.

    It is formed by d backward passes through one fully connected layer. Medians of three. theory_cost: against d.
    """
    answer = {f"d{d}": determinant_costs(d) for d in SIZES}
    fig, (ax,) = pictures.figure(4.2, 2.9)
    styles = {
        "formed_ms": ("d backward passes to form it", pictures.MARK_COLOUR, ":"),
        "dense_ms": ("determinant by LU", pictures.FIRST_COLOUR, "-"),
        "triangular_ms": ("determinant, if triangular", pictures.SECOND_COLOUR, "--"),
    }
    for name, (label, colour, style) in styles.items():
        ax.loglog(SIZES, [row[name] for row in answer.values()], style, marker=".", color=colour, label=label)
    ax.set(xlabel="dimension d", ylabel="milliseconds", title="One Jacobian, for one image and one layer")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    pictures.save_figure(out / "theory_cost", fig)
    return answer


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
    fig, (ax,) = pictures.figure(4.2, 2.9)
    ax.semilogx(deviations, bits, color=pictures.FIRST_COLOUR, label="Gaussian noise")
    ax.axhline(entropy, color=pictures.SECOND_COLOUR, linestyle="--", label="uniform noise: the entropy")
    ax.axvline(1 / math.sqrt(2 * math.pi * math.e), color=pictures.MARK_COLOUR, linestyle=":", linewidth=1)
    ax.set(xlabel="deviation of the noise", ylabel="bits", title="Bits of a source with four values")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="upper left", fontsize=9)
    ax.set_ylim(top=4.5)
    pictures.save_figure(out / "theory_dequantisation", fig)
    return {
        "deviations": deviations,
        "bits": bits,
        "entropy": entropy,
        "uniform": uniform_noise_bits(probability),
        "spikes": {f"at_{w:g}": spike_bits(probability, w) for w in (0.1, 0.01, 0.001)},
        "gaussian": {f"at_{w:g}": gaussian_noise_bits(probability, w) for w in (0.05, 0.1, 0.2, 0.5)},
        "threshold": 1 / math.sqrt(2 * math.pi * math.e),
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

    By Monte Carlo over the noise through `nf.dequantised`, which may not leave a cell.
    """
    values = torch.arange(len(probability), dtype=torch.uint8).unsqueeze(1).expand(-1, 10_000)
    v = nf.dequantised(values, torch.rand(values.shape, generator=fixed_generator("cells"), dtype=torch.float64))
    density = probability[v.floor().long()]
    return float(-(probability.unsqueeze(1) * density.log2()).mean(1).sum())


def gaussian_noise_bits(probability: Tensor, deviation: float) -> float:
    """Differential entropy in bits of values 0, 1, ... of these probabilities plus N(0, deviation^2), by quadrature."""
    line = torch.linspace(-8, len(probability) + 7, 300_001, dtype=torch.float64)
    log_density = spikes_log_density(line, probability, deviation)
    return float(-(log_density.exp() * log_density).sum() * (line[1] - line[0])) / math.log(2)


# All of them


TRAINED_BY = {
    "vae_z2": "python code/vae.py --z-dim 2",
    "nf": "python code/nf.py",
    "judge": "python code/judge.py --train",
}


def trained(name: str, build: Callable[[dict], nn.Module]) -> nn.Module:
    """The model of the run `name` with its committed weights. Raises UserError without them."""
    path = ROOT / "weights" / f"{name}.pt"
    if not path.exists():
        raise UserError(f"no weights at {path}: train them with: {TRAINED_BY[name]}")
    archive = experiment.load_archive(path, "the weights")
    model = build(archive["config"])
    experiment.load_state(model, archive, path, "the weights")
    return model.eval()


def flags() -> cli.Parser:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, metavar="DIR", help="writes DIR/figures/theory*")
    cli.add_data_flags(parser, device=False, dataset_too=False)
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Compute every answer and write figures/theory.json."""
    args = flags().parse_args(argv)
    out = experiment.folder(args.out / "figures")
    z2, flow = trained("vae_z2", vae.build), trained("nf", nf.build)
    data = mnist.load("mnist", args.data_dir)
    judged_by = judge.load(torch.device("cpu"))
    questions: dict[str, Callable[[], dict]] = {
        "q1_1": lambda: q1_1_autoencoder(data, judged_by, out),
        "q1_3": lambda: q1_3_ring(out),
        "q1_4": lambda: q1_4_importance_sampling(z2, data, out),
        "q1_4_linear": q1_4_linear_gaussian,
        "q1_5": q1_5_kl,
        "q1_6": lambda: q1_6_lower_bound(z2, data),
        "q1_8": lambda: q1_8_steps(z2, data),
        "q1_9": lambda: q1_9_regulariser(z2, data),
        "q1_10": lambda: q1_10_loss(z2, data),
        "q1_11": q1_11_gradients,
        "q2_3": lambda: q2_3_value(out),
        "q2_4": lambda: q2_4_saturation(out),
        "q2_7": q2_7_paths,
        "q3_1": lambda: q3_1_determinant(flow, data),
        "q3_3": lambda: q3_3_cost(out),
        "q3_4": lambda: q3_4_dequantisation(out),
    }
    answers, seconds = {}, {}
    for name, question in questions.items():
        begin = time.perf_counter()
        answers[name] = question()
        seconds[name] = time.perf_counter() - begin
        print(f"{name}  {seconds[name]:.1f} s", flush=True)
    weights = {
        f"{name}_sha256": hashlib.sha256((ROOT / "weights" / f"{name}.pt").read_bytes()).hexdigest()
        for name in TRAINED_BY
    }
    content = {"environment": experiment.environment(torch.device("cpu")), **weights, **answers, "seconds": seconds}
    experiment.write(out / "theory.json", experiment.json_bytes(content))


if __name__ == "__main__":
    sys.exit(main())
