"""Each script as its users run it, on the real MNIST: a short run, and runs that are killed and resumed."""

import importlib
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import KILLED, ROOT, RUNS, contents, lasting, result_of, run_script

FEWER = """
import dataclasses, functools, os, signal
import experiment, gan, judge, mnist, nf, torch, vae
load = mnist.load
def fewer(*args):
    data = load(*args)
    images = torch.cat((data.images[:2000], data.images[-500:]))
    return dataclasses.replace(data, images=images, test_images=data.test_images[:500], validation=500)
mnist.load, judge.JUDGED, gan.PROBE = fewer, 100, 100
vae.quadrature_log_px = functools.partial(vae.quadrature_log_px, points=21)
for script in (vae, gan, nf):
    script.seconds_per_1000 = lambda *_: 0.0
"""
SHORT = {  # run -> flags that make it one of seconds
    "vae": "--z-dim 2 --epochs 2 --batch-size 25 --hidden 128 --prior flow --couplings 2 --importance-samples 2",
    "gan": "--epochs 2 --batch-size 50 --growth 2 --decay 0.9 --settling 500 --fresh-epochs 2",
    "nf": "--epochs 2 --batch-size 25 --hidden 8 --couplings 1 --components 2 --importance-samples 2",
}
NAMES = {**RUNS, "vae": "vae_z2"}

WHILE_IT_WRITES = """
sync, calls = os.fsync, []
def half_written(descriptor):
    calls.append(descriptor)
    if len(calls) == {write}:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = half_written
"""


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """Runs a script with the flags of its short run and some others; what it says on standard error."""

    def short(script: str, out, *flags: str, patch: str = "", check: int = 0) -> str:
        said = tmp_path_factory.mktemp("said")
        flags = (*SHORT[script].split(), "--data-dir", data_dir, "--out", out, *flags)
        return run_script(script, *flags, output=said, patch=FEWER + patch, check=check)[1]

    return short


@pytest.fixture(scope="module", params=RUNS)
def reference(request, run, tmp_path_factory):
    """A script's name and the folder of a short run that was left alone."""
    script, out = request.param, tmp_path_factory.mktemp(request.param)
    lines = run(script, out).splitlines()
    assert len(lines) == 3 and all(line.startswith(NAMES[script]) for line in lines), lines
    return script, out


def test_a_short_run_learns(reference):
    script, out = reference
    content = result_of(out, NAMES[script])
    first, *_, last = content["history"]
    if script == "vae":
        assert -560 < first["val_elbo"] < -540
        assert last["val_elbo"] > -205
        assert content["result"]["test_nll"] < -content["result"]["test_elbo"]
    if script == "gan":
        assert first["loss_d"] == pytest.approx(math.log(4), abs=0.05)
        assert first["loss_g"] == pytest.approx(math.log(2), abs=0.05)
        assert last["loss_d"] < math.log(4) < first["loss_d"] and last["d_real"] > last["d_fake"]
        checkpoint = torch.load(out / "checkpoints" / "gan.pt", weights_only=True)
        assert last["val_fid"] < first["val_fid"]
        fresh = content["result"]["fresh_discriminator"]
        assert fresh["loss"][0] == pytest.approx(math.log(4), abs=0.05) and fresh["loss"][-1] < math.log(4)
        grey = [float(images.float().mean()) for images in checkpoint["frames"].values()]
        assert grey[0] > 120 and grey[-1] < 60  # the training images' mean is 33
    if script == "nf":
        assert first["val_bpd"] > 4 and last["val_bpd"] < 3.6
        assert content["result"]["test_bpd_iw"] < content["result"]["test_bpd"] < 3.6
    assert sum(content["result"]["class_counts"]) == 100


def test_a_config_is_every_flag_but_the_machines(reference):
    script, out = reference
    args = vars(importlib.import_module(script).flags().parse_args(SHORT[script].split()))
    shaping = args.keys() - {"best", "device", "data_dir", "out", "resume", "evaluate", "sample", "temperature"}
    assert len(args) - len(shaping) == 6 + ("best" in args) + ("temperature" in args)
    config = {name: args[name] for name in shaping}
    assert result_of(out, NAMES[script])["config"] == config
    for folder in ("weights", "checkpoints"):
        assert torch.load(out / folder / f"{NAMES[script]}.pt", weights_only=True)["config"] == config


@pytest.mark.parametrize(
    "patch",
    [
        KILLED.format(at=(2, 7, 0), signal="SIGKILL"),
        WHILE_IT_WRITES.format(write=3),
        WHILE_IT_WRITES.format(write=7),
    ],
    ids=["inside an epoch", "while it writes a checkpoint", "while it writes a picture"],
)
def test_a_killed_run_goes_on_to_the_same_bytes(reference, run, tmp_path, patch):
    script, out = reference
    run(script, tmp_path, patch=patch, check=-9)
    assert not (tmp_path / "figures" / f"{NAMES[script]}.json").exists()
    assert (tmp_path / "checkpoints" / f"{NAMES[script]}.pt").exists()
    run(script, tmp_path, "--resume")
    assert lasting(tmp_path) == lasting(out)


def test_pictures_are_redrawn_without_training(reference, run, tmp_path):
    """--evaluate draws from the weights and the JSON's history what they hold: all but the panels before the last."""
    script, out = reference
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    pictures = {path for path in (tmp_path / "figures").iterdir() if path.suffix != ".json"}
    for path in pictures:
        path.unlink()
    assert not run(script, tmp_path, "--evaluate")
    redrawn = {path for path in (tmp_path / "figures").iterdir() if path.suffix != ".json"}
    assert redrawn == {path for path in pictures if not re.search(r"epoch0+[01]\.|gif$", path.name)} < pictures
    assert all(path.read_bytes() == (out / "figures" / path.name).read_bytes() for path in redrawn)


def test_python_vae_py_as_a_user_types_it(data_dir, tmp_path):
    """From another folder, to its end, on all of MNIST and with the judge."""
    command = [sys.executable, ROOT / "code" / "vae.py", "--out", "here", "--device", "cpu"]
    flags = ["--epochs", "1", "--batch-size", "1000", "--hidden", "64", "--importance-samples", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and len(done.stderr.splitlines()) == 2, done.stderr
    content = result_of(tmp_path / "here", "vae_z20")
    assert content["history"][1]["val_elbo"] > -250 and sum(content["result"]["class_counts"]) == 10_000
    pictures = {"elbo.png", "elbo.pdf", "samples_epoch00.png", "samples_epoch01.png", "draws.png"}
    files = {f"figures/vae_z20_{name}" for name in pictures | {"reconstructions.png"}} | {"figures/vae_z20.json"}
    assert set(contents(tmp_path / "here")) == files | {"weights/vae_z20.pt", "checkpoints/vae_z20.pt"}


def test_help_is_quiet_and_imports_little(tmp_path):
    """No slow import, no work at import: --help stays clear of torchvision and matplotlib, from any folder."""
    program = f"""
import runpy, sys
for script in {[*RUNS]}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path({str(ROOT / "code")!r} + f"/{{script}}.py", run_name="__main__")
    except SystemExit as error:
        assert not error.code
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.count("--resume ") >= 3 and not done.stderr, done.stderr
    assert not {"torchvision", "matplotlib", "PIL", "scipy"} & set(done.stdout.splitlines()[-1].split())
    assert not contents(tmp_path)
