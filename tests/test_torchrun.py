"""Several processes that torchrun starts: the same gradients as one, the same bits in all, and an end when one ends."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

import cli
import training
from cli import RunError
from conftest import KILLED, ROOT, SMALL, result_of

PREAMBLE = f"""
import hashlib, sys, weakref
sys.path.insert(0, {str(ROOT / "code")!r})
import cli
import torch
import torch.distributed as dist
import experiment, gan, judge, nf, training, vae
torch.set_num_threads(1)
"""
GRADIENTS = """
@cli.exit_status
def main(argv=None):
    training.connect(torch.device("cpu"))
    torch.manual_seed(0)
    x, eps, noise = (torch.rand(8, 784) < 0.3).float(), torch.randn(8, 20), torch.rand(8, 28, 28)
    images, z = torch.randint(256, (8, 28, 28), dtype=torch.uint8), torch.randn(8, 100)
    flow_flags = "--hidden 4 --levels 2 --couplings 1".split()
    models = [each.build(cli.settings(each.flags().parse_args(flags))).eval()
              for each, flags in ((vae, []), (nf, flow_flags), (gan, []))]
    for parameter in (each for model in models for each in model.parameters()):
        parameter.data += 0.01 * torch.randn(parameter.shape)  # couplings begin with zeros
    losses = (
        lambda i: -vae.elbo(models[0], x[i], eps[i], True).mean(),
        lambda i: nf.bits_per_dim(nf.bound(models[1], images[i], noise[i])).mean(),
        lambda i: gan.discriminator_objective(models[2], gan.scaled(images[i].flatten(1)), z[i])[0],
    )
    for model, loss in zip(models, losses):
        loss(torch.arange(8)).backward()
        whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert max(float(each.abs().max()) for each in whole) > 1e-3
        model.zero_grad()
        training.adam([p for p in model.parameters() if p.requires_grad], 1e-3)
        loss(training.share(torch.arange(8))).backward()
        shared = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(whole) == len(shared)
        for ours, theirs in zip(shared, whole):
            assert (ours - theirs).abs().max() <= 1e-6 * max(1, float(theirs.abs().max())), (ours - theirs).abs().max()
    training.own_noise(0, 1)
    drawn = torch.rand(3)
    first = training.from_process_0(drawn.clone())
    assert torch.equal(drawn, first) == (cli.rank() == 0)
    means = torch.full((2,), float(cli.rank()))
    training.check_finite(1, loss=means)
    assert means.tolist() == [0.5, 0.5]
    group = weakref.ref(dist.group.WORLD)
    training.disconnect()
    assert group() is None  # and with it its threads, which could abort the exit
    cli.say(f"process {cli.rank()} of {cli.processes()} agrees")
sys.exit(main([]))
"""
BITS = """
buffers = training.same_buffers
def told(parts):
    buffers(parts)
    parts = [*parts]
    model, optimizer = parts[0], parts[-1]
    state = [*model.state_dict().values()]
    state += [v for s in optimizer.state_dict()["state"].values() for v in s.values() if v.ndim]
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in state)).hexdigest()
    cli.say(f"bits {cli.rank()} {digest} {torch.initial_seed()}")
training.same_buffers = told
gan.seconds_per_1000 = lambda *_: 0.0
sys.exit(gan.main(sys.argv[1:]))
"""
TRAINING = """
vae.seconds_per_1000 = lambda *_: 0.0
sys.exit(vae.main(sys.argv[1:]))
"""


@pytest.fixture
def torchrun(tmp_path):
    """Runs a program, after PREAMBLE, in two processes; its status, and what was said."""

    def run(program: str, *flags: object) -> tuple[int, str]:
        (tmp_path / "program.py").write_text(PREAMBLE + program)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [tmp_path / "program.py", *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        return done.returncode, done.stderr

    return run


@pytest.fixture
def own(tmp_path):
    """The flag for images of one's own."""
    np.savez(tmp_path / "own.npz", images=np.random.default_rng(0).integers(0, 256, (300, 28, 28), np.uint8))
    return f"--dataset={tmp_path / 'own.npz'}"


def test_the_gradients_are_those_of_one_process(torchrun):
    """Of the VAE, the flow and the discriminator: the generator's batch norm sees a process's share alone."""
    status, said = torchrun(GRADIENTS)
    assert status == 0 and all(f"process {rank} of 2 agrees" in said for rank in (0, 1)), said


def test_all_processes_hold_the_same_bits_after_an_epoch(torchrun, own, tmp_path):
    status, said = torchrun(BITS, *SMALL["gan"], own, "--out", tmp_path / "out", "--device", "cpu")
    assert status == 0, said
    found = re.findall(r"bits (\d) (\w+) (\d+)", said)
    digests, seeds = ([[row[n] for row in found if row[0] == rank] for rank in "01"] for n in (1, 2))
    assert len(digests[0]) == 3 and digests[0] == digests[1] and len({*digests[0]}) == 3
    assert len({*seeds[0], *seeds[1]}) == 6  # noise of every process's own, in every epoch
    assert said.count("  epoch ") == 3  # one of them tells
    content = result_of(tmp_path / "out", "gan_own")
    assert content["environment"]["processes"] == 2 and len(content["history"]) == 3


def lines_of_ours(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("vae.py: ")]


@pytest.mark.parametrize(("signal", "process"), [("SIGKILL", 1), ("SIGKILL", 0), ("SIGTERM", 0)])
def test_when_one_ends_the_other_ends_and_a_resume_goes_on(torchrun, own, tmp_path, signal, process):
    flags = [*SMALL["vae"], own, "--out", tmp_path / "out", "--device", "cpu"]
    status, said = torchrun(KILLED.format(at=(2, 2, process), signal=signal) + TRAINING, *flags)
    (killed,) = re.findall(r"killed at ([\d.]+)", said)
    assert status == 1 and time.time() - float(killed) < 30, said
    lines = lines_of_ours(said)
    assert len(lines) == (0 if (signal, process) == ("SIGKILL", 0) else 1), said  # process 0 tells, if it can
    assert all("the same command and --resume" in line for line in lines), said
    if process == 0:
        return
    command = [sys.executable, ROOT / "code" / "vae.py", *map(str, flags), "--resume"]  # with one process
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "epoch 0/2" not in done.stderr and "epoch 2/2" in done.stderr, done.stderr
    assert len(result_of(tmp_path / "out", "vae_z20_own")["history"]) == 3
    status, said = torchrun(TRAINING, *flags, "--resume")  # finished: redraws, and ends
    assert status == 0 and "  epoch " not in said, said


def test_mistakes_are_one_line_for_all(torchrun, own, tmp_path):
    status, said = torchrun(TRAINING, own, "--batch-size", "51", "--out", tmp_path / "out")
    (line,) = lines_of_ours(said)
    assert status == 1 and "no multiple of the 2 processes" in line, said


def test_a_machine_that_cannot_be_reached_is_one_line(monkeypatch):
    """On each machine, as its first process tells."""

    def unreachable(backend):
        raise dist.DistNetworkError("no route to host\nand so on")

    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", unreachable)
    with pytest.raises(RunError, match=r"cannot be reached \(no route to host\): all"):
        training.connect(torch.device("cpu"))


def test_a_build_of_pytorch_without_distributed_trains_alone(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    for name in ("is_initialized", "is_torchelastic_launched", "init_process_group"):
        monkeypatch.delattr(dist, name)
    training.connect(torch.device("cpu"))
    assert not training.connected() and (cli.rank(), cli.processes()) == (0, 1)
