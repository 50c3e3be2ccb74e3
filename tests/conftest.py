"""What several test files use: the real MNIST, a small stand-in for it, and scripts run here or elsewhere."""

import fcntl
import functools
import importlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cli
import experiment
import judge
import mnist

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"vae": "vae_z20", "gan": "gan", "nf": "nf"}  # every model's script; test_scripts checks that none is missing
SMALL = {  # a script -> flags of a small model that is trained within a second, on the data of `tiny`
    script: f"--epochs 2 {flags}".split()
    for script, flags in {
        "vae": "--batch-size 50 --hidden 32 --importance-samples 2",
        "gan": "--batch-size 60 --growth 2 --settling 1500 --fresh-epochs 2",
        "nf": "--batch-size 50 --hidden 5 --levels 2 --couplings 1 --components 2 --importance-samples 2",
    }.items()
}
VERDICT = {"fid", "precision", "recall", "class_counts"}
COSTS = {"parameters", "train_seconds", "peak_memory_mib", "seconds_per_1000_samples"}

# Python that, run before a script's main, ends it at an (epoch, step, process) by a signal, and says when.
KILLED = """
import os, signal, time
import cli, experiment
steps = experiment.Run.steps
def killed(self, epoch, *rest):
    for number, each in enumerate(steps(self, epoch, *rest)):
        if (epoch, number, cli.rank()) == {at}:
            cli.say(f"killed at {{time.time()}}")
            os.kill(os.getpid(), signal.{signal})
        yield each
experiment.Run.steps = killed
"""

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it, which the scripts respect
FORKS = multiprocessing.get_context("forkserver")  # processes start as forks of one that has imported everything
FORKS.set_forkserver_preload(["conftest", *RUNS, "torch._dynamo", "matplotlib.backends.backend_pdf"])
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(str(ROOT / each) for each in ("code", "tests"))}


def pytest_xdist_auto_num_workers(config) -> int:
    """As many workers, of one thread each, as there are cores; none but this process for a single test."""
    return 0 if any("::" in each for each in config.args) else min(4, os.cpu_count() or 1)


def pytest_collection_modifyitems(items) -> None:
    """The files that take longest come first, so that the workers finish together."""
    longest = ["test_bench", "test_theory", "test_judge", "test_explorer", "test_scripts"]
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else -1, reverse=True)


# Data


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real MNIST, fetched if it is not there yet."""
    folder = ROOT / "data"
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock.tmp", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker fetches, the others wait
        mnist.load("mnist", folder)
    return folder


@pytest.fixture(scope="session")
def data(data_dir) -> mnist.Data:
    """The real MNIST."""
    return mnist.load("mnist", data_dir)


def shrink(patch: pytest.MonkeyPatch) -> mnist.Data:
    """From now on every script sees 600 random images instead of 60,000, 100 for testing; judges 200 and times 10."""
    generator = torch.Generator().manual_seed(0)
    images, test = (torch.randint(256, (n, 28, 28), generator=generator, dtype=torch.uint8) for n in (600, 100))
    data = mnist.Data(images, torch.arange(600) % 10, test, torch.arange(100) % 10, validation=100)

    def load(dataset: str, data_dir: object, device: torch.device | str = "cpu") -> mnist.Data:
        return mnist.Data(
            **{name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in vars(data).items()}
        )

    def seconds_per_10(sample, of: torch.device) -> float:
        return experiment.seconds_per_1000(lambda n: sample(n // 100), of)

    for module, name, value in ((judge, "JUDGED", 200), (mnist, "load", load)):
        patch.setattr(module, name, value)
    patch.setattr(importlib.import_module("gan"), "PROBE", 150)
    for script in RUNS:
        patch.setattr(importlib.import_module(script), "seconds_per_1000", seconds_per_10)
    return data


@pytest.fixture
def tiny(monkeypatch) -> mnist.Data:
    """`shrink` for one test: for what does not depend on the data."""
    return shrink(monkeypatch)


# Runs


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished small run of a script: one for all tests of this process, and no test changes it."""

    @functools.cache
    def run(script: str) -> Path:
        out = tmp_path_factory.mktemp(script)
        with pytest.MonkeyPatch.context() as patch:
            shrink(patch)
            assert importlib.import_module(script).main([*SMALL[script], "--out", str(out)]) == 0
        assert result_of(out, RUNS[script])["result"].keys() >= VERDICT  # not made while a test patches the judge
        return out

    return run


def built(module: ModuleType, *flags: object) -> torch.nn.Module:
    """A script's model with these flags, untrained."""
    return module.build(cli.settings(module.flags().parse_args([*map(str, flags)])))


def result_of(out: Path, run: str) -> dict:
    """The JSON that a run left."""
    return json.loads((out / "figures" / f"{run}.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes, but for what a killed run had not finished writing."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def lasting(folder: Path) -> dict[str, object]:
    """What a run leaves but for its checkpoint, and the JSON without its times and what depends on them."""
    files = {name: content for name, content in contents(folder).items() if not name.startswith("checkpoints/")}
    for name in files:
        if name.endswith(".json"):
            files[name] = content = json.loads(files[name])
            for row in (content, content["result"], *content["history"]):
                for key in ("environment", "peak_memory_mib", *(key for key in row if "seconds" in key)):
                    row.pop(key, None)
    return files


@pytest.fixture(autouse=True)
def _results_are_safe(monkeypatch, tmp_path):
    """No test in this process writes into the repository's own folders."""
    monkeypatch.setattr(experiment, "ROOT", tmp_path / "repository")


# Scripts in processes of their own


def _main(script: str, flags: list[str], patch: str, output: Path) -> None:
    sys.stdout, sys.stderr = ((output / name).open("w", buffering=1) for name in ("stdout", "stderr"))
    module = importlib.import_module(script)
    exec(patch, {script: module})
    sys.exit(module.main(flags))


def run_script(script: str, *flags: object, output: Path, patch: str = "", check: int = 0) -> tuple[str, str]:
    """A script's main with these flags in a process of its own, after the Python in `patch`; asserts its status.

    Returns what it wrote to standard output and to standard error, by way of files in the folder `output`.
    """
    output.mkdir(exist_ok=True)
    process = FORKS.Process(target=_main, args=(script, [*map(str, flags)], patch, output))
    process.start()
    process.join(300)
    out, err = ((output / name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == check, (process.exitcode, err)
    return out, err
