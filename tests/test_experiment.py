"""What no model knows about: flags, files, schedules, and what a run does with its checkpoint and weights."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import cli
import experiment
import mnist
import nf
import training
import vae
from cli import RunError, UserError
from conftest import COSTS, ROOT, SMALL, VERDICT, built, contents, result_of


@pytest.fixture
def train(tiny, tmp_path, capsys):
    """Runs vae.py on the small data with some flags: its status and its lines on standard error."""

    def run(*flags: str, out="out"):
        capsys.readouterr()
        status = vae.main([*SMALL["vae"], "--out", str(tmp_path / out), *flags])
        return status, capsys.readouterr().err.splitlines()

    return run


@pytest.fixture
def out(finished, tmp_path):
    """The folder to which `train` writes, with a finished run in it."""
    return shutil.copytree(finished("vae"), tmp_path / "out")


def fails(outcome, status: int, *words: str) -> None:
    """The outcome of `train` is this status and one line with these words (after the epochs' own lines)."""
    code, lines = outcome
    lines = [line for line in lines if "  epoch " not in line]
    assert code == status and len(lines) == 1, (code, lines)
    for word in words:
        assert word in lines[0], lines[0]


# Flags


@pytest.mark.parametrize(
    "flags",
    [
        f"{flag}={value}"
        for flag in ("--epochs", "--batch-size", "--lr", "--z-dim", "--hidden", "--importance-samples")
        for value in ("0", "-1", "nan", "many", "")
    ]
    + ["--lr=inf", "--epochs=1.5", "--seed=-1", "--seed=x", "--sample=0", "--dataset=cifar", "--device=tpu"]
    + ["--batch-size=501", "--unknown", "--epoch=3", "--resume --evaluate", "--sample=3 --resume", "--warmup=1"]
    + ["--betas=0.9", "--betas 0.9 1", "--betas 0.9 x", "--warmup=-0.1", "--warmup=nan"],
)
def test_bad_flags_are_one_line(train, tmp_path, flags):
    fails(train(*flags.split()), 2, flags.split("=")[0].split()[0])
    assert not contents(tmp_path)


@pytest.mark.parametrize(("name", "module"), [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_a_device_that_is_not_there(train, monkeypatch, name, module):
    monkeypatch.setattr(module, "is_available", lambda: False)
    fails(train("--device", name), 2, f"--device {name}", "cpu")


def test_auto_takes_cuda_then_mps_then_the_cpu_if_they_work(monkeypatch, capsys):
    ones, broken = torch.ones, set()

    def on_any_machine(*size, device):
        if device in broken:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand so on")
        return ones(*size)

    monkeypatch.setattr(torch, "ones", on_any_machine)
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=cuda: here)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda here=mps: here)
        assert cli.device("auto").type == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    broken.add("cuda")
    assert cli.device("auto").type == "cpu"
    assert "no kernel image" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no kernel image.*device\): use --device cpu"):
        cli.device("cuda")


def test_each_of_several_processes_takes_a_gpu_of_its_own_or_the_cpu(monkeypatch):
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    ones, taken = torch.ones, []

    def on_the_gpu_taken(*size, device):
        assert device != "cuda" or taken == [1]
        return ones(*size)

    monkeypatch.setattr(torch, "ones", on_the_gpu_taken)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert cli.device("auto").type == expected and taken == [1]
    with pytest.raises(UserError, match=r"--device mps: .* for several processes"):
        cli.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"1 GPUs here are too few for 2 processes: .*--device cpu"):
        cli.device("auto")


def test_a_trial_does_not_touch_the_reports_folders(tiny, tmp_path, capsys):
    assert vae.main(SMALL["vae"]) == 0
    assert "--hidden 32" in capsys.readouterr().err
    repository = tmp_path / "repository"
    assert {path.relative_to(repository).parts[0] for path in repository.rglob("*")} == {"out"}


@pytest.mark.parametrize(
    ("flags", "reports"),
    [(flags, True) for flags in ("", "--z-dim 2", "--betas 0.9 0.999 --device cpu", "--best")]
    + [(flags, False) for flags in ("--z-dim 3", "--z-dim 2 --lr 1", "--seed 1", "--best --z-dim 2", "--prior flow")],
)
def test_only_the_reports_settings_write_to_its_folders(tmp_path, monkeypatch, flags, reports):
    made = []

    def make_and_stop(*args, **settings):
        made.append(experiment.Run(*args, **settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(vae, "Run", make_and_stop)
    with pytest.raises(KeyboardInterrupt):
        vae.main(flags.split())
    assert made[0].out == tmp_path / "repository" / ("" if reports else "out")


@pytest.mark.parametrize("flags", ["--best --hidden 9", "--hidden 9 --best"])
def test_best_sets_other_defaults(flags):
    args = vae.flags().parse_args(flags.split())
    assert vars(args) == {**vars(vae.flags().parse_args([])), **vae.BEST, "best": True, "hidden": 9}
    assert "best" not in cli.settings(args)


def test_peak_memory_is_this_processs_own():
    """A child of a process that holds 1 GiB starts afresh."""
    held = torch.ones(2**28)
    assert experiment.peak_memory_mib(torch.device("cpu")) > 1024
    command = "import experiment, torch; print(experiment.peak_memory_mib(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", command], cwd=ROOT / "code", capture_output=True, text=True)
    assert 0 < float(child.stdout) < 1024 and len(held)


# Files


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    experiment.write(path, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        experiment.write(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}


def test_log_mean_exp_goes_on_from_what_it_kept(tmp_path, monkeypatch):
    terms = 5 * torch.randn(9, 4, dtype=torch.float64)
    kept, asked = tmp_path / "kept.pt", []
    monkeypatch.setattr(experiment, "WRITTEN_EVERY", 0)

    def term(k: int) -> Tensor:
        asked.append(k)
        if asked == [*range(6)]:
            raise KeyboardInterrupt
        return terms[k]

    with pytest.raises(KeyboardInterrupt):
        experiment.log_mean_exp(term, 9, kept)
    found = experiment.log_mean_exp(term, 9, kept)
    assert asked == [*range(6), *range(5, 9)]
    torch.testing.assert_close(found, torch.logsumexp(terms, 0) - math.log(9), rtol=1e-12, atol=0)
    assert torch.equal(experiment.log_mean_exp(term, 9), found)
    shorter = experiment.log_mean_exp(term, 3, kept)  # what was kept has more terms
    torch.testing.assert_close(shorter, torch.logsumexp(terms[:3], 0) - math.log(3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["--evaluate", "--resume"])
def test_a_killed_evaluation_goes_on(tiny, out, tmp_path, monkeypatch, capsys, mode):
    """With --evaluate, and with --resume after a training that had come to its end: to the same result."""
    monkeypatch.setattr(experiment, "WRITTEN_EVERY", 0)
    log_weight, draws = vae.log_weight, []

    def counted(*args: object) -> Tensor:
        if torch.is_inference_mode_enabled():
            draws.append(1)
            if len(draws) == 7:
                raise KeyboardInterrupt
        return log_weight(*args)

    monkeypatch.setattr(vae, "log_weight", counted)
    folder = out if mode == "--evaluate" else tmp_path / "new"
    flags = [*SMALL["vae"], "--out", str(folder), "--importance-samples", "9"]
    with pytest.raises(KeyboardInterrupt):
        vae.main([*flags, "--evaluate"] if mode == "--evaluate" else flags)
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert vae.main([*flags, mode]) == 0 and len(draws) == 7 + 3
    assert len(list((folder / "checkpoints").iterdir())) == 1
    printed = capsys.readouterr().out
    first = json.loads(printed) if mode == "--evaluate" else result_of(folder, "vae_z20")["result"]
    assert vae.main([*flags, "--evaluate"]) == 0 and len(draws) == 10 + 9
    again = json.loads(capsys.readouterr().out)
    assert again["test_nll"] == first["test_nll"] and again["importance_samples"] == 9


def test_what_an_evaluation_keeps_is_of_its_weights_and_images(tmp_path):
    run = experiment.Run("nf", nf.flags(), nf.flags().parse_args(["--out", str(tmp_path)]))
    first, second = (built(nf, "--hidden", 4, "--couplings", 1) for _ in range(2))
    images = torch.zeros(3, 28, 28, dtype=torch.uint8)
    kept = [run.unfinished(model, seen) for model in (first, second) for seen in (images, images + 1, images[:2])]
    assert len({*kept}) == 6 and run.unfinished(first, images.clone()) == kept[0]


def test_warmup_cosine():
    factors = [training.warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5) and 0 < factors[99] < 1e-3
    assert training.warmup_cosine(0, 1, 0.05) == 1


# Runs


def test_json_is_what_the_design_says(out, tmp_path):
    text = (out / "figures/vae_z20.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(content) == ["run", "config", "environment", "history", "result", "weights_sha256"]
    assert set(content["environment"]) == {"python", "torch", "device", "cpu", "threads", "commit"}
    assert [row["epoch"] for row in content["history"]] == [0, 1, 2]
    assert set(content["history"][0]) == {"epoch", "train_elbo", "val_elbo", "seconds"}
    result = content["result"]
    assert set(result) == {"test_elbo", "test_nll", "test_nll_se", "importance_samples"} | COSTS | VERDICT
    assert result["train_seconds"] == pytest.approx(sum(row["seconds"] for row in content["history"]))
    assert str(tmp_path.parent) not in text
    archive = torch.load(out / "weights/vae_z20.pt", weights_only=True)
    assert result["parameters"] == sum(tensor.numel() for tensor in archive["model"].values())
    assert archive["config"] == content["config"]


def test_evaluate_gives_the_result_again_and_sample_writes_an_npz(train, out, monkeypatch, capsys):
    before = contents(out)
    assert vae.main([*SMALL["vae"], "--out", str(out), "--evaluate"]) == 0
    again = json.loads(capsys.readouterr().out)
    trained = result_of(out, "vae_z20")["result"]
    for key in VERDICT | {"test_elbo", "test_nll", "test_nll_se"}:
        assert again[key] == pytest.approx(trained[key], rel=1e-6)
    assert contents(out) == before
    monkeypatch.setattr(mnist, "load", lambda *args: pytest.fail("sampling needs no data"))
    drawn = []
    for n in (23, 23, 40):
        assert train("--sample", str(n))[0] == 0
        drawn.append(np.load(out / "figures/vae_z20_samples.npz")["images"])
        assert drawn[-1].shape == (n, 28, 28) and drawn[-1].dtype == np.uint8 and drawn[-1].std() > 0
    assert np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("flag", ["--evaluate", "--sample=5"])
def test_using_weights_that_are_missing_or_other(train, out, flag):
    fails(train(flag, out="elsewhere"), 2, "does not exist", "train first")
    weights = out / "weights/vae_z20.pt"
    fails(train(flag, "--epochs", "3"), 2, "epochs 2 there, 3 here")
    fails(train(flag, "--lr", "0.1", "--seed", "7"), 2, "lr", "seed 0 there, 7 here")
    archive = torch.load(weights, weights_only=True)
    weights.write_bytes(experiment.torch_bytes({**archive, "run": "gan"}))
    fails(train(flag), 2, "of gan, not of vae_z20")
    weights.write_bytes(experiment.torch_bytes({**archive, "model": {}}))
    fails(train(flag), 2, "of another network")


def test_resume_without_a_checkpoint_says_so_and_starts(train, tmp_path):
    status, lines = train("--resume")
    assert status == 0 and "no checkpoint" in lines[0] and "epoch 0/2" in lines[1]
    assert (tmp_path / "out/figures/vae_z20.json").exists()


def test_resume_of_a_finished_run_redraws_the_same_and_a_fresh_run_replaces_it(train, out):
    before = contents(out)
    for path in (out / "figures").glob("*.p*"):
        path.unlink()
    status, lines = train("--resume")
    assert status == 0 and not lines  # no epoch was trained
    assert contents(out) == before
    (out / "figures/vae_z20.json").unlink()  # as if killed just before the end
    assert train("--resume")[0] == 0
    after = contents(out)
    assert {name for name in before if after[name] != before[name]} <= {"figures/vae_z20.json"}  # the time of sampling
    assert train()[0] == 0
    assert (out / "figures/vae_z20.json").read_bytes() != after["figures/vae_z20.json"]  # times


def test_resume_with_another_configuration_names_what_differs(train, out):
    before = contents(out)
    fails(train("--resume", "--epochs", "3"), 2, "epochs 2 there, 3 here")
    fails(train("--resume", "--importance-samples", "9"), 2, "importance_samples")
    fails(train("--resume", "--lr", "0.5", "--batch-size", "20"), 2, "lr", "batch_size 50 there, 20 here")
    assert contents(out) == before


def damages(content: bytes):
    """Ways to spoil a file."""
    yield b""
    yield content[: len(content) // 2]
    yield content[:-10]
    yield b"no archive at all"
    for part in (0.1, 0.5, 0.9):
        at = int(part * len(content))
        yield content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


@pytest.mark.parametrize("folder", ["checkpoints", "weights"])
def test_damaged_archives(train, out, folder):
    path = out / folder / "vae_z20.pt"
    for damaged in damages(path.read_bytes()):
        path.write_bytes(damaged)
        before = contents(out)
        fails(train("--resume" if folder == "checkpoints" else "--evaluate"), 2, "is damaged", path.name)
        assert contents(out) == before


def test_weights_that_are_older_than_a_flag_are_refused(train, out):
    path = out / "weights/vae_z20.pt"
    archive = torch.load(path, weights_only=True)
    del archive["config"]["clip"]
    path.write_bytes(experiment.torch_bytes(archive))
    fails(train("--sample", "3"), 2, "clip None there, 500.0 here")
    for config in ({}, None):
        path.write_bytes(experiment.torch_bytes({**archive, "config": config}))
        with pytest.raises(UserError, match="another version of this program: get new ones"):
            experiment.trained(path, vae.build, "get new ones")


def test_checkpoint_of_another_script(train, out):
    path = out / "checkpoints/vae_z20.pt"
    whole = torch.load(path, weights_only=True)
    for other, words in (
        ({**whole, "run": "gan"}, "of gan, not of vae_z20"),
        ({"weights": 1}, "of another program, not of vae_z20"),
        ({**whole, "parts": {}}, "does not fit"),
    ):
        path.write_bytes(experiment.torch_bytes(other))
        fails(train("--resume"), 2, words)


@pytest.mark.parametrize("out", ["file/out", "/proc/out"])
def test_a_folder_that_cannot_be_written(train, tmp_path, out):
    (tmp_path / "file").write_text("in the way")
    fails(train(out=out), 2, "cannot write", "--out")


def test_divergence_names_epoch_and_step_and_keeps_the_checkpoint(train, tmp_path):
    fails(train("--lr", "1e30"), 1, "epoch 1 at step ", "of 10", "checkpoint is kept", "--lr")
    assert set(contents(tmp_path / "out")) == {"checkpoints/vae_z20.pt"}
    checkpoint = torch.load(tmp_path / "out/checkpoints/vae_z20.pt", weights_only=True)
    assert [row["epoch"] for row in checkpoint["history"]] == [0]


def test_check_finite_names_the_first_bad_step():
    training.check_finite(1, loss=torch.zeros(5))
    with pytest.raises(RunError, match="loss_d is nan in epoch 1 at step 3 of 5"):
        training.check_finite(1, loss_g=torch.zeros(5), loss_d=torch.tensor([0, 0, torch.nan, 0, torch.inf]))


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "make room"), (errno.EACCES, "other program")])
def test_a_file_that_cannot_be_written_keeps_the_last_checkpoint(train, tmp_path, monkeypatch, number, advice):
    replace, calls = os.replace, []

    def fills_up(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fills_up)
    fails(train(), 1, os.strerror(number), advice, "--resume")
    assert set(contents(tmp_path / "out")) == {"checkpoints/vae_z20.pt"}
    assert train("--resume")[0] == 0


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_with_the_command_that_goes_on(train, finished, tmp_path, monkeypatch, signum, status):
    batches = mnist.batches

    def interrupted(*args):
        yield from list(batches(*args))[:3]
        os.kill(os.getpid(), signum)
        raise AssertionError("not stopped")

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(mnist, "batches", interrupted)
    fails(train(), status, "stopped", "go on", "--resume")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    monkeypatch.setattr(mnist, "batches", batches)
    assert train("--resume")[0] == 0
    ours, whole = contents(tmp_path / "out"), contents(finished("vae"))
    assert ours.keys() == whole.keys()
    differing = {name for name in ours if ours[name] != whole[name]}
    assert differing == {"checkpoints/vae_z20.pt", "figures/vae_z20.json"}  # their times


@pytest.mark.parametrize(("module", "name"), [(mnist, "load"), (vae, "panel")])
def test_stopped_before_the_first_checkpoint_says_to_run_again(train, monkeypatch, module, name):
    monkeypatch.setattr(module, name, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    fails(train(), 143, "run the same command again")


def test_too_little_memory_is_one_line(train):
    fails(train("--z-dim", "1000000000000"), 1, "out of memory")


def test_user_errors_do_not_hide_bugs():
    @cli.exit_status
    def main(argv=None):
        raise UserError("what") if argv else KeyError("a bug")

    assert main(["x"]) == 2
    with pytest.raises(KeyError):
        main()
