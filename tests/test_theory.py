"""The answers that are checked by computation, within their tolerances."""

import json

import pytest
import torch

import mnist
import theory
import vae
from conftest import ROOT


@pytest.fixture(scope="module")
def model() -> vae.VAE:
    """The trained z = 2 VAE."""
    trained = vae.VAE(2)
    trained.load_state_dict(torch.load(ROOT / "weights" / "vae_z2.pt", weights_only=True)["model"])
    return trained


@pytest.fixture(scope="module")
def x(data_dir) -> torch.Tensor:
    data = mnist.load("mnist", data_dir)
    return vae.evaluation_set(data.test_images, "test", 2)[0][:100]


def test_q1_4_quadrature_has_converged(model, x):
    exact = vae.quadrature_log_px(model, x[:10], vae.QUADRATURE_POINTS)
    torch.testing.assert_close(exact, vae.quadrature_log_px(model, x[:10], 1001), rtol=0, atol=1e-3)


def test_q1_4_the_gap_is_the_encoders(model, x):
    """With half of the draws from the prior, importance sampling agrees with quadrature; else it does not."""
    exact = vae.quadrature_log_px(model, x, 401)
    defensive = theory.defensive_log_px(model, x, draws=4000)
    assert abs((exact - defensive).mean()) < 0.1
    sampled = vae.importance_sampled_log_px(model, x, draws=100)
    assert (exact - sampled).mean() > 0.5 and abs((exact - sampled).median()) < 0.3


def test_the_answers_are_about_the_committed_weights():
    theirs = json.loads((ROOT / "figures" / "vae_z2.json").read_text())["weights_sha256"]
    assert json.loads((ROOT / "figures" / "theory.json").read_text())["vae_z2_sha256"] == theirs


def test_q1_4_json():
    answer = json.loads((ROOT / "figures" / "theory.json").read_text())["q1_4"]
    assert answer["nll_from_q"] > answer["nll_quadrature"] + 1
    assert answer["nll_from_q_and_prior"] == pytest.approx(answer["nll_quadrature"], abs=0.1)
    assert answer["gap_median"] < 0.1 < answer["gap_percentile_90"] < 10 < answer["gap_percentile_99"]


def test_no_weights_name_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory.experiment, "ROOT", tmp_path)
    assert theory.main(["--out", str(tmp_path)]) == 2
    assert "code/vae.py --z-dim 2" in capsys.readouterr().err
