"""What the scripts share and no model knows about: flags, device, errors, checkpoints, results.

A run's life, as each script's `main` spells it out:

    run = Run("name", parser, args, config)     # folders; where a trial must not overwrite a result, out/
    run.start(model=model, optimizer=optimizer)  # a fresh start, or --resume
    for epoch in run.epochs():                   # 0 is before training
        ...
        run.record(figure_of_merit=...)          # a history row, and the checkpoint
    run.conclude(model, evaluate)                # weights, then JSON

Every file is made whole in memory and written by `write`, so that a killed run leaves old files or new ones.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


# Errors and exit status


class UserError(Exception):
    """What the user got wrong, in one line that says what to do. Exit status 2."""


class RunError(Exception):
    """A run that failed, in one line. Exit status 1."""


class Stopped(BaseException):
    """SIGINT or SIGTERM. Not an Exception, so that no handler for errors swallows it."""

    def __init__(self, signum: int, hint: str):
        super().__init__(hint)
        self.signum = signum


def exit_status(main: Callable[[list[str] | None], None]) -> Callable[[list[str] | None], int]:
    """Make `main(argv=None)` return its exit status: 0, 1, 2, or 130 and 143 when stopped by SIGINT and SIGTERM."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        program = Path(main.__globals__["__file__"]).name
        previous = [(each, signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)]
        _on_stop("run the same command again")
        try:
            main(argv)
            return 0
        except UserError as error:
            message, status = str(error), 2
        except RunError as error:
            message, status = str(error), 1
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)):
                raise
            message, status = "out of memory: ask for less, a smaller --batch-size for example", 1
        except Stopped as stop:
            message, status = f"stopped; {stop}", 128 + stop.signum
        finally:
            for signum, handler in previous:
                signal.signal(signum, handler)
        print(f"{program}: {message}", file=sys.stderr)
        return status

    return wrapped


def _on_stop(hint: str) -> None:
    """From now on SIGINT and SIGTERM raise Stopped with this hint."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise Stopped(signum, hint)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)


# Flags


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line, and whose help shows the defaults."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def whole(text: str, least: int = 0) -> int:
    """A whole number of at least `least` that fits 63 bits, for `type=` of a flag."""
    try:
        if least <= (value := int(text)) < 2**63:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a whole number from {least} to 2^63 - 1, not {text!r}")


def positive_int(text: str) -> int:
    """A whole number of at least 1, for `type=` of a flag."""
    return whole(text, least=1)


def positive_float(text: str) -> float:
    """A finite number above 0, for `type=` of a flag."""
    try:
        if 0 < (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text!r}")


def add_dataset_flag(parser: argparse.ArgumentParser) -> None:
    """--dataset."""
    parser.add_argument("--dataset", choices=("mnist", "fashion-mnist"), default="mnist", help="what to learn")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--device and --data-dir."""
    devices = ("auto", "cpu", "cuda", "mps")
    parser.add_argument("--device", choices=devices, default="auto", help="auto: CUDA, then MPS, then the CPU")
    add_data_dir_flag(parser)


def add_data_dir_flag(parser: argparse.ArgumentParser) -> None:
    """--data-dir."""
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", metavar="DIR", help="where the data lie")


def add_flags(parser: argparse.ArgumentParser, epochs: int, batch_size: int, lr: float) -> None:
    """The flags that every model's script has, with the report's values as defaults."""
    parser.add_argument("--epochs", type=positive_int, default=epochs, metavar="N", help="passes over the data")
    parser.add_argument("--batch-size", type=positive_int, default=batch_size, metavar="N", help="images a step")
    parser.add_argument("--lr", type=positive_float, default=lr, metavar="X", help="Adam's (peak) learning rate")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="fixes every random number of the run")
    add_dataset_flag(parser)
    add_machine_flags(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write to DIR/figures, DIR/weights and DIR/checkpoints "
        "(without it: this repository for the report's settings, out/ for others)"
    )  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on from the checkpoint; of a finished run, redraw")
    mode.add_argument("--evaluate", action="store_true", help="no training: the result of the weights, the pictures")
    mode.add_argument(
        "--sample", type=positive_int, metavar="N", help="no training: write N samples to an .npz beside the figures"
    )


def check_batch_size(batch_size: int, images: int) -> None:
    """Raise UserError if a batch is larger than all the training images."""
    if batch_size > images:
        raise UserError(f"--batch-size {batch_size} is larger than the {images} training images")


def device(name: str) -> torch.device:
    """The device that --device names, with float32 in earnest. Raises UserError where this machine does not have it."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(each for each, available in here.items() if available)
    if not here[name]:
        raise UserError(f"--device {name}: PyTorch sees no such device here; use --device auto or cpu")
    if name == "cuda":  # TF32 would keep 10 bits of float32's 23, and cuDNN may add up in any order
        for products in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            products.fp32_precision = "ieee"
        torch.backends.cudnn.deterministic = True
    return torch.device(name)


# Small things that any training needs


def fixed_generator(label: str) -> torch.Generator:
    """A CPU generator for noise that must be the same in every run: seeded by what the noise is for, and nothing else.

    Uniform numbers drawn from it image by image are a function of the label and of the image's index alone.
    """
    return torch.Generator().manual_seed(zlib.crc32(label.encode()))


def fixed_normal(label: str, n: int, dimensions: int) -> Tensor:
    """Standard normal numbers (n, dimensions): a function of the label and of the image's index alone.

    Torch draws normal numbers in blocks of 16 and a ragged last block differently, so n is rounded up for drawing.
    """
    return torch.randn(-(-n // 16) * 16, dimensions, generator=fixed_generator(label))[:n]


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate at `step` of 0 .. steps-1: a linear rise, then half a cosine to 0.

    warmup: the share of the steps that the rise takes, in [0, 1).
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def adam(parameters: Iterable[nn.Parameter], lr: float, **settings: Any) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015) in one pass over the parameters, whose step a CUDA graph can hold.

    For that its learning rate must be a number on the device; it stays so when the state of a run elsewhere is loaded.
    """
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True, **settings)
    _suit_the_device(optimizer)
    optimizer.register_load_state_dict_post_hook(_suit_the_device)
    return optimizer


def _suit_the_device(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        of, lr = group["params"][0].device, float(group["lr"])
        group["capturable"] = of.type == "cuda"
        group["lr"] = torch.tensor(lr, device=of) if group["capturable"] else lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every parameter from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class Captured:
    """A training step, `step(index, *numbers)`, that CUDA records once as a graph and then replays.

    A replay is one launch where the step itself is hundreds. The batch's index and the numbers are copied into the
    memory that the graph reads, and what comes back is memory that the next call writes anew. Random numbers differ
    from replay to replay, as each advances the device's generator. A graph wants the optimizer to have its state and
    the libraries their workspaces, so the first WARM_UP calls run plainly, on the same memory; they are steps of the
    training like all others. On other devices every call is the step's own.
    """

    WARM_UP = 3

    def __init__(self, step: Callable, of: torch.device):
        self._step, self._device = step, of
        self._calls = 0

    def __call__(self, index: Tensor, *numbers: float) -> Any:
        if self._device.type != "cuda":
            return self._step(index, *numbers)
        self._calls += 1
        if self._calls == 1:
            self._memory = [torch.empty_like(index), *(torch.zeros((), device=index.device) for _ in numbers)]
            self._aside = torch.cuda.Stream()  # a graph is not recorded on the default stream
        self._memory[0].copy_(index)
        for memory, number in zip(self._memory[1:], numbers):
            memory.fill_(number)
        if self._calls <= self.WARM_UP:
            self._aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._aside), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*capturable=True")  # Adam's, of steps outside a graph
                returned = self._step(*self._memory)
            torch.cuda.current_stream().wait_stream(self._aside)
            return returned
        if self._calls == self.WARM_UP + 1:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._aside):  # records the step, and does not run it
                self._returned = self._step(*self._memory)
        self._graph.replay()
        return self._returned


def spherical_path(start: Tensor, end: Tensor, points: int) -> Tensor:
    """Spherical interpolation (Shoemake 1985): start and end, (n, d) each, to (n, points, d), both ends included.

    The path turns by equal angles, so that between vectors of equal norm it keeps the norm, where a straight line would
    pass nearer to the origin than draws of N(0, I) ever are. Where the angle is 0 it is that straight line. Between
    opposite vectors there is no one arc, and the result means nothing.
    """
    cosine = (F.normalize(start, dim=-1) * F.normalize(end, dim=-1)).sum(-1).clamp(-1, 1)
    angle = torch.acos(cosine)[:, None, None]  # (n, 1, 1)
    t = torch.linspace(0, 1, points, dtype=start.dtype, device=start.device)[:, None]
    here, there = torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)
    straight = angle == 0
    here, there = torch.where(straight, 1 - t, here), torch.where(straight, t, there)
    return here * start[:, None] + there * end[:, None]


def averaging(step: int, decay: float) -> float:
    """The share of the newest in a running average at `step` of 0, 1, ...: 1 less its decay.

    The decay rises to `decay`, so that the start is soon forgotten.
    """
    return 1 - min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, share: float | Tensor) -> None:
    """Parameters of `average` become 1 - share times themselves plus share times the model's (Polyak averaging)."""
    for mean, value in zip(average.parameters(), model.parameters()):
        mean.lerp_(value, share)


def progress(iterable: Iterable, description: str, total: int | None = None) -> tqdm:
    """A tqdm bar that goes away when done; silent where standard error is no terminal."""
    return tqdm(iterable, desc=description, total=total, leave=False, disable=None)


def seconds_per_1000(sample: Callable[[int], Any], of: torch.device) -> float:
    """Median wall time of `sample(1000)` over five calls, in seconds, after one that warms up."""
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        sample(1000)
        if of.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[2]


def peak_memory_mib(of: torch.device) -> float | None:
    """The most memory held so far, in MiB: on CUDA by tensors on the device, else by this process (None on Windows).

    Linux's getrusage also counts what the parent held when it started this process, /proc/self/status does not.
    """
    if of.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def environment(of: torch.device) -> dict:
    """Where numbers were measured: versions, hardware, threads, and the commit (null outside a git checkout)."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
        commit = described.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if of.type == "cuda" else of.type,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


# Files


def write(path: Path, content: bytes) -> None:
    """Put `content` into the file `path`, whole or not at all: through a temporary file beside it.

    Raises RunError if it cannot be written (a full disk, say); what was there before is then untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        advice = "make room, then run again (a training with --resume)"
        raise RunError(f"cannot write {path} ({error.strerror}); what was there is untouched: {advice}") from None


def folder(path: Path) -> Path:
    """The folder, made if need be. Raises UserError if nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): choose another --out") from None
    return path


def json_bytes(content: Any) -> bytes:
    """Strict JSON: a number that is not finite is an error here, not a surprise for the reader."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def torch_bytes(content: Any) -> bytes:
    """A torch archive. Made in memory because a path's name would get into it: the same content, the same bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_archive(path: Path, what: str, advice: str = "delete it, and train again") -> dict:
    """The dictionary in a torch archive, on the CPU. Raises UserError if the file is damaged or cannot be read.

    what: its name in a message, as in "the weights"; advice: what to do about a damaged one. The zip's checksums are
    tested first, because torch loads flipped bytes without a word.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror})") from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip() is None:
                return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except MemoryError:
        raise
    except Exception:  # damaged bytes end in whatever the reader of the day stumbles over
        pass
    raise UserError(f"{what} {path} is damaged: {advice}")


def load_state(model: nn.Module, archive: dict, path: Path, what: str) -> None:
    """Load the archive's "model" into `model`. Raises UserError if it is of another network."""
    try:
        model.load_state_dict(archive["model"])
    except (KeyError, RuntimeError, TypeError, AttributeError):
        raise UserError(f"{what} {path} is of another network than this program's") from None


# A run


def _random_state_of(kind: str) -> Any:
    """The module that holds the random state of a kind of device: torch.cuda, torch.mps; for the CPU, torch itself."""
    return torch if kind == "cpu" else getattr(torch, kind)


class Run:
    """One training run: its name, folders, settings and history, and what it leaves behind.

    name: of the run, as in `figures/<name>.json`. config: what shapes the result, in JSON's types.
    report: flags whose report runs have other values than the default, e.g. {"z_dim": (20, 2)}.
    """

    def __init__(
        self, name: str, parser: Parser, args: argparse.Namespace, config: dict, report: dict[str, tuple] | None = None
    ):
        self.name = name if args.dataset == "mnist" else f"{name}_{args.dataset}"
        self.args, self.config = args, config
        self.device = device(args.device)
        self.environment = environment(self.device)
        self.command = shlex.join([sys.executable, *sys.argv])
        self.history: list[dict] = []
        self.frames: dict[str, dict[int, Tensor]] = {}  # pictures through training: name -> epoch -> uint8 images
        self.peak_memory: float | None = None  # MiB, over all the processes that worked on the run
        self.parts: dict[str, Any] = {}
        self._trained = False  # whether this process recorded an epoch
        self._note = ""
        self.out = self._choose_out(parser, report or {})
        for each in ("figures", "weights", "checkpoints"):
            folder(self.out / each)

    def _choose_out(self, parser: Parser, report: dict[str, tuple]) -> Path:
        """--out; without it the repository for the report's settings and out/ for others: trials overwrite nothing."""
        if self.args.out is not None:
            return self.args.out
        elsewhere = {"device", "data_dir", "out", "resume", "evaluate", "sample"}
        differing = [
            f"--{flag.replace('_', '-')} {value}"
            for flag, value in vars(self.args).items()
            if flag not in elsewhere and value not in report.get(flag, (parser.get_default(flag),))
        ]
        if not differing:
            return ROOT
        self._note = f"not the report's settings ({', '.join(differing)}): everything goes to {ROOT / 'out'}"
        return ROOT / "out"

    def figure(self, name: str) -> Path:
        """Where a picture or JSON of this run goes: <out>/figures/<run>_<name>."""
        return self.out / "figures" / f"{self.name}_{name}"

    def _files(self, kind: str) -> list[Path]:
        """The run's existing "weights" or "checkpoints". A trial may find the report's, if only to say what differs."""
        places = [self.out] if self.args.out else [self.out, ROOT]
        return [path for path in (place / kind / f"{self.name}.pt" for place in places) if path.exists()]

    def _check(self, archive: dict, path: Path, what: str, but_for: Sequence[str] = ()) -> None:
        """Raise UserError, saying what differs, if `archive` is of another run or, `but_for` keys, configuration."""
        if archive.get("run") != self.name or not isinstance(archive.get("config"), dict):
            raise UserError(f"{what} {path} is of {archive.get('run', 'another program')}, not of {self.name}")
        theirs = archive["config"]
        differing = [
            f"{key} {theirs.get(key)} there, {self.config.get(key)} here"
            for key in sorted((theirs.keys() | self.config.keys()) - set(but_for))
            if theirs.get(key) != self.config.get(key)
        ]
        if differing:
            raise UserError(f"{what} {path} has another configuration ({'; '.join(differing)}): use the same flags")

    # Training

    @property
    def epoch(self) -> int:
        """The epoch in progress: the first without a row in the history."""
        return len(self.history)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, as the history counts them."""
        return sum(row["seconds"] for row in self.history) + time.perf_counter() - self._row_begin

    def start(self, **parts: Any) -> None:
        """Begin, or with --resume go on. `parts` (models, optimizers) have state_dict() and load_state_dict()."""
        if self._note:
            print(f"{self.name}: {self._note}", flush=True)
        self.parts = parts
        if self.args.resume:
            if found := self._files("checkpoints"):
                self._restore(found[0])
            else:
                print(f"{self.name}: no checkpoint in {self.out / 'checkpoints'}, so this is a fresh start", flush=True)
        self._row_begin = time.perf_counter()

    def _restore(self, path: Path) -> None:
        checkpoint = load_archive(path, "the checkpoint")
        self._check(checkpoint, path, "the checkpoint")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint["parts"][name])
            self.history, self.frames = checkpoint["history"], checkpoint["frames"]
            self.environment, self.peak_memory = checkpoint["environment"], checkpoint["peak_memory_mib"]
            for kind, state in checkpoint["rng"].items():
                if kind in ("cpu", self.device.type):
                    _random_state_of(kind).set_rng_state(state)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"the checkpoint {path} does not fit this program ({reason}): train again") from None
        self._hint_at_resuming()

    def _hint_at_resuming(self) -> None:
        again = self.command if self.args.resume else f"{self.command} --resume"
        _on_stop(f"go on from the last checkpoint with: {again}")

    def epochs(self) -> Iterator[int]:
        """0, which is before training, to the last; after a resume, those that the checkpoint does not hold."""
        while self.epoch <= self.args.epochs:
            yield self.epoch

    def panels(self, *fractions: float) -> list[int]:
        """The epochs at these fractions of the training, for pictures through it; no epoch twice."""
        return sorted({round(fraction * self.args.epochs) for fraction in fractions})

    def stamp(self, epoch: int) -> str:
        """`epochNN` for a file's name: as many digits as the last epoch has, and at least two."""
        return f"epoch{epoch:0{max(2, len(str(self.args.epochs)))}d}"

    def steps(self, batches: Iterable[Tensor], total: int) -> Iterable[tuple[int, Tensor]]:
        """The epoch's batches with the number of the training step, counted from 0 over the whole run; shows a bar.

        At epoch 0, before training, the numbers run from -total to -1.
        """
        before = self.history[-1:]  # none yet at epoch 0
        last = "".join(f"  {key} {value:.4g}" for row in before for key, value in row.items() if key != "epoch")
        bar = progress(batches, f"{self.name} epoch {self.epoch}/{self.args.epochs}{last and '  last:'}{last}", total)
        return enumerate(bar, start=(self.epoch - 1) * total)

    def check_finite(self, **losses: Tensor) -> None:
        """Raise RunError if a loss of the epoch's steps (a vector each) is not finite, naming the first bad step."""
        for name, values in losses.items():
            if not (finite := torch.isfinite(values)).all():
                step = int((~finite).nonzero()[0]) + 1
                raise RunError(
                    f"{name} is {float(values[step - 1])} in epoch {self.epoch} at step {step} of {len(values)}: "
                    "diverged; the last checkpoint is kept. Try a smaller --lr"
                )

    def record(self, **figures: float) -> None:
        """End an epoch: its row of the history with these figures and its wall time; a line; the checkpoint.

        A row's `seconds` reach from the row before (from `start`) to here, so each includes the checkpoint that
        precedes it, and nothing between two epochs goes uncounted.
        """
        for name, value in figures.items():
            if not math.isfinite(value):
                raise RunError(f"{name} is {value} after epoch {self.epoch}: diverged; the last checkpoint is kept")
        now = time.perf_counter()
        seconds, self._row_begin = now - self._row_begin, now
        line = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        tqdm.write(f"{self.name}  epoch {self.epoch}/{self.args.epochs}  {line}  {seconds:.1f} s", file=sys.stderr)
        self._trained = True
        self.history.append({"epoch": self.epoch, **figures, "seconds": seconds})
        self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        self._note_peak_memory()
        checkpoint = {
            "run": self.name,
            "config": self.config,
            "environment": self.environment,  # of the process that began
            "history": self.history,  # its length is the number of the next epoch
            "frames": self.frames,
            "peak_memory_mib": self.peak_memory,
            "rng": {kind: _random_state_of(kind).get_rng_state() for kind in ("cpu", self.device.type)},
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        write(self.out / "checkpoints" / f"{self.name}.pt", torch_bytes(checkpoint))
        self._hint_at_resuming()

    def _note_peak_memory(self) -> None:
        peaks = [peak for peak in (self.peak_memory, peak_memory_mib(self.device)) if peak is not None]
        self.peak_memory = max(peaks, default=None)

    # What it leaves

    def is_complete(self, model: nn.Module) -> bool:
        """Whether there was nothing left to train, and the run's JSON tells of just these weights."""
        try:
            content = json.loads((self.out / "figures" / f"{self.name}.json").read_bytes())
            weights = hashlib.sha256(self._weights(model)).hexdigest()
            return not self._trained and (content["config"], content["weights_sha256"]) == (self.config, weights)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _weights(self, model: nn.Module) -> bytes:
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        return torch_bytes({"run": self.name, "config": self.config, "model": state})

    def complete(self, model: nn.Module, result: dict) -> None:
        """The run is over: write its weights, then its JSON, which thereby tells that all else is in place."""
        self._note_peak_memory()
        weights = self._weights(model)
        write(self.out / "weights" / f"{self.name}.pt", weights)
        content = {
            "run": self.name,
            "config": self.config,
            "environment": self.environment,
            "history": self.history,
            "result": {
                **result,
                "parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
                "train_seconds": sum(row["seconds"] for row in self.history),
                "peak_memory_mib": self.peak_memory,
            },
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        write(self.out / "figures" / f"{self.name}.json", json_bytes(content))

    def conclude(self, model: nn.Module, evaluate: Callable[[], dict]) -> None:
        """With --evaluate show the result; else complete the run, unless its JSON already tells of these weights."""
        if self.args.evaluate:
            self.show(evaluate())
        elif not self.is_complete(model):
            self.complete(model, evaluate())

    def recall(self) -> None:
        """For pictures without training: the history from the run's JSON, and the frames from its checkpoint.

        Says what cannot be drawn where one of them is missing, damaged or of another run.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((self.out / "figures" / f"{self.name}.json").read_bytes())
            if content["config"] == self.config:
                self.history = content["history"]
        for path in self._files("checkpoints")[:1]:
            with contextlib.suppress(UserError):
                checkpoint = load_archive(path, "the checkpoint")
                if (checkpoint.get("config"), checkpoint.get("history")) == (self.config, self.history):
                    self.frames = checkpoint.get("frames", {})
        if not self.history:
            print(f"{self.name}: no JSON of this run, so its curves are not drawn", file=sys.stderr)
        if not self.frames:
            print(f"{self.name}: no checkpoint of this run, so its earlier panels are not drawn", file=sys.stderr)

    def show(self, result: dict) -> None:
        """Print a recomputed result as strict JSON. The run's own JSON, a record of its training, stays as it is."""
        if self._note:
            print(f"{self.name}: {self._note}", file=sys.stderr)
        print(json_bytes(result).decode(), end="")

    def save_samples(self, images: Tensor) -> None:
        """Write images (n, 28, 28) uint8 under the key `images` of an .npz beside the figures."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=images.cpu().numpy())
        path = self.figure("samples.npz")
        write(path, buffer.getvalue())
        print(f"{len(images)} samples in {path}")

    def load_weights(self, model: nn.Module, but_for: Sequence[str] = ()) -> None:
        """Load the weights of this run, as trained before. `but_for`: settings that shape the evaluation only.

        Raises UserError if there are none, or none of this configuration.
        """
        found = self._files("weights")
        if not found:
            path = self.out / "weights" / f"{self.name}.pt"
            raise UserError(f"no weights at {path}: train first, with the same flags but --evaluate or --sample")
        for path in found:
            archive = load_archive(path, "the weights")
            try:
                self._check(archive, path, "the weights", but_for)
            except UserError:
                if path == found[-1]:
                    raise
                continue
            load_state(model, archive, path, "the weights")
            return
