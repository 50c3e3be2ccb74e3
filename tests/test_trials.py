"""The trials change what they say they change, and are judged against validation."""

import json

import pytest
import torch

import gan
import judge
import trials


@pytest.fixture
def few(tiny, monkeypatch):
    """One epoch of a small batch on the small data, an untrained judge that notes what it is shown."""
    references = []
    verdict = judge.verdict

    def note(model, images, reference):
        references.append(reference)
        return verdict(model, images, reference)

    monkeypatch.setattr(judge, "load", lambda device: judge.Judge())
    monkeypatch.setattr(judge, "verdict", note)
    monkeypatch.setattr(trials, "EPOCHS", 1)
    small = {
        key: (changed, [*own, "--batch-size", "50"], constants)
        for key, (changed, own, constants) in trials.TRIALS.items()
        if key in ("as_it_is", "betas_default", "lr_half", "init_normal")
    }
    monkeypatch.setattr(trials, "TRIALS", small)
    return tiny, references


def test_trials_differ_in_what_they_say(few, tmp_path, capsys):
    data, references = few
    before = gan.BETAS
    assert trials.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    assert before == gan.BETAS and gan.GAN is not trials.NarrowGAN
    content = json.loads((tmp_path / "figures" / "trials.json").read_text())
    results = content["gan"]
    assert list(results) == ["as_it_is", "betas_default", "init_normal", "lr_half"]
    base = results["as_it_is"]["config"]
    changed = {
        key: {name: value for name, value in each["config"].items() if value != base.get(name)}
        for key, each in results.items()
    }
    assert changed["betas_default"] == {"BETAS": "(0.9, 0.999)"} and changed["lr_half"] == {"lr": 2.5e-4}
    assert len({each["fid"] for each in results.values()}) == len(results)
    assert len(references) == 2 * len(results)
    assert all(torch.equal(each, data.validation_images) for each in references)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5] == judge.HEAD and lines[-3].endswith("Adam's default")


def test_narrow_weights_are_narrow_in_the_average_too():
    torch.manual_seed(0)
    model = trials.NarrowGAN()
    for network in (model.generator, model.discriminator, model.average):
        weights = [layer.weight for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
        assert all(abs(weight.std() - 0.02) < 0.002 for weight in weights)
    assert all(torch.equal(*pair) for pair in zip(model.generator.parameters(), model.average.parameters()))
