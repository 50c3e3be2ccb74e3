"""Every answer checked by computation, within its tolerance; what takes long by its JSON or on a small model."""

import dataclasses
import functools
import inspect
import json
import math
import re
import subprocess

import pytest
import torch
import torch.nn.functional as F

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
    return theory.trained("vae_z2", vae.build)


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
    assert sum(answers["seconds"].values()) < 300
    for run in ("vae_z2", "nf", "judge"):
        path = ROOT / "figures" / f"{run}.json"
        untouched = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", path], cwd=ROOT, capture_output=True)
        if untouched.returncode == 0:  # a run that was made again here is ahead of `make theory`
            assert answers[f"{run}_sha256"] == json.loads(path.read_text())["weights_sha256"]


def test_q1_1_an_autoencoder_reconstructs_and_does_not_generate(answers):
    answer = answers["q1_1"]
    assert answer["autoencoder_reconstruction"] < answer["vae_reconstruction"]
    assert answer["autoencoder_fid"] > answer["vae_fid"]
    assert answer["autoencoder_code_deviation"] > 2 * answer["vae_code_deviation"]
    assert answer["autoencoder_commonest"] > answer["vae_commonest"]


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


def test_q1_4_the_gap_is_the_encoders(model, data):
    """With half of the draws from the prior, importance sampling agrees with quadrature; else it does not."""
    x, _ = (part[:100] for part in vae.evaluation_set(data.test_images, "test", 2))
    exact = vae.quadrature_log_px(model, x, 301)
    defensive = theory.defensive_log_px(model, x, draws=4000)
    assert abs((exact - defensive).mean()) < 0.1
    sampled = vae.importance_sampled_log_px(model, x, draws=100)
    assert (exact - sampled).mean() > 0.5 and abs((exact - sampled).median()) < 0.3


def test_q1_4_json(answers):
    answer = answers["q1_4"]
    assert answer["nll_from_q"] > answer["nll_quadrature"] + 1
    assert answer["nll_from_q_and_prior"] == pytest.approx(answer["nll_quadrature"], abs=0.1)
    assert answer["gap_median"] < 0.1 < answer["gap_percentile_90"] < 10 < answer["gap_percentile_99"]


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
        assert answer["nll_after_phi"] == pytest.approx(answer["nll_start"], abs=1e-9)
        assert answer["elbo_start"] < answer["elbo_after_phi"] < answer["elbo_after_theta"]
        assert abs(answer["nll_after_theta"] - answer["nll_start"]) > 1e-4
        assert answer["elbo_after_theta"] <= -answer["nll_after_theta"]


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
    """For mu of ones in d dimensions: 4, and by the moments of a normal 4 d^2 + 14 d + 12."""
    for name, row in theory.q1_11_gradients().items():
        d = int(name[1:])
        for estimator in ("reparameterized", "score"):
            assert abs(row[f"{estimator}_mean"] - 2) < 4 * row[f"{estimator}_mean_se"]
        assert row["reparameterized_variance"] == pytest.approx(4, rel=0.05)
        assert row["score_variance"] == pytest.approx(4 * d**2 + 14 * d + 12, rel=0.1)


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
    answer = theory.q3_1_determinant(theory.trained("nf", nf.build), data)
    assert answer["difference"] < 1e-8 and abs(answer["ladj"]) > 1


def test_q3_3_a_determinant_costs_more_than_in_proportion(answers):
    costs = answers["q3_3"]
    assert costs["d1568"]["dense_ms"] / costs["d196"]["dense_ms"] > 8**1.5
    assert costs["d1568"]["formed_ms"] / costs["d196"]["formed_ms"] > 8
    assert costs["d784"]["triangular_ms"] < 0.1 * costs["d784"]["dense_ms"] < 0.1 * costs["d784"]["formed_ms"]


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


def test_all_of_it_runs(data, data_dir, tmp_path, coarse, monkeypatch, answers):
    """Every function, with fewer of everything and small models."""
    few = dataclasses.replace(data, images=data.images[:2000], test_images=data.test_images[:500], validation=400)
    monkeypatch.setattr(mnist, "load", lambda *_: few)
    fewer = {
        "AUTOENCODER_EPOCHS": 1, "RING_STEPS": 50, "POSTERIOR_IMAGES": 5, "POSTERIOR_DRAWS": 50, "ASCENT_STEPS": 1,
        "CODES": 100, "GRID_POINTS": 60, "AGGREGATE_POINTS": 61, "SIZES": (5, 10), "WINDOW_POINTS": 9,
        "DRAWS": 50, "REPEATS": 20, "elbo_by_nodes": functools.partial(theory.elbo_by_nodes, nodes=9),
        "posterior_kl": functools.partial(theory.posterior_kl, points=21),
    }  # fmt: skip
    for name, value in fewer.items():
        monkeypatch.setattr(theory, name, value)
    small = {"vae_z2": built(vae, "--z-dim", 2, "--hidden", 8), "nf": built(nf, "--hidden", 4, "--couplings", 1)}
    monkeypatch.setattr(theory, "trained", lambda name, build: small[name])
    monkeypatch.setattr(judge, "JUDGED", 500)
    assert theory.main(["--out", str(tmp_path), "--data-dir", str(data_dir)]) == 0
    written = json.loads((tmp_path / "figures" / "theory.json").read_text())
    assert list(written) == list(answers)
    assert written["q1_1"]["autoencoder_reconstruction"] != written["q1_1"]["vae_reconstruction"]
    pictures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert pictures == {path.name for path in (ROOT / "figures").glob("theory*")}


def test_no_weights_name_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, "ROOT", tmp_path)
    assert theory.main(["--out", str(tmp_path)]) == 2
    assert "python code/vae.py --z-dim 2" in capsys.readouterr().err


def test_the_report_quotes_every_answer(answers):
    report = (ROOT / "report" / "report.tex").read_text()
    missing = [key for key in answers if key.startswith("q") and f"{{theory.{key}." not in report]
    assert not missing
