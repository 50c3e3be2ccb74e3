"""A run: its files, its checkpoint, its results.

A script's `main` makes a `Run`. Its `train` lets it `start`, goes through its `steps` from `first_epoch` on, 0 being
before training, and has it `record` each epoch: a row of the history, and the checkpoint. `main` ends with `finish`:
pictures, weights, JSON.

Every file is made whole in memory and written by `write`, so that a killed run leaves old files or new ones.
"""

import contextlib
import errno
import glob
import hashlib
import io
import json
import math
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cli
import training
from cli import ROOT, RunError, UserError

WRITTEN_EVERY = 20  # seconds, of a long evaluation
ABANDONED = 3600  # seconds after which a temporary file is taken for one of a killed process
GENERATORS = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}  # who holds a device's random state


def write(path: Path, content: bytes) -> None:
    """Put `content` into the file `path`, whole or not at all: through a temporary file beside it, of this call's own.

    Makes the folder if need be. Raises RunError if it cannot be written (a full disk, say); what was there before is
    then untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - other.stat().st_mtime > ABANDONED:
                    other.unlink()
        with open(temporary, "xb") as stream:
            stream.write(content)
            stream.flush()
            try:
                os.fsync(stream.fileno())
            except OSError as error:  # some file systems of networks and clouds have no such call
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                    raise
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        first = "make room" if full else "see that it may be written and no other program has it open"
        advice = f"{first}, then run again (a training with --resume)"
        raise RunError(f"cannot write {path} ({error.strerror}); what was there is untouched: {advice}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # there only if something went wrong


def folder(path: Path) -> Path:
    """The folder, which `write` makes. Raises UserError if nothing can be written there; leaves nothing behind."""
    try:
        there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", suffix=".tmp", dir=there))
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): choose another --out") from None
    return path


def json_bytes(content: Any) -> bytes:
    """Strict JSON: a number that is not finite is an error here, not a surprise for the reader."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _result_bytes(content: dict) -> bytes:
    """`json_bytes` of a result. Raises RunError if it has a number that is not finite, as JSON has no such thing."""
    try:
        return json_bytes(content)
    except ValueError as error:
        raise RunError(f"the result is not finite ({error}): the model has diverged; try a smaller --lr") from None


def torch_bytes(content: Any) -> bytes:
    """A torch archive. Made in memory because a path's name would get into it: the same content, the same bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def weights_bytes(name: str, config: dict, model: nn.Module) -> bytes:
    """The archive of a model's weights: its run's name, its config, and its state on the CPU."""
    state = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
    return torch_bytes({"run": name, "config": config, "model": state})


def load_archive(path: Path, what: str, advice: str = "delete it, and train again") -> dict:
    """The dictionary in a torch archive, on the CPU. Raises UserError if the file is damaged or cannot be read.

    what: its name in a message, as in "the weights"; advice: what to do about a damaged one. The zip's checksums are
    tested first, because torch loads flipped bytes without a word.
    """
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip() is None:
                return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror})") from None
    except MemoryError:
        raise
    except Exception:  # zipfile, zlib and pickle each have errors of their own for damaged bytes
        pass
    raise UserError(f"{what} {path} is damaged: {advice}")


def load_state(model: nn.Module, archive: dict, path: Path, what: str) -> None:
    """Load the archive's "model" into `model`. Raises UserError if it is of another network."""
    try:
        model.load_state_dict(archive["model"])
    except (KeyError, RuntimeError, TypeError, AttributeError):
        raise UserError(f"{what} {path} is of another network than this program's") from None


def committed(run: str, build: Callable[[dict], nn.Module]) -> nn.Module:
    """The model of a run's weights in the repository, in evaluation mode. Raises UserError as `trained`."""
    return trained(cli.ROOT / "weights" / f"{run}.pt", build, f"restore them with: git checkout weights/{run}.pt")


def trained(path: Path, build: Callable[[dict], nn.Module], advice: str) -> nn.Module:
    """The model of a run's weights, in evaluation mode; `build` takes a config.

    Raises UserError with this advice if there are none, or they are damaged or of another program than this.
    """
    if not path.exists():
        raise UserError(f"no weights at {path}: {advice}")
    archive = load_archive(path, "the weights file", advice)
    try:
        model = build(archive["config"])
    except (KeyError, TypeError):
        raise UserError(f"the weights file {path} is of another version of this program: {advice}") from None
    load_state(model, archive, path, "the weights file")
    return model.eval()


def mismatch(archive: dict, name: str, config: dict, but_for: tuple[str, ...] = ()) -> str:
    """How a run's archive differs from the run `name` with this config, `but_for` some keys; "" if it does not."""
    theirs = archive.get("config")
    if archive.get("run") != name or not isinstance(theirs, dict):
        return f"is of {archive.get('run', 'another program')}, not of {name}"
    differing = [
        f"{key} {theirs.get(key)} there, {config.get(key)} here"
        for key in sorted((theirs.keys() | config.keys()) - set(but_for))
        if theirs.get(key) != config.get(key)
    ]
    return f"has another configuration ({'; '.join(differing)}): use the same flags" if differing else ""


def environment(device: torch.device) -> dict:
    """Where numbers were measured: versions, hardware, threads, and the commit (null outside a git checkout).

    A checkout is this folder's own: the commit of another one, into which it was unpacked, says nothing of it.
    """
    commit, cpu = None, platform.processor() or platform.machine()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        describe = ["git", "describe", "--always", "--dirty"]
        here = {key: value for key, value in os.environ.items() if key not in ("GIT_DIR", "GIT_WORK_TREE")}
        here["GIT_CEILING_DIRECTORIES"] = str(ROOT.parent)
        done = subprocess.run(describe, cwd=ROOT, env=here, capture_output=True, text=True, timeout=20)
        commit = done.stdout.strip() or None
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "commit": commit,
    } | ({"processes": cli.processes()} if cli.processes() > 1 else {})


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, in seconds, waiting for the device."""
    begin = time.perf_counter()
    function()
    getattr(torch, device.type).synchronize()
    return time.perf_counter() - begin


def seconds_per_1000(sample: Callable[[int], Any], device: torch.device) -> float:
    """Median wall time of `sample(1000)` over five calls, in seconds, after one that warms up."""
    return statistics.median([seconds(lambda: sample(1000), device) for _ in range(6)][1:])


def peak_memory_mib(device: torch.device) -> float | None:
    """The most memory held so far, in MiB: on CUDA by tensors on the device, else by this process (None on Windows).

    Linux's getrusage also counts what the parent held when it started this process, /proc/self/status does not.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return None


def log_mean_exp(log_weights: Callable[[int], Tensor], draws: int, unfinished: Path | None = None) -> Tensor:
    """log 1/K sum_k exp log_weights(k) over k = 0 .. K-1, K = draws, elementwise: (n,) in float64, on the CPU.

    Shows a bar with the mean so far. unfinished: a file where the sum is written now and then; one that is there, from
    a process that was stopped, is gone on from.
    """
    first, total = 0, torch.tensor(-math.inf)
    if unfinished and unfinished.exists():
        archive = load_archive(unfinished, "the importance samples so far in", advice="delete it, and run again")
        if archive["draws"] <= draws:
            first, total = archive["draws"], archive["total"]
    written = time.monotonic()
    bar = cli.progress(range(first, draws), "importance samples", draws, initial=first)
    for k in bar:
        total = torch.logaddexp(total, log_weights(k).cpu().double())
        bar.set_postfix_str(f"mean of log p {float(total.mean()) - math.log(k + 1):.3f} nats", refresh=False)
        if unfinished and time.monotonic() - written > WRITTEN_EVERY:
            write(unfinished, torch_bytes({"draws": k + 1, "total": total}))
            written = time.monotonic()
    return total - math.log(draws)


def save_samples(path: Path, images: Tensor) -> None:
    """Write images (n, 28, 28) uint8 under the key `images` of an .npz, and say where."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images.cpu().numpy())
    write(path, buffer.getvalue())
    cli.tell(f"{len(images)} samples in {path}")


class Run:
    """One training run: its name, folders, settings and history, and what it leaves behind.

    name: of the run, as in `figures/<name>.json`. report: the settings, as differences from the parser's defaults,
    whose results are the repository's own. Without --out, results of other settings go to out/, so that a trial never
    overwrites one. evaluation: the settings that do not shape the weights.
    """

    def __init__(
        self, name: str, parser: cli.Parser, args: Namespace, report: tuple[dict, ...] = ({},), evaluation: tuple = ()
    ):
        self.name = name if args.dataset == "mnist" else f"{name}_{cli.stem(args.dataset)}"
        self.args, self.config, self.evaluation = args, cli.settings(args), evaluation
        self.device = cli.device(args.device)
        self.follows = cli.rank() > 0  # another process evaluates, draws and writes
        if cli.processes() > 1 and (args.evaluate or args.sample):
            raise UserError("torchrun is for training: use --evaluate and --sample without it")
        if args.batch_size % cli.processes():
            raise UserError(f"--batch-size {args.batch_size} is no multiple of the {cli.processes()} processes")
        training.connect(self.device)
        self.environment = environment(self.device)
        self.history: list[dict] = []
        self.frames: dict[int, Tensor] = {}  # epoch -> images (n, 28, 28) uint8, for pictures through the training
        self.peak_memory: float | None = None  # MiB, over all the processes that worked on the run
        self.kept: Path | None = None  # what a long evaluation has so far
        changed = {key: value for key, value in self.config.items() if value != parser.get_default(key)}
        self.out = args.out or (ROOT if changed in report else ROOT / "out")
        if not args.out and changed not in report:
            self.say(f"not the report's settings ({cli.as_flags(changed)}): everything goes to {self.out}")
        for each in ("figures", "weights", "checkpoints"):
            folder(self.out / each)

    def say(self, message: str) -> None:
        """A line about the run, on standard error."""
        if not self.follows:
            cli.say(f"{self.name}: {message}")

    def figure(self, name: str) -> Path:
        """Where a picture of this run goes: <out>/figures/<run>_<name>."""
        return self.out / "figures" / f"{self.name}_{name}"

    def panels(self, *fractions: float) -> list[int]:
        """The epochs at these fractions of the training, for pictures through it; no epoch twice."""
        return sorted({round(fraction * self.args.epochs) for fraction in fractions})

    def stamp(self, epoch: int) -> str:
        """`epochNN` for a file's name: as many digits as the last epoch has, and at least two."""
        return f"epoch{epoch:0{max(2, len(str(self.args.epochs)))}d}"

    # Training

    def start(self, **parts: Any) -> None:
        """Begin, or with --resume go on. `parts` (models, optimizers) have state_dict() and load_state_dict().

        Of several processes, 0 looks for the checkpoint, and all begin with what it has.
        """
        self._parts = parts
        if not self.follows:
            self._claim()
            if self.args.resume:
                if found := self._files("checkpoints"):
                    self._restore(found[0])
                else:
                    self.say(f"no checkpoint in {self.out / 'checkpoints'}, so this is a fresh start")
        if cli.processes() > 1:
            states = torch_bytes({name: part.state_dict() for name, part in parts.items()})
            states, self.history = training.from_process_0((states, self.history))
            states = torch.load(io.BytesIO(states), map_location="cpu", weights_only=True)
            for name, part in parts.items() if self.follows else ():
                part.load_state_dict(states[name])
        self.first_epoch = len(self.history)
        self._row_begin = time.perf_counter()

    def _claim(self) -> None:
        """Hold the run's name in its folder until `main` ends, as two at once would mix their files.

        Raises UserError if another process holds it. Where the system knows no such locks (Windows, some networks),
        nothing is held.
        """
        path = self.out / "checkpoints" / f".{self.name}.running.tmp"
        try:
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                stream = cli.at_end.enter_context(path.open("w"))
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):  # who held it may have removed it since it was opened
                    if os.stat(path).st_ino == os.fstat(stream.fileno()).st_ino:
                        break
        except BlockingIOError:
            raise UserError(f"another process is training {self.name} into {self.out}: choose another --out") from None
        except (ImportError, OSError):
            return
        cli.at_end.callback(path.unlink, missing_ok=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, as the history counts them."""
        return sum(row["seconds"] for row in self.history) + time.perf_counter() - self._row_begin

    def steps(
        self, epoch: int, batches: Iterable[Tensor], total: int, first: int | None = None
    ) -> Iterable[tuple[int, Tensor]]:
        """The epoch's `total` batches with the training step's number, from 0 over the whole run; shows a bar.

        `first` is the number of the epoch's first step, for epochs that differ in length. Where all have `total`, the
        numbers run from -total to -1 at epoch 0, before training. Of several processes each gets its share of every
        batch, and after the last all have the same buffers.
        """
        last = "".join(f"  {key} {value:.4g}" for row in self.history[-1:] for key, value in row.items())
        description = f"{self.name} epoch {epoch}/{self.args.epochs}{last and '  last:'}{last}"
        training.own_noise(self.args.seed, epoch)
        start = (epoch - 1) * total if first is None else first
        for step, index in enumerate(cli.progress(batches, description, total), start):
            yield step, training.share(index)
        training.same_buffers(self._parts.values())

    def record(self, epoch: int, **figures: float) -> None:
        """End an epoch: its row of the history with these figures and its wall time; the checkpoint; a line.

        A row's `seconds` reach from the row before (from `start`) to here, so each includes the checkpoint that
        precedes it, and nothing between two epochs goes uncounted.
        """
        for name, value in figures.items():
            if not math.isfinite(value):
                raise RunError(f"{name} is {value} after epoch {epoch}: diverged; the last checkpoint is kept")
        now = time.perf_counter()
        seconds, self._row_begin = now - self._row_begin, now
        line = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.history.append({"epoch": epoch, **figures, "seconds": seconds})
        self.peak_memory = max(self.peak_memory or 0, peak_memory_mib(self.device) or 0) or None
        checkpoint = {
            "run": self.name,
            "config": self.config,
            "environment": self.environment,  # of the process that began
            "history": self.history,
            "frames": self.frames,
            "peak_memory_mib": self.peak_memory,
            "rng": {kind: GENERATORS[kind].get_rng_state() for kind in ("cpu", self.device.type)},
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }
        write(self.out / "checkpoints" / f"{self.name}.pt", torch_bytes(checkpoint))
        cli.hint_at_resuming()
        cli.say(f"{self.name}  epoch {epoch}/{self.args.epochs}  {line}  {seconds:.1f} s")

    def _restore(self, path: Path) -> None:
        checkpoint = load_archive(path, "the checkpoint")
        if wrong := mismatch(checkpoint, self.name, self.config):
            raise UserError(f"the checkpoint {path} {wrong}")
        try:
            for name, part in self._parts.items():
                part.load_state_dict(checkpoint["parts"][name])
            self.history, self.frames = checkpoint["history"], checkpoint["frames"]
            self.environment, self.peak_memory = checkpoint["environment"], checkpoint["peak_memory_mib"]
            for kind in checkpoint["rng"].keys() & {"cpu", self.device.type}:
                GENERATORS[kind].set_rng_state(checkpoint["rng"][kind])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"the checkpoint {path} does not fit this program ({reason}): train again") from None
        cli.hint_at_resuming()

    # Finishing

    def finish(self, model: nn.Module, evaluate: Callable[[], dict], draw: Callable[[], None]) -> None:
        """Draw the pictures, then write the weights and, last, the JSON; with --evaluate print the result instead.

        If no epoch was left to train and the JSON is of these very weights, only the pictures are drawn. Raises
        RunError if they cannot be, after everything else: a picture must not cost a run. Of several processes, 0 does
        all this.
        """
        training.disconnect()
        if self.follows:
            return
        undrawn = ""
        try:
            draw()
        except MemoryError:
            undrawn = "out of memory"
        except Exception as error:  # whatever is wrong with matplotlib or Pillow, the fonts, the disk
            undrawn = str(error).partition("\n")[0] if isinstance(error, RunError) else repr(error).partition("\n")[0]
        self._finish(model, evaluate)
        if undrawn:
            again = "once that is mended, run again with --resume" if not self.args.evaluate else "the result stands"
            raise RunError(f"not all pictures could be drawn: {undrawn}; {again}")

    def _finish(self, model: nn.Module, evaluate: Callable[[], dict]) -> None:
        if self.args.evaluate:
            cli.tell(_result_bytes(evaluate()).decode().rstrip())
            self._forget()
            return
        weights = weights_bytes(self.name, self.config, model)
        sha256 = hashlib.sha256(weights).hexdigest()
        if self.first_epoch > self.args.epochs and self._json(sha256, self.out):
            return
        result = evaluate() | {
            "parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
            "train_seconds": sum(row["seconds"] for row in self.history),
            "peak_memory_mib": max(self.peak_memory or 0, peak_memory_mib(self.device) or 0) or None,
        }
        content = {"run": self.name, "config": self.config, "environment": self.environment, "history": self.history}
        content |= {"result": result, "weights_sha256": sha256}
        write(self.out / "weights" / f"{self.name}.pt", weights)
        write(self.out / "figures" / f"{self.name}.json", _result_bytes(content))
        self._forget()

    def _forget(self) -> None:
        """Remove what a long evaluation, done by now, has kept."""
        if self.kept:
            self.kept.unlink(missing_ok=True)

    def load(self, model: nn.Module) -> None:
        """Load this run's weights, and the history of its JSON. Raises UserError if there are none of this config.

        They are those in the run's folder or, where it has none of this config, the repository's.
        """
        wrong = ""
        for path in self._files("weights"):
            archive = load_archive(path, "the weights file")
            if not (differs := mismatch(archive, self.name, self.config, but_for=self.evaluation)):
                load_state(model, archive, path, "the weights file")
                if self.out not in path.parents:
                    self.say(f"none of this configuration in {self.out}, so these are the weights {path}")
                sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
                self.history = self._json(sha256, path.parents[1]).get("history", [])
                return
            wrong = wrong or f"{path} {differs}"
        missing = "does not exist: train first, with the same flags but --evaluate or --sample"
        raise UserError(f"the weights file {wrong or f'{self.out}/weights/{self.name}.pt {missing}'}")

    def unfinished(self, model: nn.Module, images: Tensor) -> Path:
        """Where a long evaluation of these weights on these images keeps what it has so far; `finish` removes it."""
        sha256 = hashlib.sha256(weights_bytes(self.name, {}, model) + images.cpu().numpy().tobytes()).hexdigest()
        self.kept = self.out / "checkpoints" / f"{self.name}_evaluation_{sha256[:16]}.pt"
        return self.kept

    def _json(self, weights_sha256: str, place: Path) -> dict:
        """What the run's JSON in `place`/figures holds; nothing if there is none of these weights."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((place / "figures" / f"{self.name}.json").read_bytes())
            if content["weights_sha256"] == weights_sha256:
                return content
        return {}

    def _files(self, kind: str) -> list[Path]:
        """The run's existing "weights" or "checkpoints". A trial may find the report's, if only to say what differs."""
        places = dict.fromkeys([self.out] if self.args.out and kind == "checkpoints" else [self.out, ROOT])
        return [path for path in (place / kind / f"{self.name}.pt" for place in places) if path.exists()]
