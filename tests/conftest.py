"""What several test files use: the real MNIST, a small stand-in for it, and scripts run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import experiment
import judge
import mnist

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["vae", "gan", "nf"]  # every model's script; test_scripts checks that none is missing


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real MNIST, fetched if it is not there yet."""
    mnist.load("mnist", ROOT / "data")
    return ROOT / "data"


@pytest.fixture
def tiny(monkeypatch) -> mnist.Data:
    """Every script sees 600 random images instead of 60,000, and 100 for testing: for what does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    images, test = (torch.randint(256, (n, 28, 28), generator=generator, dtype=torch.uint8) for n in (600, 100))
    data = mnist.Data(images, torch.arange(600) % 10, test, torch.arange(100) % 10)
    monkeypatch.setattr(mnist, "IMAGES", 600)
    monkeypatch.setattr(mnist, "TRAIN", 500)
    monkeypatch.setattr(judge, "JUDGED", 200)

    def load(dataset: str, data_dir: object, device: torch.device | str = "cpu") -> mnist.Data:
        return mnist.Data(**{name: each.to(device) for name, each in vars(data).items()})

    monkeypatch.setattr(mnist, "load", load)
    return data


def run_script(script: str, *flags: object, patch: str = "", check: int | None = 0) -> subprocess.CompletedProcess:
    """`python code/<script>.py <flags>` in a process of its own, after the Python in `patch`; asserts its status."""
    program = f"import os, signal, sys\nsys.path.insert(0, 'code')\nimport experiment, mnist, {script}\n{patch}\n"
    program += f"sys.exit({script}.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *map(str, flags)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _results_are_safe(monkeypatch, tmp_path):
    """No test in this process writes into the repository's own folders."""
    monkeypatch.setattr(experiment, "ROOT", tmp_path / "repository")
