"""The flow's formulas against independent ones."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import experiment
import judge
import nf
from cli import RunError, UserError
from conftest import COSTS, SMALL, VERDICT, built, contents, result_of

SHRINK, LIMIT = 1e-5, 7.0  # as the report has them: of pixels before the logit; of log-weights and log-rates
COUPLING = {"hidden": 5, "blocks": 1, "spread": 4.0, "limit": LIMIT}
MAPS = pytest.mark.parametrize("components", [0, 4], ids=["affine", "mixture"])


def perturbed(module: torch.nn.Module, seed: int = 0, by: float = 0.3) -> torch.nn.Module:
    """The module in float64 with every parameter moved, so that no layer is zero and no map the identity."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def jacobian_log_det(function, x: torch.Tensor) -> torch.Tensor:
    """log |det| of the Jacobian of a function of one image, by autograd."""
    jacobian = torch.autograd.functional.jacobian(function, x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]


def small(components: int) -> nf.Flow:
    """A flow with few hidden channels, for images of any side divisible by 4."""
    return perturbed(built(nf, "--hidden", 5, "--components", components), by=0.1)


def mixture(shape=(5, 3, 2, 2), components: int = 4, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """x, weight, mu, rate in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, by):
        return by * torch.randn(*size, generator=generator, dtype=torch.float64)

    batch, *rest = shape
    log_weight, mu, log_rate = (normal(batch, components, *rest, by=by) for by in (1.0, 3.0, 1.0))
    return normal(*shape, by=4), log_weight.exp(), mu, log_rate.exp()


@MAPS
def test_couplings_ladj_is_autograds(components):
    torch.manual_seed(0)
    coupling = perturbed(nf.Coupling(2, components=components, **COUPLING))
    seen, x = torch.randn(2, 1, 2, 2, 2, dtype=torch.float64)
    _, ladj = coupling(seen, x)
    expected = jacobian_log_det(lambda each: coupling(seen, each)[0], x)
    assert abs(expected) > 0.1
    torch.testing.assert_close(ladj[0], expected, rtol=0, atol=1e-10)


@MAPS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_couplings_inverse_undoes_it(components, dtype, tolerance):
    torch.manual_seed(0)
    coupling = perturbed(nf.Coupling(2, components=components, **COUPLING)).to(dtype)
    seen, x = torch.randn(2, 6, 2, 3, 3, dtype=dtype)
    z, _ = coupling(seen, x)
    assert (z - x).abs().max() > 0.1
    if components:
        tolerance = max(tolerance, 1e-9)  # of the mixture's inverse
    torch.testing.assert_close(coupling.inverse(seen, z), x, rtol=0, atol=tolerance)


@MAPS
def test_networks_gone_astray_leave_the_bound_and_its_gradient_finite(components):
    """One network's far shift must not make the next one's output overflow: it is held at FARTHEST."""
    torch.manual_seed(0)
    flow = small(components).float()
    for coupling in (each for level in flow.levels for each in level):
        coupling.conditioner[-1].weight.data *= 1e6
    bound = nf.bound(flow, some_images(5), torch.rand(5, 28, 28))
    bound.sum().backward()
    gradients = [each.grad for each in flow.parameters() if each.grad is not None]
    assert bound.isfinite().all() and all(each.isfinite().all() for each in gradients)
    coupling = flow.levels[0][0]
    _, shift, _ = coupling.maps(torch.randn(1, 2, 14, 14))
    assert shift.abs().max() == nf.FARTHEST


def test_an_affine_coupling_starts_as_the_identity():
    torch.manual_seed(0)
    coupling = nf.Coupling(2, components=0, **COUPLING)
    seen, x = torch.randn(2, 6, 2, 3, 3)
    z, ladj = coupling(seen, x)
    assert torch.equal(z, x) and not ladj.any()


def test_mixture_is_the_formula():
    """Value, ladj and the gradients of both, against the plain formula and autograd's derivative of it."""
    arguments = [each.requires_grad_() for each in mixture()]
    x, weight, mu, rate = arguments
    floor_weight, floor_rate = nf.FLOOR  # one more component
    u = torch.cat(((x.unsqueeze(1) - mu) * rate, floor_rate * x.unsqueeze(1)), 1)
    share = torch.cat((weight, torch.full_like(x, floor_weight).unsqueeze(1)), 1)
    share = share / share.sum(1, keepdim=True)
    below, above = (share * torch.sigmoid(u)).sum(1), (share * torch.sigmoid(-u)).sum(1)
    plain = torch.log(below) - torch.log(above)
    (slope,) = torch.autograd.grad(plain.sum(), x, create_graph=True)
    z, ladj = nf.mixture_logit(*arguments)
    torch.testing.assert_close(z, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ladj, slope.log(), rtol=0, atol=1e-10)
    weights = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.autograd.grad((weights[0] * plain + weights[1] * slope.log()).sum(), arguments)
    ours = torch.autograd.grad((weights[0] * z + weights[1] * ladj).sum(), arguments)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_mixtures_gradient_is_finite_far_out():
    _, weight, mu, rate = mixture((200, 3), seed=3)
    parameters = [weight, mu, torch.exp(LIMIT * torch.sign(rate - 1))]
    x = torch.full((200, 3), 100.0)
    x[::2] *= -1
    arguments = [each.float().requires_grad_() for each in (x, *parameters)]
    z, ladj = nf.mixture_logit(*arguments)
    assert all(each.isfinite().all() for each in torch.autograd.grad((z + ladj).sum(), arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_is_increasing_and_finite_far_out(dtype):
    _, *parameters = (each.to(dtype) for each in mixture((1, 50)))
    x = torch.linspace(-100, 100, 401, dtype=dtype).unsqueeze(1).expand(-1, 50)
    z, ladj = nf.mixture_logit(x, *(each.expand(len(x), -1, -1) for each in parameters))
    assert z.isfinite().all() and ladj.isfinite().all()
    assert (z[1:] > z[:-1]).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_mixtures_inverse_undoes_it(dtype, tolerance):
    x, *parameters = (each.to(dtype) for each in mixture((2000, 3), seed=2))
    z, ladj = nf.mixture_logit(x, *parameters)
    again = nf.invert_mixture(z, *parameters)
    error = (again - x).abs() * ladj.exp().clamp(max=1)  # where the map is flat, z hardly tells x
    assert error.max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 80.0])
def test_mixtures_inverse_is_found_for_extreme_inputs(dtype, size):
    """Far means, scales at both of their limits, components of next to no weight: the inverse's image is z again,
    or z lies between the images of the neighbouring floats."""
    _, weight, mu, rate = mixture((2000, 3), seed=3)
    parameters = [each.to(dtype) for each in (weight**10, 10 * mu, torch.exp(LIMIT * torch.sign(rate - 1)))]
    z = torch.full((2000, 3), size, dtype=dtype)
    z[::2] *= -1
    x = nf.invert_mixture(z, *parameters)
    assert x.isfinite().all()
    near = 16 * torch.finfo(dtype).eps * (1 + x.abs())
    below, there, above = (nf.mixture_logit(each, *parameters)[0] for each in (x - near, x, x + near))
    close = (there - z).abs() <= 16 * torch.finfo(dtype).eps * (1 + z.abs())
    assert (close | ((below <= z) & (z <= above))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mixtures_inverse_is_finite_beyond_what_its_sums_can_hold(dtype):
    """exp(-z) is 0 there; the number found is no nearer than that of the greatest z that they hold."""
    _, *parameters = (each.to(dtype) for each in mixture((2000, 3), seed=3))
    near, far = (nf.invert_mixture(torch.full((2000, 3), z, dtype=dtype), *parameters) for z in (80.0, 1e4))
    assert far.isfinite().all() and (far >= near).all()


def test_an_inverse_that_fails_says_so():
    z, *parameters = mixture((3, 2))
    z[1, 1] = math.nan
    with pytest.raises(RunError, match="1 of 6"):
        nf.invert_mixture(z, *parameters)


@MAPS
def test_flows_ladj_is_autograds_and_its_inverse_undoes_it(components):
    flow = small(components)
    v = 256 * torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    z, ladj = flow(v)
    expected = jacobian_log_det(lambda each: flow(each)[0], v)
    torch.testing.assert_close(ladj[0], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(flow.inverse(z), v, rtol=0, atol=1e-7)
    log_normal = -0.5 * (z.square().sum() + 16 * math.log(2 * math.pi))
    torch.testing.assert_close(nf.log_prob(flow, v)[0], log_normal + expected, rtol=0, atol=1e-9)


def test_forward_and_inverse_log_determinants_cancel():
    """The inverse of the mixture has no gradient of autograd's, so here its Jacobian is of central differences."""
    for components, tolerance in ((0, 1e-9), (4, 1e-4)):
        flow = small(components)
        v = 256 * torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        z, ladj = flow(v)
        step = 1e-4 * torch.eye(16, dtype=torch.float64)
        if components:
            jacobian = (flow.inverse(z.detach() + step) - flow.inverse(z.detach() - step)).flatten(1) / 2e-4
            backward = torch.linalg.slogdet(jacobian)[1]
        else:
            backward = jacobian_log_det(flow.inverse, z.detach())
        assert abs(ladj.item() + backward.item()) < tolerance


def test_at_every_level_a_pixels_neighbours_are_in_the_other_half():
    """The nearest pixels of one's own half are further away than the other's by the root of 2; join undoes it."""
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    places = torch.stack((row, column)).unsqueeze(1)  # each pixel's place, as two images
    rest = places
    for level in range(4):
        one, other = nf.split(rest)
        assert torch.equal(nf.join(one, other), rest)
        assert one.numel() == other.numel() == places.numel() / 2 ** (level + 1)
        own, others = one.flatten(1).T, other.flatten(1).T  # (pixels, 2)
        apart = torch.cdist(own, own).fill_diagonal_(math.inf).amin(1)
        across = torch.cdist(own, others).amin(1)
        torch.testing.assert_close(across, torch.full_like(across, 2 ** (level / 2)))
        torch.testing.assert_close(apart, math.sqrt(2) * across)
        rest = other


@MAPS
def test_what_is_seen_passes_through_bit_for_bit(components):
    """Of a flow with one coupling, one colour's logits come out as they went in, and the other's do not."""
    flow = small(components)
    flow.levels = flow.levels[:1]
    flow.levels[0] = flow.levels[0][:1]
    v = 256 * torch.rand(2, 8, 8, dtype=torch.float64)
    seen, other = nf.split(nf.to_logits(v, SHRINK)[0].unsqueeze(1))
    changed, kept = flow(v)[0].chunk(2, dim=1)
    assert torch.equal(kept, seen.flatten(1)) and not torch.isclose(changed, other.flatten(1)).any()


def test_logits_ladj_is_autograds_and_the_inverse_undoes_it():
    v = torch.cat((torch.linspace(0, 256, 1001), torch.tensor([1e-6, 255.99999]))).double().requires_grad_()
    y, ladj = nf.to_logits(v, SHRINK)
    (slope,) = torch.autograd.grad(y.sum(), v)
    torch.testing.assert_close(ladj, slope.log(), rtol=0, atol=1e-9)
    torch.testing.assert_close(nf.from_logits(y, SHRINK), v, rtol=0, atol=1e-9)
    a = SHRINK
    p = a / 2 + (1 - a) * v / 256
    torch.testing.assert_close(y, torch.log(p / (1 - p)), rtol=0, atol=1e-8)


def test_float32_keeps_its_digits_at_both_ends():
    v = torch.cat((torch.linspace(0, 1, 500), torch.linspace(255, 256, 500)))
    assert v[-1] == 256
    for ours, exact in zip(nf.to_logits(v, SHRINK), nf.to_logits(v.double(), SHRINK)):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)


def test_a_uniform_density_has_8_bits():
    for dimensions in (1, 784):
        log_p = torch.tensor([-dimensions * math.log(256)], dtype=torch.float64)
        assert nf.bits_per_dim(log_p, dimensions).item() == pytest.approx(8, rel=1e-14)


class Gaussian:
    """In place of a flow: independent normal pixels, of which the cells' probabilities are known."""

    mean, deviation = 3.3, 0.8

    def __init__(self, dequantiser: nf.Dequantiser | None):
        self.dequantiser = dequantiser

    def __call__(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = (v - self.mean) / self.deviation
        return z.flatten(1), torch.full((len(v),), -v[0].numel() * math.log(self.deviation))

    def log_probability(self, images: torch.Tensor) -> torch.Tensor:
        normal = torch.distributions.Normal(self.mean, self.deviation)
        return torch.log(normal.cdf(images.double() + 1) - normal.cdf(images.double())).flatten(1).sum(1)


def dequantiser(by: float = 0.3) -> nf.Dequantiser:
    torch.manual_seed(0)
    return perturbed(nf.Dequantiser(5), by=by)


@pytest.mark.parametrize("noise", ["uniform", "learned"])
def test_the_bound_is_below_the_discrete_probability_and_rises_with_draws(noise):
    model = Gaussian(dequantiser(by=0.1) if noise == "learned" else None)
    images = torch.tensor([[[1, 2], [3, 4]], [[3, 3], [4, 3]], [[5, 2], [2, 5]]])
    exact = model.log_probability(images)
    n = 19_200
    e = torch.rand(3 * n, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bounds = nf.bound(model, images.repeat_interleave(n, 0), e).detach().view(3, n)
    assert (bounds.mean(1) < exact).all()
    gaps = [
        float((exact - (torch.logsumexp(bounds.view(3, -1, k), 2) - math.log(k)).mean(1)).max()) for k in (1, 8, 64)
    ]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > -1e-2


def test_learned_noise_has_a_density_that_is_autograds_and_integrates_to_one():
    """Of one pixel, over its u, the other three of the image held; perturbed, so that it is no uniform density."""
    model, image = dequantiser(), torch.tensor([[[0.0, 255.0], [77.0, 128.0]]], dtype=torch.float64)
    noise = torch.tensor([[[0.2, 0.7], [0.4, 0.9]]], dtype=torch.float64)
    u, log_q = model(image, noise)
    slopes = torch.autograd.functional.jacobian(lambda each: model(image, each)[0], noise).reshape(4, 4)
    assert torch.equal(slopes, torch.diag(slopes.diagonal())) and (u > 0).all() and (u < 1).all()
    assert abs(log_q) > 0.1
    torch.testing.assert_close(log_q[0], -slopes.diagonal().log().sum(), rtol=0, atol=1e-10)
    e = torch.linspace(1e-7, 1 - 1e-7, 200_001, dtype=torch.float64)
    many = noise.repeat(len(e), 1, 1)
    many[:, 0, 0] = e
    with torch.inference_mode():
        u, log_q = model(image.expand(len(e), -1, -1), many)
    q = torch.exp(log_q + slopes.diagonal()[1:].log().sum())  # less what the other three pixels contribute
    assert q.max() > 1.1 * q.min()
    assert torch.trapezoid(q, u[:, 0, 0]).item() == pytest.approx(1, abs=1e-3)


def test_learned_noise_is_of_the_image_around_it():
    """A pixel moves the noise of all pixels within three 2 x 2 blocks of its own, and of no others."""
    torch.manual_seed(0)
    dequantiser = perturbed(nf.Dequantiser(5), by=0.2)
    generator = torch.Generator().manual_seed(0)
    images, noise = 255 * torch.rand(1, 28, 28, generator=generator), torch.rand(1, 28, 28, generator=generator)
    images, noise = images.floor().double(), noise.double()
    other = images.clone()
    other[0, 9, 16] += 100
    moved = (dequantiser(images, noise)[0] != dequantiser(other, noise)[0])[0]
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[2:16, 10:24] = True  # blocks 4 - 3 to 4 + 3 and 8 - 3 to 8 + 3
    assert torch.equal(moved, expected)


def test_learned_noise_starts_uniform_and_is_finite_at_its_ends():
    flow = built(nf, "--hidden", 5).double()
    with torch.no_grad():  # perturb all but the dequantiser
        for parameter in flow.levels.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    images = some_images(5)
    noise = torch.rand(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    learned = nf.bound(flow, images, noise)
    learner, flow.dequantiser = flow.dequantiser, None
    torch.testing.assert_close(learned, nf.bound(flow, images, noise), rtol=0, atol=1e-6)
    learner = perturbed(learner).float()
    for end in (0.0, 1 - 2**-24):
        assert all(each.isfinite().all() for each in learner(images.float(), torch.full(images.shape, end)))


@MAPS
def test_a_flow_on_two_numbers_integrates_to_one(components):
    torch.manual_seed(0)
    couplings = [perturbed(nf.Coupling(1, components=components, **COUPLING), seed, by=0.2) for seed in range(3)]
    axis = torch.linspace(-20, 20, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    seen, other = (each.view(-1, 1, 1, 1) for each in grid.T)
    ladj = torch.zeros(len(grid), dtype=torch.float64)
    with torch.inference_mode():
        for coupling in couplings:
            transformed, of_coupling = coupling(seen, other)
            seen, other, ladj = transformed, seen, ladj + of_coupling
    squares = (seen.square() + other.square()).flatten()
    density = torch.exp(ladj - 0.5 * squares - math.log(2 * math.pi))
    assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-3)


def some_images(n: int) -> torch.Tensor:
    return torch.randint(256, (n, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_evaluation_does_not_depend_on_the_batch_size():
    flow, (images, noise) = small(4), nf.evaluation_set(some_images(23), "test")
    whole = nf.per_image_bound(flow, images, noise.double(), batch=23)
    for batch in (1, 5, 22):
        torch.testing.assert_close(nf.per_image_bound(flow, images, noise.double(), batch), whole, rtol=1e-10, atol=0)


def test_evaluation_is_on_fixed_noise_of_the_images_index():
    (images, whole), (_, first), (_, other) = (
        nf.evaluation_set(some_images(n), name) for n, name in ((9, "a"), (4, "a"), (4, "b"))
    )
    assert torch.equal(images, some_images(9)) and torch.equal(whole[:4], first)
    assert not torch.isclose(first, other, rtol=0).all()


def test_white_pixels_need_some_shrinking():
    """With none, 255 + u is rounded to 256 now and then, whose logit is infinite."""
    with pytest.raises(UserError, match="--shrink: must be a number between 0 and 1"):
        nf.flags().parse_args(["--shrink", "0"])


def test_importance_weights_are_a_log_mean_exp():
    flow = small(4).float()
    sets = [nf.evaluation_set(some_images(7), f"test, importance sample {k}") for k in range(3)]
    draws = torch.stack([nf.per_image_bound(flow, *each) for each in sets])
    ours = nf.importance_weighted_bpd(flow, some_images(7), "test", 3)
    assert not torch.isclose(draws[0], draws[1]).any()
    top = draws.amax(0)
    expected = -(top + torch.log(torch.exp(draws - top).mean(0))) / (784 * math.log(2))
    torch.testing.assert_close(ours, expected)
    assert (ours < nf.bits_per_dim(draws).mean(0)).all()


def test_training_noise_is_fresh_and_uniform():
    images = torch.full((2, 28, 28), 7, dtype=torch.uint8)
    torch.manual_seed(0)
    index = torch.zeros(100, dtype=torch.int64)
    (pixels, one), (_, other) = nf.draw_batch(images, index), nf.draw_batch(images, index)
    assert pixels.shape == one.shape and (pixels == 7).all()
    assert not torch.equal(one, other) and (one >= 0).all() and (one < 1).all()
    assert abs(one.mean() - 0.5) < 4 * math.sqrt(1 / 12 / one.numel())


def test_temperature_scales_the_latents(monkeypatch):
    seen = []
    monkeypatch.setattr(nf, "decoded", lambda model, z: seen.append(z) or torch.zeros(len(z), 28, 28))
    for temperature in (1.0, 0.5):
        nf.sample(small(0), 9, temperature)
    torch.testing.assert_close(seen[1], 0.5 * seen[0])


def test_samples_are_rounded_down(monkeypatch):
    """A value v stands for the grey level whose cell [x, x + 1) it lies in."""
    flow = small(0).float()
    v = torch.tensor([0.0, 0.4, 0.6, 254.9, 255.0, 255.999, 256.3, -0.2]).repeat(1, 98).view(1, 28, 28)
    monkeypatch.setattr(flow, "inverse", lambda z: v)
    assert nf.decoded(flow, torch.zeros(1, 784)).flatten()[:8].tolist() == [0, 0, 0, 254, 255, 255, 255, 0]


def test_real_images_survive_the_round_trip_through_the_trained_weights(data):
    """Within half a grey level, in float32; and the ends of the interpolation's paths are the very images."""
    model = experiment.committed("nf", nf.build)
    images = data.test_images[:20]
    with torch.inference_mode():
        v, _ = nf.dequantise(model, images, torch.rand(images.shape, generator=torch.Generator().manual_seed(0)))
        again = model.inverse(model(v)[0])
    assert (again - v).abs().max() < 0.5
    ends = torch.cat(nf.different_pairs(data))
    with torch.inference_mode():
        v, _ = nf.dequantise(model, *nf.evaluation_set(ends, "interpolation"))
        assert torch.equal(nf.decoded(model, model(v)[0]), ends)


def test_what_a_run_leaves(finished, tiny, tmp_path, capsys):
    out = shutil.copytree(finished("nf"), tmp_path / "out")
    before = contents(out)
    names = {name.removeprefix("figures/") for name in before if name.startswith("figures/")}
    panels = {f"nf_samples_epoch{epoch:02d}.png" for epoch in (0, 1, 2)}
    assert names == panels | {"nf.json", "nf_bpd.png", "nf_bpd.pdf", "nf_interpolation.png"}
    assert Image.open(out / "figures" / "nf_interpolation.png").size == (4 * (9 * 30 - 2), 4 * (8 * 30 - 2))
    content = result_of(out, "nf")
    first, second, third = content["history"]
    assert set(first) == {"epoch", "train_bpd", "val_bpd", "seconds"}
    assert set(third) == set(first) | {"gradient_norm"}
    assert set(second) == set(third) | {"early_val_bpd", "early_seconds"}
    assert first["val_bpd"] > second["early_val_bpd"] > second["val_bpd"]
    assert first["seconds"] < second["early_seconds"] < first["seconds"] + second["seconds"]
    result = content["result"]
    assert set(result) == {"test_bpd", "test_bpd_iw", "importance_samples", "at_temperature"} | COSTS | VERDICT
    assert {t: set(verdict) for t, verdict in result["at_temperature"].items()} == dict.fromkeys(
        ("0.7", "0.8", "0.9"), VERDICT
    )
    assert result["test_bpd_iw"] < result["test_bpd"]
    model, judged_by = experiment.trained(out / "weights" / "nf.pt", nf.build, ""), judge.load(torch.device("cpu"))
    for temperature, verdict in {"1": result, **result["at_temperature"]}.items():
        samples = nf.sample(model, judge.JUDGED, float(temperature))
        assert judge.verdict(judged_by, samples, tiny.test_images) == {key: verdict[key] for key in VERDICT}
    flags = [*SMALL["nf"], "--out", str(out)]
    assert nf.main([*flags, "--sample", "23"]) == 0
    images = np.load(out / "figures" / "nf_samples.npz")["images"]
    assert images.shape == (23, 28, 28) and images.dtype == np.uint8
    assert nf.main([*flags, "--sample", "23", "--temperature", "0.5"]) == 0
    cooler = np.load(out / "figures" / "nf_samples.npz")["images"]
    assert (cooler != images).any()
    assert nf.main([*flags, "--temperature", "0.5"]) == 2  # of no samples
    capsys.readouterr()
    assert nf.main([*flags, "--evaluate"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert all(again[key] == result[key] for key in VERDICT | {"test_bpd", "test_bpd_iw"})
    assert nf.main([*flags, "--resume"]) == 0
    after = contents(out)
    del after["figures/nf_samples.npz"]
    assert after == before


def test_a_gradient_that_is_not_finite_is_an_error_with_its_place(tiny, tmp_path, monkeypatch, capsys):
    step, calls = nf.training_step, []

    def broken(*args):
        calls.append(args)
        loss, norm = step(*args)
        return loss, norm * math.nan if len(calls) == 13 else norm

    monkeypatch.setattr(nf, "training_step", broken)
    assert nf.main([*SMALL["nf"], "--out", str(tmp_path)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "diverged" in line]
    assert "gradient_norm" in line and "epoch 2 at step 3 of 10" in line


def test_a_step_descends_the_bound_that_is_reported():
    torch.manual_seed(0)
    model, images, index = small(4).float(), torch.randint(256, (4, 28, 28), dtype=torch.uint8), torch.arange(4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    torch.manual_seed(3)
    expected = nf.bits_per_dim(nf.bound(model, *nf.draw_batch(images, index))).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    torch.manual_seed(3)
    loss, _ = nf.training_step(model, torch.optim.SGD(model.parameters(), lr=1.0), images, index, clip=1e9)
    torch.testing.assert_close(loss, expected)
    for parameter, old, gradient in zip(model.parameters(), before, gradients):
        torch.testing.assert_close(old - parameter, gradient, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_clipped():
    model = small(4).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    images = torch.randint(256, (4, 28, 28), dtype=torch.uint8)
    _, norm = nf.training_step(model, optimizer, images, torch.arange(4), clip=1e-3)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters())]).norm()
    assert norm > 1e-2 and moved.item() == pytest.approx(1e-3, rel=1e-3)
    assert all(parameter.grad.any() for parameter in model.parameters())  # the noise's network among them


def test_pairs_are_of_different_classes(tiny):
    tiny = dataclasses.replace(tiny, test_labels=torch.arange(100) // 3 % 10)  # every third pair is of one class
    start, end = nf.different_pairs(tiny)
    assert start.shape == end.shape == (nf.INTERPOLATIONS, 28, 28)

    def label(image):
        return tiny.test_labels[[torch.equal(image, each) for each in tiny.test_images].index(True)]

    assert all(label(a) != label(b) for a, b in zip(start, end))
