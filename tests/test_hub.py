"""Every model through torch.hub, from a clone, beside a user's own modules."""

import copy
import importlib.util
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

MODELS = ("vae_z20", "vae_z2", "vae_best", "gan", "nf", "nf_best", "judge")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of what is committed, with the hub's file as it is here."""
    folder = tmp_path_factory.mktemp("hub") / "clone"
    subprocess.run(["git", "clone", "-q", "--shared", ROOT, folder], check=True)
    for path in (ROOT / "hubconf.py", *(ROOT / "code").glob("*.py")):
        (folder / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    return folder


def test_it_lists_the_models_and_nothing_else():
    """`torch.hub.list` shows whatever can be called."""
    specification = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hubconf)
    entries = {name for name, each in vars(hubconf).items() if callable(each) and not name.startswith("_")}
    assert entries == {*MODELS} and all(getattr(hubconf, name).__doc__ for name in entries)
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_loads_and_samples(clone, name):
    model = torch.hub.load(str(clone), name, source="local")
    assert not any(each.training for each in model.modules())
    weights = torch.load(clone / "weights" / f"{name}.pt", weights_only=True)["model"]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    if name == "judge":
        assert model(torch.zeros(2, 28, 28, dtype=torch.uint8))[1].shape == (2, 10)
        return
    images = model.sample(16)
    assert images.shape == (16, 28, 28) and images.dtype == torch.uint8 and 10 < images.float().mean() < 60
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert not torch.equal(copied.sample(16), images) and torch.equal(model.sample(16), images)
    untrained = torch.hub.load(str(clone), name, source="local", pretrained=False)
    assert untrained.state_dict().keys() == weights.keys() and not untrained.training
    assert not torch.equal(untrained.sample(16), images)


def test_a_users_modules_of_the_same_names_are_not_disturbed(clone):
    modules = {name: importlib.import_module(name) for name in ("vae", "training", "cli")}
    path = [*sys.path]
    model = torch.hub.load(str(clone), "vae_z2", source="local")
    assert not isinstance(model, modules["vae"].VAE)  # the clone's
    assert all(sys.modules[name] is module for name, module in modules.items()) and sys.path == path
