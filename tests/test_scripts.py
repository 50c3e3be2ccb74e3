"""Each script as its users run it, on the real MNIST: a short run, and runs that are killed and resumed."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, SCRIPTS, contents, run_script

FEWER_IMAGES = """
import dataclasses
load = mnist.load
def fewer(*args):
    data = load(*args)
    return dataclasses.replace(data, images=data.images[:12_000])
mnist.load = fewer
"""
FAR_FEWER_IMAGES = """
import dataclasses, torch
load = mnist.load
def fewer(*args):
    data = load(*args)
    images = torch.cat((data.images[:2000], data.images[-500:]))
    return dataclasses.replace(data, images=images, test_images=data.test_images[:500])
mnist.load, mnist.TRAIN = fewer, 2000
"""
SHORT = {  # flags of a run of seconds, and what makes its epochs or its evaluation quick
    "vae": (
        ["--z-dim", 2, "--epochs", 2, "--batch-size", 1000, "--importance-samples", 2],
        "import judge; vae.QUADRATURE_POINTS, judge.JUDGED = 21, 1000",
    ),
    "gan": (["--epochs", 2, "--batch-size", 500], f"import judge; judge.JUDGED = 1000{FEWER_IMAGES}"),
    "nf": (
        ["--epochs", 2, "--batch-size", 50],
        f"import judge; judge.JUDGED = 100; experiment.seconds_per_1000 = lambda *_: 0.0{FAR_FEWER_IMAGES}",
    ),
}
RUNS = {"vae": "vae_z2", "gan": "gan", "nf": "nf"}

INSIDE_AN_EPOCH = """
draw, begin = mnist.batches, experiment.Run.start
def start(self, **parts):
    global run
    run = self
    begin(self, **parts)
experiment.Run.start = start
def batches(*args):
    for number, index in enumerate(draw(*args)):
        if run.epoch == 2 and number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield index
mnist.batches = batches
"""
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


def lasting(folder) -> dict[str, object]:
    """What a run leaves but for its checkpoint, and the JSON without its times and what depends on them."""
    files = {name: content for name, content in contents(folder).items() if not name.startswith("checkpoints/")}
    for name in files:
        if name.endswith(".json"):
            content = json.loads(files[name])
            del content["environment"]
            for row in content["history"]:
                del row["seconds"]
                row.pop("early_seconds", None)
            for key in ("train_seconds", "peak_memory_mib", "seconds_per_1000_samples"):
                del content["result"][key]
            files[name] = content
    return files


def test_no_script_is_missing():
    """Every script that trains a model, which is one that asks for the common flags, is in the list."""
    training = {path.stem for path in (ROOT / "code").glob("*.py") if "experiment.add_flags(" in path.read_text()}
    assert training == set(SCRIPTS) == set(SHORT) == set(RUNS)


@pytest.fixture(scope="module", params=SCRIPTS)
def reference(request, data_dir, tmp_path_factory):
    """A script's name and the folder of a short run that was left alone."""
    script, out = request.param, tmp_path_factory.mktemp(request.param)
    flags, patch = SHORT[script]
    done = run_script(script, *flags, "--out", out, patch=patch)
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all(line.startswith(RUNS[script]) for line in lines), done.stderr
    return script, out


def test_a_short_run_learns(reference):
    script, out = reference
    content = json.loads((out / "figures" / f"{RUNS[script]}.json").read_text())
    first, *_, last = content["history"]
    if script == "vae":
        assert -550 < first["val_elbo"] < -540
        assert last["val_elbo"] > -200
        assert content["result"]["test_nll"] < -content["result"]["test_elbo"]
    if script == "gan":
        assert first["loss_d"] == pytest.approx(math.log(4), abs=0.05)
        assert first["loss_g"] == pytest.approx(math.log(2), abs=0.05)
        assert last["loss_d"] < math.log(4) < first["loss_d"] and last["d_real"] > last["d_fake"]
        checkpoint = torch.load(out / "checkpoints" / "gan.pt", weights_only=True)
        grey = [float(images.float().mean()) for images in checkpoint["frames"]["samples"].values()]
        assert grey[0] > 120 and grey[-1] < 60  # the training images' mean is 33
        assert sum(content["result"]["class_counts"]) == 1000
    if script == "nf":
        assert first["val_bpd"] > 4 and last["val_bpd"] < 2.5
        assert content["result"]["test_bpd_iw"] < content["result"]["test_bpd"] < 2.5
        assert sum(content["result"]["class_counts"]) == 100


@pytest.mark.parametrize(
    "patch",
    [INSIDE_AN_EPOCH, WHILE_IT_WRITES.format(write=3), WHILE_IT_WRITES.format(write=7)],
    ids=["inside an epoch", "while it writes a checkpoint", "while it writes a picture"],
)
def test_a_killed_run_goes_on_to_the_same_bytes(reference, tmp_path, patch):
    script, out = reference
    flags, quick = SHORT[script]
    run_script(script, *flags, "--out", tmp_path, patch=quick + patch, check=-9)
    assert not (tmp_path / "figures" / f"{RUNS[script]}.json").exists()
    assert (tmp_path / "checkpoints" / f"{RUNS[script]}.pt").exists()
    run_script(script, *flags, "--out", tmp_path, "--resume", patch=quick)
    assert lasting(tmp_path) == lasting(out)


def test_pictures_are_redrawn_without_training(reference, tmp_path):
    """--evaluate draws all of them from the JSON, the weights and the checkpoint; without that one, not the panels."""
    script, out = reference
    flags, quick = SHORT[script]
    for checkpoints in (True, False):
        again = tmp_path / str(checkpoints)
        shutil.copytree(out, again)
        pictures = {path for path in (again / "figures").iterdir() if path.suffix != ".json"}
        for path in pictures:
            path.unlink()
        if not checkpoints:
            shutil.rmtree(again / "checkpoints")
        run_script(script, *flags, "--out", again, "--evaluate", patch=quick)
        redrawn = {path for path in (again / "figures").iterdir() if path.suffix != ".json"}
        earlier = {path for path in pictures if re.search(r"epoch0+[01]\.|gif$", path.name)}  # of epochs 0 and 1 of 2
        assert redrawn == pictures if checkpoints else redrawn == pictures - earlier
        assert earlier
        assert all(path.read_bytes() == (out / "figures" / path.name).read_bytes() for path in redrawn)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_quiet(script, tmp_path):
    """No slow import, no work at import: --help stays clear of torchvision and matplotlib, from any folder."""
    begin = time.perf_counter()
    command = [sys.executable, "-X", "importtime", str(ROOT / "code" / f"{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--resume" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torchvision", "matplotlib", "PIL", "scipy"}
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    """A flag that the parser knows is used somewhere as args.<flag>."""
    source = "".join((ROOT / "code" / name).read_text() for name in (f"{script}.py", "experiment.py"))
    read = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args", "run.args")
    }
    module = __import__(script)
    assert set(vars(module.flags().parse_args([]))) <= read
