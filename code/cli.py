"""The command line of the scripts: errors and exit status, flags, the device, progress bars."""

import argparse
import contextlib
import functools
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent


# OpenMP's threads spin while they wait for each other, for milliseconds by default. On a busy machine the one that is
# waited for may have no core, because the others spin on it. A short spin costs a quiet machine little (docs/speed.md).
SPIN = {"GOMP_SPINCOUNT": "1000"}  # of GNU's OpenMP, which PyTorch has on Linux; others do not read it


def _before_torch() -> None:
    """What has to be settled before torch is loaded, so a script imports this module first. Elsewhere nothing happens.

    SPIN is set, unless the user has said how threads wait. Ctrl-C ends the imports as it ends any program, without a
    traceback. A standard stream that is closed stays so, but its number must not go to the next file that is opened,
    into which a library's warnings would then be written. What an encoding lacks is escaped.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    if not script or Path(script).resolve().parent != Path(__file__).resolve().parent:
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not os.environ.keys() & {*SPIN, "OMP_WAIT_POLICY"}:
        os.environ |= SPIN
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


_before_torch()

# isort: split
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

TOO_LARGE = re.compile(  # what allocators, numpy and torch say of memory that is not there, or that no machine has
    "allocate memory|not enough memory|out of memory|ALLOC_FAILED|size calculation overflowed|Overflow when unpacking"
    "|array is too big|maximum possible size|too large to convert|paging file is too small",
    re.IGNORECASE,
)
BROKEN_PIPE = 13  # SIGPIPE's number, which Windows does not have

at_end = contextlib.ExitStack()  # what is undone when `main` ends, however it ends


class UserError(Exception):
    """What the user got wrong, in one line that says what to do. Exit status 2."""


class RunError(Exception):
    """A run that failed, in one line. Exit status 1."""


class Stopped(BaseException):
    """SIGINT or SIGTERM: its number, and a hint. Not an Exception, so that no handler for errors swallows it."""


def exit_status(main: Callable[[list[str] | None], None]) -> Callable[[list[str] | None], int]:
    """Make `main(argv=None)` return its exit status: 0, 1, 2, or 130 and 143 when stopped by SIGINT and SIGTERM."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        program = Path(main.__globals__["__file__"]).name
        previous = [(each, signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)]
        on_stop("run the same command again")
        message, status = "", 0
        try:
            with at_end:
                main(argv)
        except (UserError, RunError) as error:
            message, status = str(error), 2 if isinstance(error, UserError) else 1
            if isinstance(error, UserError) and local_rank():
                message = ""  # a mistake is every process's, and the first on a machine tells of it
        except Stopped as stop:
            for signum, _ in previous:
                signal.signal(signum, signal.SIG_IGN)  # who presses Ctrl-C twice means the same
            message, status = stop.args[1] and f"stopped; {stop.args[1]}", 128 + stop.args[0]
            message = "" if rank() else message  # all are stopped, and one says so
        except Exception as error:
            if not (isinstance(error, MemoryError) or TOO_LARGE.search(str(error))):
                raise
            less = "a smaller model, --batch-size or --sample, whichever is large here"
            message, status = f"out of memory: ask for less ({less})", 1
        finally:
            if message:
                say(f"{program}: {message}")
            for stream in (sys.stdout, sys.stderr):
                _let_go(stream)
            for signum, handler in previous:
                signal.signal(signum, handler)
        return status

    return wrapped


def _let_go(stream: Any) -> None:
    """Flush a standard stream; where that fails, what it holds is given up, or Python would complain at its exit."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def say(line: str) -> None:
    """A line for whoever watches, on standard error; one that cannot be written there is not worth a run."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        tqdm.write(line, file=sys.stderr)


def tell(line: str) -> None:
    """A line of what was asked for, on standard output. Raises RunError if it cannot be written there.

    If its reader has gone (`| head`), that stops the program without a word, as it does any other.
    """
    if sys.stdout is None:
        raise RunError("standard output is closed, so there is nowhere to put the result")
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise Stopped(BROKEN_PIPE, "") from None
    except OSError as error:
        raise RunError(f"cannot write to standard output ({error.strerror})") from None


def on_stop(hint: str) -> None:
    """From now on SIGINT and SIGTERM raise Stopped with this hint, but for one that whoever started us has ignored."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise Stopped(signum, hint)

    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, stop)


def typed(command: Sequence[str]) -> str:
    """A command as it is typed into this system's shell."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def hint_at_resuming() -> None:
    """From now on a stopped run says which command goes on from its checkpoint."""
    command = [sys.executable, *sys.argv] + ([] if "--resume" in sys.argv else ["--resume"])
    how = f": {typed(command)}" if processes() == 1 else " the same command and --resume"
    on_stop(f"go on from the last checkpoint with{how}")


def as_flags(settings: dict[str, Any]) -> str:
    """Settings as they are typed."""
    words = {key: value if isinstance(value, list | tuple) else [value] for key, value in settings.items()}
    return " ".join(" ".join((f"--{key.replace('_', '-')}", *map(str, value))) for key, value in words.items())


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line, and whose help shows the defaults.

    doc: the script's docstring (None under `python -OO`), of which the help shows the first line. best: other defaults,
    which the flag --best, anywhere among the others, puts in place.
    """

    def __init__(self, doc: str | None, best: dict[str, Any] | None = None):
        super().__init__(description=(doc or "").partition("\n")[0], allow_abbrev=False, formatter_class=_Help)
        self.best = best
        if best:
            self.add_argument("--best", action="store_true", help=f"the record run's settings: {as_flags(best)}")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """argparse's; --best changes this parser's defaults for good, so `get_default` tells of the record run's."""
        if self.best and "--best" in (sys.argv[1:] if args is None else args):
            self.set_defaults(**self.best)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def _number(kind: type, fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """For `type=` of a flag: a number of a kind that fits; `what` describes it."""

    def parse(text: str) -> Any:
        try:
            if fits(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")

    return parse


nonnegative_int = _number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
positive_int = _number(int, lambda n: 1 <= n < 2**63, "a whole number from 1 to 2^63 - 1")
layers = _number(int, lambda n: 1 <= n <= 1000, "a whole number from 1 to 1,000")
positive_float = _number(float, lambda x: 0 < x < math.inf, "a finite number above 0")
fraction = _number(float, lambda x: 0 <= x < 1, "a number from 0 up to, but not including, 1")
open_fraction = _number(float, lambda x: 0 < x < 1, "a number between 0 and 1")


def path(text: str) -> Path:
    """For `type=` of a flag: a path that is not empty, as a shell's unset variable is; ~ is the user's home."""
    try:
        if text.strip():
            return Path(text).expanduser()
    except RuntimeError:  # a user that does not exist
        pass
    raise argparse.ArgumentTypeError(f"must name a file or a folder, not {text!r}")


DATASETS = ("mnist", "fashion-mnist")


def dataset(text: str) -> str | Path:
    """For `type=` of --dataset: one of DATASETS, or the absolute path of a file or folder whose name can name a run."""
    if text in DATASETS:
        return text
    there = path(text).absolute()
    try:
        if not there.exists():
            known = ", ".join(DATASETS)
            raise argparse.ArgumentTypeError(f"must be {known}, or an .npz or a folder that exists, not {text!r}")
        there = there.resolve() if there.name in ("", "..") else there
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be looked at ({error.strerror})") from None
    if not re.fullmatch(r"\w([\w .+-]{0,58}\w)?", stem(there)):
        what = "letters, digits, blanks and . + - _ between them, at most 60"
        raise argparse.ArgumentTypeError(f"{text!r} would name the run's files: rename it, to {what}")
    return there


def stem(dataset: str | Path) -> str:
    """What the names of a run and of a judge say of their data: of a folder `raw`, as torchvision's are, its parent."""
    if isinstance(dataset, str) or not dataset.is_dir():
        return Path(dataset).stem
    return dataset.parent.resolve().name if dataset.name == "raw" else dataset.name


def dataset_name(dataset: str | Path) -> str:
    """What a run's config says of its data: no path, and another name than those of DATASETS."""
    return dataset if isinstance(dataset, str) else f"{stem(dataset)}/" if dataset.is_dir() else dataset.name


# Flags that do not shape a result.
MACHINE = {"best", "device", "data_dir", "out", "resume", "evaluate", "sample", "temperature"}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """A run's config: every flag but the machine's, in JSON's types."""
    config = {name: value for name, value in vars(args).items() if name not in MACHINE}
    return config | {"dataset": dataset_name(args.dataset)}


def rank() -> int:
    """The number of this process among those that torchrun started for one training: 0 evaluates, draws and writes."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return int(os.environ["LOCAL_RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def processes() -> int:
    """How many processes train together; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def add_data_flags(parser: argparse.ArgumentParser, device: bool = True, dataset_too: bool = True) -> None:
    """--data-dir and, unless told not to, --dataset and --device."""
    if dataset_too:
        what = f"what to learn: {', '.join(DATASETS)}, an .npz, a folder of IDX files or of pictures (docs/data.md)"
        parser.add_argument("--dataset", type=dataset, default="mnist", metavar="NAME|PATH", help=what)
    if device:
        names = ("auto", "cpu", "cuda", "mps")
        parser.add_argument("--device", choices=names, default="auto", help="auto: CUDA, then MPS, then the CPU")
    parser.add_argument("--data-dir", type=path, default=ROOT / "data", metavar="DIR", help="the data's folder")


def add_flags(
    parser: argparse.ArgumentParser, epochs: int, batch_size: int, lr: float, betas: tuple[float, float]
) -> None:
    """The flags that every model's script has, with the report's values as defaults."""
    parser.add_argument("--epochs", type=positive_int, default=epochs, metavar="N", help="passes over the data")
    parser.add_argument("--batch-size", type=positive_int, default=batch_size, metavar="N", help="images in a step")
    parser.add_argument("--lr", type=positive_float, default=lr, metavar="X", help="Adam's (peak) learning rate")
    parser.add_argument("--betas", type=fraction, nargs=2, default=[*betas], metavar="X", help="Adam's decay rates")
    parser.add_argument("--seed", type=nonnegative_int, default=0, metavar="N", help="fixes the run's random numbers")
    add_data_flags(parser)
    where = "write to DIR/figures, weights, checkpoints (without it: this repository; out/ if a setting differs)"
    parser.add_argument("--out", type=path, metavar="DIR", help=where)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on from the checkpoint; of a finished run, redraw")
    mode.add_argument("--evaluate", action="store_true", help="no training: the result of the weights, the pictures")
    mode.add_argument("--sample", type=positive_int, metavar="N", help="no training: N samples to an .npz in figures/")


def device(name: str) -> torch.device:
    """The device that --device names, with exact float32. Raises UserError where this machine does not have it.

    `auto` passes over one that PyTorch sees and cannot use, as where it has no kernels for an older GPU.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here["mps"] &= processes() == 1  # gloo has no way for its tensors
    candidates = [each for each, available in here.items() if available and name in (each, "auto")]
    if not candidates:
        several = " for several processes" if processes() > 1 else ""
        raise UserError(f"--device {name}: PyTorch sees no such device here{several}; use --device auto or cpu")
    for each in candidates:
        if each == "cuda" and processes() > 1:  # before the probe, which would put every process on the first GPU
            wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
            if wanted > there:
                raise UserError(f"{there} GPUs here are too few for {wanted} processes: start fewer, or --device cpu")
            torch.cuda.set_device(local_rank())
        try:
            torch.ones(1, device=each).add(1).item()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            if name != "auto":
                raise UserError(f"--device {name} cannot be used ({reason}): use --device cpu") from None
            say(f"the device {each} is there but cannot be used ({reason}); going on without it")
        else:
            name = each
            break
    if name == "cuda":  # TF32 would keep 10 bits of float32's 23, and cuDNN may add up in any order
        for products in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            products.fp32_precision = "ieee"
        torch.backends.cudnn.deterministic = True
    return torch.device(name)


def progress(iterable: Iterable, description: str, total: int | None = None, initial: int = 0) -> tqdm:
    """A tqdm bar that goes away when done; silent where standard error is no terminal."""
    hidden = True if rank() else None  # None: where standard error is no terminal
    return tqdm(iterable, desc=description, total=total, initial=initial, leave=False, disable=hidden)
