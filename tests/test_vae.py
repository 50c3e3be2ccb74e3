"""The VAE's formulas against independent ones."""

import math

import mpmath
import pytest
import torch
from torch import Tensor

import mnist
import vae
from training import fixed_normal


def standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(values.numel()))


@pytest.fixture
def model() -> vae.VAE:
    """A small z = 2 model in float64 whose posterior is smooth and not Gaussian."""
    torch.manual_seed(0)
    small = vae.VAE(z_dim=2, hidden=8, depth=3).double()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.5).add_(0.02 * torch.randn_like(parameter))
        small.decoder[-1].weight.mul_(0.5)
    return small


def flow_prior(z_dim: int, couplings: int = 3) -> vae.Prior:
    """A prior in float64 whose last layers are not zero."""
    torch.manual_seed(1)
    prior = vae.Prior(z_dim, couplings, hidden=6).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return prior


def log_density(prior: vae.Prior, z: Tensor) -> Tensor:
    """log p(z), with the constant that log_weight leaves out."""
    u, ladj = prior(z)
    return ladj + torch.distributions.Normal(0, 1).log_prob(u).sum(-1)


@pytest.fixture
def x() -> Tensor:
    """Three binary images, in float64."""
    return (torch.rand(3, mnist.PIXELS, generator=torch.Generator().manual_seed(1)) < 0.3).double()


def normal_grid(points: int, limit: float = 9.0) -> tuple[Tensor, Tensor]:
    """Nodes (points^2, 2) and weights of the trapezoid rule for expectations under N(0, I) in the plane."""
    axis = torch.linspace(-limit, limit, points, dtype=torch.float64)
    eps = torch.cartesian_prod(axis, axis)
    return eps, (2 * limit / (points - 1)) ** 2 * torch.exp(-0.5 * eps.square().sum(-1)) / (2 * math.pi)


@pytest.mark.parametrize("logvar", [-10, -1, -0.1, -1e-2, 1e-2, 0.1, 1, 10])
@pytest.mark.parametrize("mu", [0, 1e-3, 2])
def test_kl_against_high_precision(mu, logvar):
    ours = vae.kl_to_standard_normal(*(torch.tensor([value], dtype=torch.float64) for value in (mu, logvar)))
    with mpmath.workdps(60):
        lv = mpmath.mpf(torch.tensor(logvar, dtype=torch.float64).item())
        exact = (mpmath.mpf(mu) ** 2 + mpmath.exp(lv) - 1 - lv) / 2
        assert abs(ours.item() / exact - 1) < 1e-12


def test_kl_is_never_negative_in_float32():
    generator = torch.Generator().manual_seed(0)
    magnitude = 10 ** (torch.rand(1_000_000, generator=generator) * 9 - 8)  # 1e-8 to 10
    logvar = torch.cat((magnitude, -magnitude)).unsqueeze(1)
    assert logvar.dtype == torch.float32
    assert (vae.kl_to_standard_normal(torch.zeros_like(logvar), logvar) >= 0).all()


def test_kl_sums_over_dimensions():
    mu, logvar = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    separately = sum(vae.kl_to_standard_normal(mu[:, [d]], logvar[:, [d]]) for d in range(7))
    torch.testing.assert_close(vae.kl_to_standard_normal(mu, logvar), separately, rtol=1e-14, atol=0)


def test_bernoulli_log_prob():
    x, logits = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.3, -1.2, 2.0])
    mean = torch.sigmoid(logits)
    torch.testing.assert_close(vae.bernoulli_log_prob(x, logits), torch.where(x == 1, mean, 1 - mean).log().sum())
    x = (torch.rand(3, mnist.PIXELS) < 0.5).double()
    zero = vae.bernoulli_log_prob(x, torch.zeros_like(x))
    torch.testing.assert_close(zero, torch.full((3,), -784 * math.log(2), dtype=torch.float64), rtol=1e-14, atol=0)
    assert zero[0].item() == pytest.approx(-543.4274, abs=1e-4)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_bernoulli_log_prob_is_finite_and_right_at_extreme_logits(logit):
    x = torch.tensor([[1.0], [0.0]])
    expected = torch.tensor([min(logit, 0.0), -max(logit, 0.0)])
    torch.testing.assert_close(vae.bernoulli_log_prob(x, torch.full_like(x, logit)), expected)


def test_gap_of_the_elbo_is_the_kl_to_the_posterior(model, x):
    log_px = vae.quadrature_log_px(model, x, points=101)
    torch.testing.assert_close(log_px, vae.quadrature_log_px(model, x, points=201), rtol=0, atol=1e-9)
    eps, weight = normal_grid(81)
    with torch.inference_mode():
        mu, logvar = model.encode(x)
        for n in range(len(x)):
            row = x[n : n + 1].expand(len(eps), -1)
            bound = (weight * vae.elbo(model, row, eps)).sum()
            z = mu[n] + torch.exp(0.5 * logvar[n]) * eps
            log_q = -0.5 * eps.square().sum(-1) - 0.5 * logvar[n].sum() - math.log(2 * math.pi)
            log_joint = torch.distributions.Bernoulli(logits=model.decode(z)).log_prob(row).sum(-1)
            log_joint += torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
            kl_to_posterior = (weight * (log_q - (log_joint - log_px[n]))).sum()
            assert kl_to_posterior > 1e-3
            assert (log_px[n] - bound).item() == pytest.approx(kl_to_posterior.item(), abs=1e-8)


def test_quadrature_of_an_independent_decoder_is_the_pixels_own_probability(model, x):
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
        exact = vae.bernoulli_log_prob(x, model.decoder[-1].bias)
    torch.testing.assert_close(
        vae.quadrature_log_px(model, x, points=101), exact, rtol=0, atol=1e-7
    )  # N(0, I) beyond 6: 4e-9


def test_the_bound_with_one_weight_is_the_elbo(model, x):
    eps, weight = normal_grid(41)
    with torch.inference_mode():
        mu, logvar = model.encode(x)
        log_w = vae.log_weight(model, x, mu, logvar, eps[:, None, :].expand(-1, len(x), -1))
        one = torch.stack([vae.importance_weighted_bound(each[None]) for each in log_w])
        closed = torch.stack([vae.elbo(model, x, each.expand(len(x), -1)) for each in eps])
    torch.testing.assert_close(weight @ one, weight @ closed, rtol=0, atol=1e-8)


def test_leaving_one_weight_out_lowers_the_bound():
    log_w = 3 * torch.randn(6, 1000, dtype=torch.float64)
    subsets = [vae.importance_weighted_bound(torch.cat((log_w[:k], log_w[k + 1 :]))) for k in range(6)]
    assert (torch.stack(subsets).mean(0) <= vae.importance_weighted_bound(log_w)).all()


def test_bound_rises_to_log_px(model, x):
    log_px = vae.quadrature_log_px(model, x, points=101)
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        mu, logvar = model.encode(x)
        eps = torch.randn(2000, len(x), 2, generator=generator, dtype=torch.float64)
        log_w = vae.log_weight(model, x, mu, logvar, eps)
    gaps = []
    for k in (1, 10, 100):
        bounds = torch.stack([vae.importance_weighted_bound(part) for part in log_w.split(k)]).mean(1)
        gaps.append(float(log_px.mean() - bounds.mean()))
        assert gaps[-1] > -4 * standard_error(bounds)
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 4 * standard_error(bounds) + 0.01 * gaps[0]


def test_log_px_in_batches_agrees_with_the_bound_over_all(model, x):
    ours = vae.importance_sampled_log_px(model, x, draws=300, batch=2)
    exact = vae.quadrature_log_px(model, x, points=101)
    assert (ours - exact).abs().max() < 0.3
    other = vae.importance_sampled_log_px(model, x, draws=300, batch=3)
    torch.testing.assert_close(ours, other, rtol=1e-10, atol=0)
    torch.testing.assert_close(exact, vae.quadrature_log_px(model, x, points=101, block=777), rtol=1e-10, atol=0)


def test_mean_elbo_does_not_depend_on_the_batch_size(model):
    images = torch.randint(256, (103, 28, 28), dtype=torch.uint8)
    x, eps = (part.double() for part in vae.evaluation_set(images, "validation", 2))
    whole = vae.per_image_elbo(model, x, eps, batch=103).mean().item()
    for batch in (1, 10, 64, 1000):
        assert vae.per_image_elbo(model, x, eps, batch).mean().item() == pytest.approx(whole, rel=1e-10)


def test_reparameterized_samples_have_the_right_moments():
    mu, logvar = torch.tensor([-1.0, 0.5], dtype=torch.float64), torch.tensor([-2.0, 1.0], dtype=torch.float64)
    eps = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    z = vae.reparameterize(mu, logvar, eps)
    for d in range(2):
        assert abs(z[:, d].mean() - mu[d]) < 4 * standard_error(z[:, d])
        squares = (z[:, d] - mu[d]).square()
        assert abs(squares.mean() - logvar[d].exp()) < 4 * standard_error(squares)


def test_no_variance_explodes_or_vanishes(model):
    """A stray output of the encoder costs nats, not hundreds of thousands; between -12 and 0 it is the log-variance."""
    outputs = torch.tensor([-100.0, -12.1, -11.9, -1e-3, 0.0, 1e-3, 13.0, 1000.0], dtype=torch.float64)
    model.encoder = torch.nn.Identity()
    mu, logvar = model.encode(torch.stack((outputs, outputs), dim=-1))
    assert torch.equal(mu, outputs[:, None])
    variances = torch.cat((outputs[:5].clamp(min=-12).exp(), 1 + outputs[5:]))
    torch.testing.assert_close(logvar[:, 0].exp(), variances, rtol=1e-12, atol=0)
    assert vae.kl_to_standard_normal(torch.zeros(1, 1), logvar[6:7]) < 6  # at 13


def test_the_gradient_is_clipped(model):
    optimizer = torch.optim.SGD(model.float().parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    images = torch.randint(256, (4, mnist.PIXELS), dtype=torch.uint8)
    _, norm = vae.training_step(model, optimizer, images, torch.arange(4), stopped=True, clip=1e-3)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters())]).norm()
    assert norm > 1e-2 and moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_gradient_of_the_elbo_matches_finite_differences(model, x):
    eps = torch.randn(len(x), 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for weight in (model.encoder[0].weight, model.encoder[-1].bias, model.decoder[0].weight, model.decoder[-1].bias):
        (gradient,) = torch.autograd.grad(vae.elbo(model, x, eps).mean(), weight)
        at = torch.unravel_index(gradient.abs().argmax(), gradient.shape)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[at] += step
                values.append(vae.elbo(model, x, eps).mean())
                weight[at] -= step
        assert ((values[0] - values[1]) / 2e-5).item() == pytest.approx(gradient[at].item(), abs=1e-6, rel=1e-6)
        assert gradient[at].abs() > 1e-3


def test_draws_have_the_decoders_means(model):
    z = torch.zeros(4000, 2, dtype=torch.float64)
    pixels = vae.decoder_draws(model, z).double() / 255
    assert set(pixels.unique().tolist()) == {0.0, 1.0}
    mean = torch.sigmoid(model.decode(z[:1])).view(28, 28)
    score = (pixels.mean(0) - mean) / (mean * (1 - mean) / len(z)).sqrt()
    assert score.abs().max() < 5 and 0.9 < score.std() < 1.1  # 784 pixels: one of them beyond 5 has odds of 1 in 2000


def test_training_pixels_are_drawn_afresh_with_mean_value_over_255():
    images = torch.tensor([[0, 1, 100, 254, 255], [255] * 5], dtype=torch.uint8)
    torch.manual_seed(6)
    index = torch.zeros(10_000, dtype=torch.int64)
    x, eps = vae.draw_batch(images, index, 2)
    again, other_eps = vae.draw_batch(images, index, 2)
    assert (x[:, 0] == 0).all() and (x[:, 4] == 1).all()
    for d, value in ((1, 1), (2, 100), (3, 254)):
        assert abs(x[:, d].mean() - value / 255) < 4 * standard_error(x[:, d])
    assert not torch.equal(x, again) and not torch.equal(eps, other_eps)
    assert abs(eps.mean()) < 4 * standard_error(eps) and abs(eps.square().mean() - 1) < 4 * standard_error(eps.square())


def test_samples_are_the_means_of_the_priors_latents(model):
    z = fixed_normal("samples", 7, 2).double()
    means = torch.sigmoid(model.decode(z)).view(7, 28, 28)
    images = vae.decoder_means(model, z)
    assert images.dtype == torch.uint8 and (images / 255 - means).abs().max() <= 0.5 / 255 + 1e-12
    single = model.float()
    assert torch.equal(vae.sample(single, 7), vae.decoder_means(single, z.float()))
    assert torch.equal(vae.sample(single, 7)[:3], vae.sample(single, 3))


def test_manifold_is_at_the_quantiles_and_upright():
    z = vae.manifold_latents(5).view(5, 5, 2)
    u = torch.special.ndtr(z.double())
    torch.testing.assert_close(u[0, :, 0], (torch.arange(5) + 0.5).double() / 5, rtol=0, atol=1e-6)
    torch.testing.assert_close(z, -z.flip(0, 1), rtol=0, atol=1e-6)
    assert (z[..., 0] == z[0, :, 0]).all() and (z[:, 1:, 0] > z[:, :-1, 0]).all()  # z1 grows to the right
    assert (z[:-1, :, 1] > z[1:, :, 1]).all()  # z2 grows upwards


def test_evaluation_noise_is_a_function_of_split_and_index():
    images = torch.full((160, 28, 28), 128, dtype=torch.uint8)
    x, eps = vae.evaluation_set(images, "validation", 2)
    for n in (1, 7, 83):
        fewer, fewer_eps = vae.evaluation_set(images[:n], "validation", 2)
        assert torch.equal(x[:n], fewer) and torch.equal(eps[:n], fewer_eps)
    other, other_eps = vae.evaluation_set(images, "test", 2)
    assert not torch.equal(x, other) and not torch.equal(eps, other_eps)


# The flow prior


def test_prior_integrates_to_one_and_its_draws_follow_it():
    """The mean of log p over draws is minus the entropy."""
    prior = flow_prior(2)
    axis = torch.linspace(-30, 30, 1201, dtype=torch.float64)
    u = torch.randn(40_000, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.inference_mode():
        log_p = log_density(prior, torch.cartesian_prod(axis, axis))
        own = log_density(prior, prior.inverse(u))
    share = 0.05**2 * log_p.exp()
    assert share.sum().item() == pytest.approx(1, abs=1e-5)  # ReLUs have kinks
    assert abs(own.mean() - (share * log_p).sum()) < 4 * standard_error(own)


@pytest.mark.parametrize("z_dim", [2, 5, 8])
def test_prior_inverts_and_its_ladj_is_autograds(z_dim):
    prior = flow_prior(z_dim)
    z = torch.randn(4, 3, z_dim, dtype=torch.float64)
    u, ladj = prior(z)
    assert u.shape == z.shape and ladj.shape == z.shape[:-1] and (u - z).abs().mean() > 0.1
    torch.testing.assert_close(prior.inverse(u), z, rtol=0, atol=1e-12)
    for at, value in zip(z.flatten(0, 1), ladj.flatten()):
        jacobian = torch.autograd.functional.jacobian(lambda one: prior(one)[0], at)
        assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(value.item(), abs=1e-10)


def test_a_prior_with_zero_last_layers_is_the_normal_prior(model, x):
    flow = vae.VAE(z_dim=2, hidden=8, depth=3, couplings=4, prior_hidden=6).double()
    flow.encoder, flow.decoder = model.encoder, model.decoder
    eps, weight = normal_grid(41)
    at = eps[:, None, :].expand(-1, len(x), -1)
    with torch.inference_mode():
        by_flow, closed = (weight @ vae.elbo(each, x, at) for each in (flow, model))
    torch.testing.assert_close(by_flow, closed, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        vae.quadrature_log_px(flow, x, points=61), vae.quadrature_log_px(model, x, points=61), rtol=0, atol=1e-12
    )


def test_quadrature_and_importance_sampling_agree_under_a_flow_prior(model, x):
    model.prior = flow_prior(2)
    exact = vae.quadrature_log_px(model, x, points=201)
    torch.testing.assert_close(exact, vae.quadrature_log_px(model, x, points=301), rtol=0, atol=1e-4)  # kinks
    assert (vae.importance_sampled_log_px(model, x, draws=3000) - exact).abs().max() < 0.2
    model.float()
    for images, u in (
        (vae.sample(model, 3), fixed_normal("samples", 3, 2)),
        (vae.panel(model), vae.manifold_latents(vae.MANIFOLD_SIDE)),
    ):
        assert torch.equal(images, vae.decoder_means(model, model.prior.inverse(u)))


# The stopped gradient


@pytest.mark.parametrize("couplings", [0, 3])
def test_the_stopped_gradient_has_the_plain_ones_mean(model, x, couplings):
    model.prior = flow_prior(2, couplings)
    eps, weight = normal_grid(61)
    at = eps[:, None, :].expand(-1, len(x), -1)
    gradients = []
    for stopped in (False, True):
        log_w = vae.log_weight(model, x, *model.encode(x), at, stopped)
        gradients.append(torch.autograd.grad((weight @ log_w).sum(), list(model.parameters())))
    for plain, stopped in zip(*gradients):
        torch.testing.assert_close(stopped, plain, rtol=0, atol=1e-7)
    assert all(each.abs().max() > 1e-3 for each in gradients[0])
    one = [
        torch.autograd.grad(vae.log_weight(model, x, *model.encode(x), at[1000], s).sum(), model.encoder[-1].bias)
        for s in (False, True)
    ]
    assert (one[0][0] - one[1][0]).abs().max() > 1e-3  # at one eps they differ


def test_the_stopped_gradient_vanishes_where_q_is_the_posterior(model, x):
    """The decoder sees nothing of z, and the prior's one coupling scales and shifts by constants: p(z|x) is normal."""
    model.prior = flow_prior(2, couplings=1)
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
        model.prior.couplings[0].conditioner[-1].weight.zero_()
    log_scale, shift = (each.detach() for each in model.prior.couplings[0].maps(torch.zeros(1, dtype=torch.float64)))
    mu = torch.cat((torch.zeros(1), -shift * torch.exp(-log_scale))).double().expand(3, 2).requires_grad_()
    logvar = torch.cat((torch.zeros(1), -2 * log_scale)).double().expand(3, 2).requires_grad_()
    eps = torch.randn(50, 3, 2, dtype=torch.float64)
    for stopped in (True, False):
        gradients = [
            torch.autograd.grad(vae.log_weight(model, x, mu, logvar, each, stopped).sum(), (mu, logvar)) for each in eps
        ]
        largest = max(float(each.abs().max()) for pair in gradients for each in pair)
        assert largest < 1e-12 if stopped else largest > 1
