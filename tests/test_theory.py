"""Every answer checked by computation, within its tolerance; what takes long by its JSON or on a small model."""

import dataclasses
import functools
import inspect
import itertools
import json
import math
import re
import subprocess

import pytest
import torch
import torch.nn.functional as F

import cli
import experiment
import judge
import mnist
import nf
import theory
import vae
from conftest import ROOT, built
from training import fixed_generator


@pytest.fixture(scope="module")
def answers() -> dict:
    """What `make theory` left."""
    return json.loads((ROOT / "figures" / "theory.json").read_text())


@pytest.fixture(scope="module")
def model() -> vae.VAE:
    """The trained z = 2 VAE."""
    return experiment.committed("vae_z2", vae.build)


@pytest.fixture
def small() -> vae.VAE:
    """An untrained z = 2 VAE of few units, whose codes are spread and narrow."""
    torch.manual_seed(0)
    untrained = vae.VAE(z_dim=2, hidden=8, depth=3)
    with torch.no_grad():
        untrained.encoder[-1].weight[:2].mul_(8)  # of mu
        untrained.encoder[-1].bias[2:].fill_(-4)  # of logvar
        untrained.decoder[-1].weight.mul_(2)
    return untrained


@pytest.fixture
def coarse(monkeypatch) -> None:
    """Grids over z with fewer points, which do for a small model."""
    monkeypatch.setattr(vae, "quadrature_log_px", functools.partial(vae.quadrature_log_px, points=201))
    monkeypatch.setattr(theory, "GRID_POINTS", 180)


def test_every_question_is_answered_about_the_committed_weights(answers):
    functions = [name for name, _ in inspect.getmembers(theory, inspect.isfunction) if re.match(r"q\d_\d", name)]
    keys = [name for name in answers if name.startswith("q")]
    questions = [sorted(re.match(r"q\d_\d+", name).group() for name in names) for names in (functions, keys)]
    assert questions[0] == questions[1] and list(answers["seconds"]) == keys
    seconds = answers["seconds"].values()  # of processor time: under a minute each on two cores
    assert max(seconds) < 120 and sum(seconds) < 600
    for run in ("vae_z2", "vae_z20", "vae_best", "nf", "judge"):
        path = ROOT / "figures" / f"{run}.json"
        untouched = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", path], cwd=ROOT, capture_output=True)
        if untouched.returncode == 0:  # a run that was made again here is ahead of `make theory`
            assert answers[f"{run}_sha256"] == json.loads(path.read_text())["weights_sha256"]


def test_q1_1_an_autoencoder_reconstructs_and_does_not_generate(answers):
    two, twenty = (answers["q1_1"][name] for name in ("d2", "d20"))
    for each in (two, twenty):
        plain, variational = each["autoencoder"], each["vae"]
        assert plain["excess"] > variational["excess"] > 0
        assert plain["code_deviation"] > 1.5 * variational["code_deviation"]
        assert plain["fid"] > variational["fid"]
    assert twenty["autoencoder"]["reconstruction"] < two["autoencoder"]["reconstruction"] - 30


def test_q1_1_only_the_vae_has_noise_and_a_kl(data, monkeypatch):
    monkeypatch.setattr(theory, "AUTOENCODER_EPOCHS", 2)
    images = data.train_images[:800].flatten(1)
    losses = {"elbo": [], "reconstruction": []}
    for module, name in ((vae, "elbo"), (theory, "reconstruction")):
        original = getattr(module, name)
        counted = functools.partial(
            lambda f, seen, *args: seen.append(args[1].shape) or f(*args), original, losses[name]
        )
        monkeypatch.setattr(module, name, counted)
    for variational, counts in ((True, (8, 0)), (False, (8, 8))):
        theory.briefly_trained(images, 2, variational)
        assert tuple(map(len, losses.values())) == counts
    assert set(losses["reconstruction"]) == {(theory.AUTOENCODER_BATCH, mnist.PIXELS)}


def test_q1_1_reconstruction_is_the_cross_entropy_at_the_mean_code(small, data):
    x, _ = (part[:5] for part in vae.evaluation_set(data.test_images, "test", 2))
    logits = small.decode(small.encoder(x)[:, :2])
    expected = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
    torch.testing.assert_close(theory.reconstruction(small, x), expected)


def test_q1_3_the_inverse_distribution_functions_make_the_ring():
    z = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = theory.onto_ring(z)
    radius = x.norm(dim=1)
    assert abs(radius.mean() - theory.RING_RADIUS) < 4 * theory.RING_DEVIATION / len(z) ** 0.5
    assert abs(radius.std() - theory.RING_DEVIATION) < 4 * theory.RING_DEVIATION / (2 * len(z)) ** 0.5
    torch.testing.assert_close(x / radius.unsqueeze(1), z / z.norm(dim=1, keepdim=True))
    assert (radius[z.norm(dim=1).argsort()].diff() >= 0).all()  # the farther out, the farther out


def test_q1_3_so_does_the_network(answers):
    answer = answers["q1_3"]
    assert abs(answer["radius_mean"] - answer["radius"]) < 0.02
    assert abs(answer["radius_deviation"] - answer["deviation"]) < 0.05
    assert answer["angle_resultant"] < 0.02 and 0 < answer["percent_in_the_hole"] < 2


def test_q1_4_linear_gaussian():
    answer = theory.q1_4_linear_gaussian()
    for name in ("prior", "q"):
        assert abs(answer["d1"][f"{name}_ratio"] - 1) < 4 * answer["d1"][f"{name}_ratio_se"]
    for d in (1, 5, 10, 20):
        row, variance = answer[f"d{d}"], theory.NOISE**2 / (1 + theory.NOISE**2)
        # the mean over x of (m^2 + variance - 1 - log variance) / 2, a dimension, where m^2 has the mean 1 - variance
        expected = -0.5 * d * math.log(variance)
        assert abs(row["kl_posterior_prior"] - expected) < 4 * row["kl_posterior_prior_se"]
        assert abs(row["q_bias"]) < row["q_rms"] < 0.1 and abs(row["prior_bias"]) < row["prior_rms"]
    assert answer["d20"]["kl_posterior_prior_se"] < 0.25
    assert answer["d20"]["prior_bias"] < -3 and answer["d1"]["prior_rms"] < 0.1
    assert answer["d1"]["prior_ratio_se"] == pytest.approx(answer["d1"]["prior_ratio_se_expected"], rel=0.3)


def test_q1_4_chi_squared_is_its_integral():
    line = theory.LINE.unsqueeze(1)
    log_prior = theory.normal_log_prob(line, 0.0, 0.0)
    for mean, variance in ((0.0, 0.1), (1.5, 0.3), (-2.0, 1.2)):
        squares = 2 * theory.normal_log_prob(line, mean, math.log(variance)) - log_prior
        exact = theory.integral(squares.exp()) - 1
        assert float(theory.chi_squared(torch.tensor(mean, dtype=torch.float64), variance)) == pytest.approx(exact)


def test_q1_4_quadrature_has_converged(model, data):
    """Half of its default step, 0.02, changes nothing, on a square that holds the posteriors of some images."""
    x, _ = (part[:60] for part in vae.evaluation_set(data.test_images, "test", 2))
    with torch.inference_mode():
        x = x[(model.encode(x)[0].abs() < 1.2).all(1)]
    assert len(x) > 10
    exact, finer = (vae.quadrature_log_px(model, x, points, limit=2.0) for points in (201, 401))
    torch.testing.assert_close(exact, finer, rtol=0, atol=1e-3)
    step = 2 * 6.0 / (inspect.signature(vae.quadrature_log_px).parameters["points"].default - 1)
    assert step == pytest.approx(2 * 2.0 / 200)


def test_q1_4_main_modes_are_those_of_a_known_posterior(monkeypatch):
    """For a decoder whose likelihood in z is a Gaussian, the posterior's log-normaliser and moments are known."""
    monkeypatch.setattr(theory, "MODE_POINTS", 401)
    slope, precision = torch.tensor([3.0, -2.0]), torch.tensor([24.0, 99.0])

    class Known:
        def decode(self, z):
            return (z * slope - 0.5 * precision * z.square()).sum(-1, keepdim=True)

    monkeypatch.setattr(F, "softplus", torch.zeros_like)
    log_px, mu, logvar, share = theory.main_modes(Known(), torch.ones(1, 1))
    variance = 1 / (1 + precision)
    torch.testing.assert_close(mu[0], slope * variance, rtol=0, atol=1e-3)
    torch.testing.assert_close(logvar[0], variance.log(), rtol=0, atol=0.01)
    expected = 0.5 * (slope.square() * variance + variance.log()).sum()
    assert float(log_px[0]) == pytest.approx(float(expected), abs=1e-3) and float(share[0]) > 0.999


def test_q1_4_main_modes_see_the_quadratures_truth(model, data):
    x, _ = (part[:5] for part in vae.evaluation_set(data.test_images, "test", 2))
    with torch.inference_mode():
        log_px, mu, logvar, share = theory.main_modes(model, x)
        torch.testing.assert_close(log_px, vae.quadrature_log_px(model, x), rtol=0, atol=1e-2)
        own = theory.sampled_log_px(model, x, mu, logvar, 400)
    torch.testing.assert_close(own, log_px, rtol=0, atol=0.3)
    assert ((share > 0.2) & (share < 1 + 1e-6)).all()


def test_q1_4_sampling_from_q_is_the_scripts(small, data):
    x, _ = (part[:4] for part in vae.evaluation_set(data.test_images, "test", 2))
    with torch.no_grad():
        for parameter in small.encoder[-1].parameters():  # a wide q, whose weights vary little
            parameter.mul_(0.1)
        ours = theory.sampled_log_px(small, x, *small.encode(x), 30_000)
    torch.testing.assert_close(ours, vae.importance_sampled_log_px(small, x, 30_000), rtol=0, atol=0.05)


def test_q1_4_density_level_is_that_of_a_normal():
    axis = torch.linspace(-5, 5, 401, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    density = theory.normal_log_prob(z, 0.0, 0.0).exp()
    for share in (0.5, 0.95):  # |z|^2 is chi-squared with two degrees of freedom
        assert theory.density_level(density, share) == pytest.approx((1 - share) / (2 * math.pi), rel=0.02)
    inside = z.norm(dim=1) < theory.RADIUS
    assert float(density[inside].sum() / density.sum()) == pytest.approx(theory.WITHIN, abs=1e-3)


def test_gap_parts():
    parts = theory.gap_parts(
        *(torch.tensor([value, value - 1], dtype=torch.float64) for value in (-10.0, -14.0, -11.0))
    )
    assert parts == {"gap": 4, "gap_family": 1, "gap_amortisation": 3, "amortisation_share": 75}


def test_q1_4_json(answers):
    answer = answers["q1_4"]
    assert answer["gap"] == pytest.approx(answer["gap_family"] + answer["gap_amortisation"])
    assert 0 < 10 * answer["gap_family"] < answer["gap"]
    assert answer["from_q"]["median"] < 0.1 < answer["from_q"]["percentile_90"] < 10 < answer["from_q"]["percentile_99"]
    assert abs(answer["from_own"]["percentile_99"]) < 1 and abs(answer["from_own"]["mean"]) < 0.1
    assert answer["worst_share"] > 50 and answer["worst_share_median"] > 90
    assert answer["worst_farthest"] > answer["worst_nearest"] > 3


def test_q1_5_kl():
    answer = theory.q1_5_kl()
    assert answer["tiny"]["kl"] == pytest.approx(1.49999666669e-10, rel=1e-9)
    assert answer["tiny"]["float32"] == pytest.approx(1.5e-10, rel=0.01)
    assert abs(answer["tiny"]["naive_float32"] / 1.5e-10 - 1) > 0.2
    for row in answer.values():
        mu, variance = row["mu"], row["variance"]
        assert row["kl"] == pytest.approx((variance + mu**2 - 1) / 2 - math.log(variance) / 2, rel=1e-6)
        assert abs(row["monte_carlo"] - row["kl"]) <= 4 * row["monte_carlo_se"]
        if row is not answer["tiny"]:
            assert row["float32"] == pytest.approx(row["kl"], rel=1e-6)
            assert row["naive_float32"] == pytest.approx(row["kl"], rel=1e-5)


def test_q1_6_the_gap_is_the_kl_to_the_posterior(small, coarse, data, answers):
    answer = theory.q1_6_lower_bound(small, data)
    assert answer["greatest_difference"] < 1e-6 < 1e-3 < answer["gap_mean"]
    assert answers["q1_6"]["greatest_difference"] < 1e-3 < 0.1 < answers["q1_6"]["gap_mean"]


def test_q1_6_a_bound_can_rise_while_log_p_falls(answers):
    bound, log_p = theory.two_point_bound(0.6, 0.36, q=0.9)
    assert log_p == pytest.approx(math.log(0.48)) and bound < log_p
    assert theory.two_point_bound(0.6, 0.36, q=0.3 / 0.48)[0] == pytest.approx(log_p)  # q is the posterior
    answer = answers["q1_6"]
    assert answer["two_point_elbo_after"] > answer["two_point_elbo_before"]
    assert answer["two_point_nll_after"] > answer["two_point_nll_before"]


def test_q1_8_steps_on_the_encoder_leave_log_p(small, coarse, data, monkeypatch, answers):
    monkeypatch.setattr(theory, "ASCENT_STEPS", 5)
    for answer in (theory.q1_8_steps(small, data), answers["q1_8"]):
        for who in ("nll", "others_nll"):
            assert answer[f"{who}_after_phi"] == pytest.approx(answer[f"{who}_start"], abs=1e-9)
        assert answer["elbo_start"] < answer["elbo_after_phi"] < answer["elbo_after_theta"]
        assert abs(answer["nll_after_theta"] - answer["nll_start"]) > 1e-4
        assert answer["elbo_after_theta"] <= -answer["nll_after_theta"]
        assert answer["others_nll_start"] != answer["nll_start"]
        assert answer["simpler_elbo_before"] == pytest.approx(0.5 * math.log(0.8 * 0.2))
        closed = [answer[f"simpler_{name}"] for name in ("elbo_after", "log_px_after", "log_px_before")]
        assert closed == pytest.approx([math.log(0.5)] * 3)


def test_q1_8_steps_on_the_decoder_overfit(answers):
    answer = answers["q1_8"]
    assert answer["nll_after_theta"] < answer["nll_start"] - 10
    assert answer["others_nll_after_theta"] > answer["others_nll_start"]


def test_q1_9_information_and_aggregate_add_up(small, data, monkeypatch, answers):
    monkeypatch.setattr(theory, "CODES", 500)
    for answer in (theory.q1_9_regulariser(small, data), answers["q1_9"]):
        assert answer["difference"] < 4 * answer["information_se"] + 1e-4 and abs(answer["mass"] - 1) < 1e-4
        assert answer["information_se"] < 0.02 * answer["information"] < 0.02 * answer["log_images"]
        assert answer["aggregate_kl"] > 20 * answer["information_se"]
        assert answer["log_images"] == pytest.approx(math.log(answer["images"]))


def test_q1_10_the_loss_is_what_the_report_spells_out(model, data):
    answer = theory.q1_10_loss(model, data)
    assert answer["greatest_difference"] < 1e-9
    assert answer["wrong_kl"] == pytest.approx(-0.25 - 0.5 * math.log(2))


def test_q1_11_variances_of_the_two_estimators():
    """For mu of ones in d dimensions: 4, and by the moments of a normal 4 d^2 + 14 d + 12; of a sine, by its own."""
    answer = theory.q1_11_gradients()
    for k in theory.FREQUENCIES:
        row, mean = answer.pop(f"sine_{k:g}"), k * math.exp(-(k**2) / 2)
        exact = k**2 / 2 * (1 + math.exp(-2 * k**2)) - mean**2
        assert row["reparameterized_variance"] == pytest.approx(exact, rel=0.05)
        exact = 0.5 - 0.5 * (1 - 4 * k**2) * math.exp(-2 * k**2) - mean**2
        assert row["score_variance"] == pytest.approx(exact, rel=0.05)
    for name, row in answer.items():
        d = int(name[1:])
        for estimator in ("reparameterized", "score"):
            assert abs(row[f"{estimator}_mean"] - 2) < 4 * row[f"{estimator}_mean_se"]
        assert row["reparameterized_variance"] == pytest.approx(4, rel=0.05)
        assert row["score_variance"] == pytest.approx(4 * d**2 + 14 * d + 12, rel=0.1)


def test_q1_13_own_gaussians_are_the_posteriors_of_a_linear_model(monkeypatch):
    """Where the posterior is a diagonal Gaussian, the fitted one is that, and the family loses nothing."""
    monkeypatch.setattr(theory, "FITTING_STEPS", 300)
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.5, -1.0]])

    class Linear:
        z_dim = 3

        def prior(self, z):
            return z, torch.zeros(z.shape[:-1])

        def decode(self, z):
            return z

    def log_prob(x, logits):  # x = z + 0.5 eps
        return theory.normal_log_prob(x, logits, math.log(0.25))

    monkeypatch.setattr(vae, "bernoulli_log_prob", log_prob)
    mu, logvar = theory.own_gaussians(Linear(), x, torch.zeros_like(x), torch.zeros_like(x))
    torch.testing.assert_close(mu, 0.8 * x, rtol=0, atol=0.02)
    torch.testing.assert_close(logvar, torch.full_like(x, math.log(0.2)), rtol=0, atol=0.1)
    exact = theory.normal_log_prob(x, 0.0, math.log(1.25)).double()
    for elbo in (theory.sampled_elbo, theory.sampled_log_px):
        torch.testing.assert_close(elbo(Linear(), x, 0.8 * x, logvar * 0 + math.log(0.2), 50), exact, rtol=0, atol=1e-4)
    prior = theory.sampled_elbo(Linear(), x, torch.zeros_like(x), torch.zeros_like(x), 20_000)
    expected = -0.5 * ((x.square() + 1) / 0.25 + math.log(2 * math.pi * 0.25)).sum(1).double()
    torch.testing.assert_close(prior, expected, rtol=0, atol=0.3)


def test_q1_13_json(answers):
    answer = answers["q1_13"]
    for run in ("vae_z20", "vae_best"):
        parts = answer[run]
        assert parts["gap"] == pytest.approx(parts["gap_family"] + parts["gap_amortisation"])
        assert min(parts["gap_family"], parts["gap_amortisation"]) > 4 * 0.01 and parts["gap"] > 4 * parts["gap_se"]
    assert answer["elbo_start"] == pytest.approx(
        json.loads((ROOT / "figures/vae_z2.json").read_text())["result"]["test_elbo"]
    )
    assert answer["elbo_stopped"] != answer["elbo_plain"]


def test_q2_3_value_is_the_divergence(tmp_path):
    answer = theory.q2_3_value(tmp_path)
    assert answer["greatest_difference"] < 1e-9
    values = list(answer["at"].values())
    assert answer["values"][::4][:3] == pytest.approx(values[:3])  # separations of 0, 1, 2
    assert values[0] == pytest.approx(-math.log(4), abs=1e-9) and -1e-3 < values[-1] < 0
    assert values == sorted(values)
    assert (tmp_path / "theory_value.pdf").exists()


def test_q2_4_gradients_are_those_of_the_losses(tmp_path):
    """Against finite differences in the generator's shift, with D as it is."""

    def loss(shift: float, separation: float, saturating: bool) -> float:
        logit = separation * (theory.LINE + shift) - separation**2 / 2
        density = torch.exp(-0.5 * theory.LINE**2) / math.sqrt(2 * math.pi)
        return theory.integral(density * (-F.softplus(logit) if saturating else F.softplus(-logit)))

    for separation in (0.5, 2.0):
        for saturating, ours in zip((True, False), theory.generator_gradients(separation)):
            slope = (loss(1e-5, separation, saturating) - loss(-1e-5, separation, saturating)) / 2e-5
            assert slope < 0 and ours == pytest.approx(-slope, rel=1e-6)
    answer = theory.q2_4_saturation(tmp_path)
    assert answer["at"]["8"]["saturating"] < 1e-3 < 7 < answer["at"]["8"]["non_saturating"] < 8


def test_q2_7_norms_of_the_paths():
    answer = theory.q2_7_paths()
    assert answer["spherical"] == pytest.approx([answer["ends"]] * 3, rel=0.01)
    assert answer["linear"] == pytest.approx(
        [answer["ends"] * math.hypot(t, 1 - t) for t in (0.25, 0.5, 0.75)], rel=0.01
    )
    # half the sum of two uniform numbers has the density 4u up to 1/2: its normal quantile's mean square, by quadrature
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    mean_square = float((8 * u * torch.special.ndtri(u).square()).mean() / 2)
    assert answer["cdf"][0] == pytest.approx(answer["cdf"][2], rel=0.01) and answer["cdf"][0] < answer["linear"][0]
    assert answer["cdf"][1] == pytest.approx(math.sqrt(100 * mean_square), rel=0.01)


def test_q3_1_running_sum_is_the_determinant(data):
    answer = theory.q3_1_determinant(experiment.committed("nf", nf.build), data)
    assert answer["difference"] < 1e-8 and abs(answer["ladj"]) > 1


def test_q3_3_a_determinant_costs_more_than_in_proportion(answers):
    costs = answers["q3_3"]
    assert costs["d1568"]["dense_ms"] / costs["d196"]["dense_ms"] > 8**1.5
    assert costs["d1568"]["formed_ms"] / costs["d196"]["formed_ms"] > 8
    assert costs["d784"]["triangular_ms"] < 0.1 * costs["d784"]["dense_ms"] < 0.1 * costs["d784"]["formed_ms"]


def test_q3_3_hours_are_the_sum_over_couplings_and_images(monkeypatch, tmp_path):
    def cost(d: int) -> dict[str, float]:
        return {"formed_ms": 0.05 * d, "dense_ms": 0.01 * d, "triangular_ms": 0.1}

    monkeypatch.setattr(theory, "determinant_costs", cost)
    answer = theory.q3_3_cost(built(nf, "--levels", 2, "--couplings", 5, "--hidden", 4), 50_000, tmp_path)
    assert answer["couplings"] == 10 and answer["times_lu"] == pytest.approx(5)
    a_coupling_each = 0.06 * (784 + 392) / 1000  # seconds: the second level has half of the numbers
    assert answer["epoch_hours"] == pytest.approx(5 * a_coupling_each * 50_000 / 3600)


def test_q3_3_what_is_timed_is_what_it_says(monkeypatch):
    monkeypatch.setattr(theory, "milliseconds", lambda function: function())
    costs = theory.determinant_costs(6)
    weight = torch.randn(6, 6, generator=fixed_generator("Jacobian, 6")) / math.sqrt(6)
    jacobian = (1 - torch.tanh(weight @ weight[0]).square()).unsqueeze(1) * weight
    torch.testing.assert_close(costs["formed_ms"], jacobian)
    torch.testing.assert_close(costs["dense_ms"].logabsdet, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(costs["triangular_ms"], torch.linalg.slogdet(jacobian.triu()).logabsdet)


def test_milliseconds_is_a_median(monkeypatch):
    clock = iter([0, 9, 10, 10.004, 20, 20.001, 30, 30.002])
    monkeypatch.setattr(theory.time, "perf_counter", lambda: next(clock))
    assert theory.milliseconds(lambda: None) == pytest.approx(2)


def test_q3_4_uniform_noise_is_honest_and_gaussian_noise_is_not(tmp_path):
    probability = torch.tensor(theory.SOURCE, dtype=torch.float64)
    assert theory.uniform_noise_bits(probability) == pytest.approx(1.75, abs=1e-12)
    for deviation in (0.02, 0.05):  # spikes that do not overlap
        alone = 0.5 * math.log2(2 * math.pi * math.e * deviation**2)
        assert theory.gaussian_noise_bits(probability, deviation) == pytest.approx(1.75 + alone, abs=1e-6)
        at_their_tops = 1.75 + 0.5 * math.log2(2 * math.pi * deviation**2)
        assert theory.spike_bits(probability, deviation) == pytest.approx(at_their_tops, abs=1e-9)
    answer = theory.q3_4_dequantisation(tmp_path)
    assert answer["entropy"] == 1.75 and answer["threshold"] == pytest.approx((2 * math.pi * math.e) ** -0.5)
    assert theory.gaussian_noise_bits(probability, answer["threshold"]) < 1.75 < answer["gaussian"]["at_0.5"]
    assert theory.gaussian_noise_bits(probability, answer["crossing"]) == pytest.approx(1.75, abs=0.01)


def test_q3_4_learned_noise_loses_its_kl():
    answer = theory.q3_4_learned()
    assert answer["greatest_difference"] < 1e-6
    assert 0 < answer["above_learned"] < 0.05 < 1 < answer["above_uniform"]
    assert answer["discrete"] == pytest.approx(1.75, abs=0.01)  # the bumps hardly leave their cells


def test_q3_4_stretched_noise_has_its_density():
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    torch.testing.assert_close(theory.stretched_log_density(u, 1.0), torch.zeros_like(u))
    for scale in (0.4, 0.8):
        density = theory.stretched_log_density(u, scale).exp()
        drawn = torch.sigmoid(scale * torch.logit(u))  # of noise at equal shares
        assert float(density.mean()) == pytest.approx(1, abs=1e-4)
        assert float((density * u.square()).mean()) == pytest.approx(float(drawn.square().mean()), abs=1e-4)


def test_q3_8_yardsticks_are_codes(data):
    """Against plain formulas on few images; a file must hold what it is charged for."""
    few = mnist.Data(data.images[:10_300], data.labels[:10_300], data.test_images[:100], data.test_labels[:100], 10_000)
    train = few.train_images.flatten(1).double()
    assert len(train) > 100
    answer = theory.q3_8_yardsticks(few)
    x, _ = vae.evaluation_set(few.test_images, "test", 2)
    p = ((train / 255).sum(0) + 0.5) / (len(train) + 1)
    expected = F.binary_cross_entropy(p.expand(100, -1), x.double(), reduction="none").sum(1).mean()
    assert answer["pixels_nll"] == pytest.approx(float(expected))
    place = 28 * 14 + 14  # one pixel's histogram, by hand
    total = 0.0
    for m in (place, place + 1):
        values = train[:, m].tolist()
        for value in few.test_images.flatten(1)[:, m].tolist():
            total -= math.log2((values.count(value) + 1) / (len(values) + 256))
    columns = dataclasses.replace(few)
    for name in ("images", "test_images"):
        middle = getattr(few, name).flatten(1)[:, place : place + 2]
        object.__setattr__(columns, name, torch.zeros_like(getattr(few, name)))
        getattr(columns, name).flatten(1)[:, place : place + 2] = middle
    constant = -math.log2((len(train) + 1) / (len(train) + 256)) * 782
    assert theory.q3_8_yardsticks(columns)["pixels_bpd"] == pytest.approx((total / 100 + constant) / 784)
    blank = dataclasses.replace(few, test_images=torch.zeros(100, 28, 28, dtype=torch.uint8))
    noise = dataclasses.replace(few, test_images=torch.randint(256, (100, 28, 28), dtype=torch.uint8))
    for name in ("png_bpd", "gzip_bpd"):
        assert theory.q3_8_yardsticks(blank)[name] < 0.05 < 0.5 < answer[name] < 3
        assert theory.q3_8_yardsticks(noise)[name] == pytest.approx(8, rel=0.02)


def test_the_pyramid_is_the_flows():
    levels = theory.pyramid(8, 4)
    assert [[int((state == which).sum()) for which in (0, 1, 2)] for state in levels] == [
        [32, 32, 0], [16, 16, 32], [8, 8, 48], [4, 4, 56]
    ]  # fmt: skip
    first = torch.from_numpy(levels[0])
    assert (first[1:] != first[:-1]).all() and (first[:, 1:] != first[:, :-1]).all()  # a checkerboard
    for state, after in itertools.pairwise(levels):
        assert ((state > 0) == (after == 2)).all()  # what is transformed is done


def test_all_of_it_runs(data, data_dir, tmp_path, coarse, monkeypatch, answers):
    """Every function, with fewer of everything and small models."""
    few = dataclasses.replace(data, images=data.images[:2000], test_images=data.test_images[:500], validation=400)
    monkeypatch.setattr(mnist, "load", lambda *_: few)
    fewer = {
        "AUTOENCODER_EPOCHS": 1, "RING_STEPS": 50, "POSTERIOR_IMAGES": 5, "POSTERIOR_DRAWS": 50, "ASCENT_STEPS": 1,
        "CODES": 100, "GRID_POINTS": 60, "AGGREGATE_POINTS": 61, "SIZES": (98, 196, 392, 784), "WINDOW_POINTS": 9,
        "AUTOENCODER_IMAGES": 400, "MODE_POINTS": 61, "WORST": 2, "GAP_IMAGES": 4, "GAP_DRAWS": 20, "FITTING_STEPS": 2,
        "ENCODER_STEPS": 2,
        "DRAWS": 50, "REPEATS": 20, "elbo_by_nodes": functools.partial(theory.elbo_by_nodes, nodes=9),
        "posterior_kl": functools.partial(theory.posterior_kl, points=21),
    }  # fmt: skip
    for name, value in fewer.items():
        monkeypatch.setattr(theory, name, value)
    small = {"vae_z2": built(vae, "--z-dim", 2, "--hidden", 8), "nf": built(nf, "--hidden", 4, "--couplings", 1)}
    small |= {"vae_z20": built(vae, "--hidden", 8), "vae_best": built(vae, "--prior", "flow", "--hidden", 8)}
    monkeypatch.setattr(experiment, "committed", lambda name, build: small[name])
    monkeypatch.setattr(judge, "JUDGED", 500)
    monkeypatch.setattr(theory.pictures, "STYLE", {})
    assert theory.main(["--out", str(tmp_path), "--data-dir", str(data_dir)]) == 0
    written = json.loads((tmp_path / "figures" / "theory.json").read_text())
    assert list(written) == list(answers)
    assert written["q1_1"]["d2"]["autoencoder"] != written["q1_1"]["d2"]["vae"]
    assert written["q1_13"]["elbo_stopped"] != written["q1_13"]["elbo_plain"]
    pictures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert pictures == {path.name for path in (ROOT / "figures").glob("theory*")}
    assert all(b"Cmr10" in path.read_bytes() for path in (tmp_path / "figures").glob("*.pdf"))  # the report's type


def test_no_weights_name_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert theory.main(["--out", str(tmp_path)]) == 2
    assert "git checkout weights/vae_z2.pt" in capsys.readouterr().err


def test_the_report_quotes_every_answer(answers):
    report = (ROOT / "report" / "report.tex").read_text()
    missing = [key for key in answers if key.startswith("q") and f"{{theory.{key}." not in report]
    assert not missing
