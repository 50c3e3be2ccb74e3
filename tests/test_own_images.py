"""Anybody's images: what can be used, how it is split, and one line for what cannot."""

import gzip
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import experiment
import gan
import judge
import mnist
import vae
from cli import UserError
from conftest import ROOT, RUNS, SMALL, VERDICT, contents, result_of
from test_mnist import idx

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (300, 28, 28), np.uint8)
LABELS = np.arange(300) % 3 + 5  # three classes, and no 0 among them


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def medmnist(train=slice(0, 200), val=slice(200, 230), test=slice(230, 300)):
    """Arrays under MedMNIST's keys, with their labels as columns."""
    parts = {"train": train, "val": val, "test": test}
    images = {f"{name}_images": IMAGES[part] for name, part in parts.items()}
    return images | {f"{name}_labels": LABELS[part, None] for name, part in parts.items()}


def pictures(folder, classes=("cats", "dogs"), n=220, size=(40, 30)):
    """A folder of `n` random pictures, spread over the classes."""
    for number in range(n):
        there = folder / classes[number % len(classes)] if classes else folder
        there.mkdir(parents=True, exist_ok=True)
        Image.fromarray(GENERATOR.integers(0, 256, size, np.uint8)).save(there / f"{number}.png")
    return folder


# An .npz


def test_medmnists_keys_and_its_own_validation_set(tmp_path):
    data = mnist.load(npz(tmp_path / "x.npz", **medmnist()), tmp_path)
    assert torch.equal(data.images, torch.from_numpy(IMAGES[:230])) and data.validation == 30 and data.classes == 3
    assert torch.equal(data.train_images, torch.from_numpy(IMAGES[:200]))
    assert torch.equal(data.validation_images, torch.from_numpy(IMAGES[200:230]))
    assert torch.equal(data.test_images, torch.from_numpy(IMAGES[230:]))
    assert data.labels.tolist() == (LABELS[:230] - 5).tolist() and data.test_labels.dtype == torch.int64
    assert data.test_labels.tolist() == (LABELS[230:] - 5).tolist()


def test_kerass_keys_and_a_trailing_axis(tmp_path):
    keys = {"x_train": IMAGES[:240, ..., None], "y_train": LABELS[:240], "x_test": IMAGES[240:, ..., None]}
    data = mnist.load(npz(tmp_path / "x.npz", **keys, y_test=LABELS[240:]), tmp_path)
    assert data.images.shape == (240, 28, 28) and data.validation == 40 and data.classes == 3
    assert torch.equal(data.test_images, torch.from_numpy(IMAGES[240:]))


def test_one_array_as_sample_writes_it(tmp_path):
    data = mnist.load(npz(tmp_path / "x.npz", images=IMAGES), tmp_path)
    splits = (data.train_images, data.validation_images, data.test_images)
    assert [len(each) for each in splits] == [240, 30, 30] and data.labels is None and data.classes == 0
    assert torch.equal(torch.cat(splits), torch.from_numpy(IMAGES))


def test_several_labels_for_an_image_are_none(tmp_path):
    data = mnist.load(npz(tmp_path / "x.npz", images=IMAGES, labels=np.ones((300, 14), int)), tmp_path)
    assert data.labels is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": IMAGES / 255.0}, "float64, not uint8: scale"),
        ({"images": np.repeat(IMAGES[..., None], 3, -1)}, "colour images"),
        ({"images": IMAGES[:, :20]}, "(300, 20, 28), not (N, 28, 28)"),
        ({"images": IMAGES.reshape(300, 784)}, "(300, 784), not (N, 28, 28): reshape them"),
        ({"images": IMAGES[:, None]}, "(300, 1, 28, 28), not (N, 28, 28): reshape them"),
        ({"images": IMAGES[:0]}, "at least 200"),
        ({"images": IMAGES[:199]}, "at least 200"),
        ({"images": np.zeros(())}, "float64"),
        ({"images": IMAGES // 200}, "0 .. 255"),
        ({"images": np.array([{}, []], object)}, "no objects"),
        ({"images": IMAGES, "labels": LABELS / 2}, "whole number"),
        ({"images": IMAGES, "labels": LABELS[:299]}, "(299,)"),
        ({"pictures": IMAGES}, "holds pictures: name them train_images"),
        ({"x_train": IMAGES}, "no x_test"),
        ({"x_train": IMAGES[:200], "x_test": IMAGES[200:], "y_train": LABELS[:200]}, "y_train and no y_test"),
        ({"train_images": IMAGES[:200], "val_images": IMAGES[:5], "test_images": IMAGES[200:]}, "5 validation"),
        ({"train_images": IMAGES[:200], "test_images": IMAGES[200:, :9]}, "(test_images) holds images of shape"),
        (medmnist(val=slice(0)), "0 validation"),
        ({"x_train": np.uint8(9), "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS}, "images of shape ()"),
    ],
)
def test_an_npz_of_no_use_is_one_line(tmp_path, capsys, arrays, words):
    path = npz(tmp_path / "bad.npz", **arrays)
    assert gan.main(["--dataset", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and "bad.npz" in error
    assert [each.name for each in tmp_path.iterdir()] == ["bad.npz"]


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_npz_is_one_line(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.npz is no readable \.npz .*numpy\.savez") as error:
        mnist.load(tmp_path / "bad.npz", tmp_path)
    assert "\n" not in str(error.value)


# IDX files


def stored(folder, names="{}-images-idx3-ubyte {}-labels-idx1-ubyte", test="t10k", labels=True):
    folder.mkdir()
    for split, part in (("train", slice(0, 240)), (test, slice(240, 300))):
        images, classes = (name.format(split) for name in names.split())
        for name, array in ((images, IMAGES[part]), (classes, LABELS[part]))[: 1 + labels]:
            (folder / name).write_bytes(gzip.compress(idx(array)) if name.endswith(".gz") else idx(array))
    return folder


@pytest.mark.parametrize(
    ("names", "test"),
    [
        ("{}-images-idx3-ubyte {}-labels-idx1-ubyte", "t10k"),
        ("{}-images-idx3-ubyte.gz {}-labels-idx1-ubyte.gz", "t10k"),  # KMNIST's
        ("{}-images.idx3-ubyte {}-labels.idx1-ubyte", "t10k"),  # with a dot, as some mirrors have it
        ("emnist-digits-{}-images-idx3-ubyte.gz emnist-digits-{}-labels-idx1-ubyte.gz", "test"),
    ],
)
def test_idx_files(tmp_path, names, test):
    data = mnist.load(stored(tmp_path / "x", names, test), tmp_path)
    upright = IMAGES.transpose(0, 2, 1) if "emnist" in names else IMAGES
    assert torch.equal(torch.cat((data.images, data.test_images)), torch.from_numpy(upright.copy()))
    assert data.validation == 40 and data.test_labels.tolist() == (LABELS[240:] - 5).tolist()


def test_qmnists_labels_and_a_gz_that_a_browser_unpacked(tmp_path):
    folder = stored(tmp_path / "x", "qmnist-{}-images-idx3-ubyte.gz qmnist-{}-labels-idx1-ubyte", "test")
    for name, part in (("train", slice(0, 240)), ("test", slice(240, 300))):
        (folder / f"qmnist-{name}-labels-idx1-ubyte").unlink()
        array = np.stack([LABELS[part]] + [np.arange(len(LABELS[part])) * 1000] * 7, axis=1)
        header = bytes([0, 0, 0x0C, 2]) + np.array(array.shape, ">i4").tobytes()
        (folder / f"qmnist-{name}-labels-idx2-int").write_bytes(header + array.astype(">i4").tobytes())
        images = folder / f"qmnist-{name}-images-idx3-ubyte.gz"
        images.write_bytes(gzip.decompress(images.read_bytes()))
    data = mnist.load(folder, tmp_path)
    assert data.labels.tolist() == (LABELS[:240] - 5).tolist() and data.images.shape == (240, 28, 28)


def test_idx_files_need_no_labels(tmp_path):
    assert mnist.load(stored(tmp_path / "x", labels=False), tmp_path).labels is None


def test_idx_files_of_no_use_are_one_line(tmp_path):
    folder = stored(tmp_path / "x")
    train, train_labels, test, test_labels = (folder / name for name in mnist.FILES)
    whole = {path: path.read_bytes() for path in (train, train_labels, test, test_labels)}
    for path, content, words in (
        (test_labels, None, "no file of the test images' labels"),
        (test, None, "no test images"),
        (train, whole[train][:-1], "train-images-idx3-ubyte is no whole IDX file"),
        (train, b"", "is no whole IDX file"),
        (train, b"<html>not found</html>", "does not begin as an IDX file"),
        (train_labels, whole[test_labels], r"labels of shape \(60,\)"),
        (folder / "emnist-letters-train-images-idx3-ubyte", whole[train], "several sets of train images"),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=words) as error:
            mnist.load(folder, tmp_path)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        path.unlink(missing_ok=True)
        if path in whole:
            path.write_bytes(whole[path])
    assert mnist.load(folder, tmp_path).classes == 3


# Pictures


def test_pictures_of_classes_and_of_none(tmp_path):
    folder = pictures(tmp_path / "x")
    (folder / "cats" / "notes.txt").write_text("no picture")
    data = mnist.load(folder, tmp_path)
    sizes = [len(data.train_images), data.validation, len(data.test_images)]
    assert sum(sizes) == 220 and min(sizes[1:]) >= 10 and sizes[0] > 150
    assert data.classes == 2 and (data.labels.sum() + data.test_labels.sum()) == 110
    plain = mnist.load(pictures(tmp_path / "y", classes=()), tmp_path)
    assert plain.labels is None and len(plain.images) + len(plain.test_images) == 220


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    for classes in ((), ("cats", "dogs")):
        folder = pictures(tmp_path / f"{len(classes)} classes", classes)
        for name in (".ipynb_checkpoints/1.png", "__MACOSX/2.png", "._3.png", ".hidden/cats/4.png"):
            for there in (folder, *(folder / each for each in classes)):
                (there / name).parent.mkdir(parents=True, exist_ok=True)
                (there / name).write_bytes(b"of another system")
        data = mnist.load(folder, tmp_path)
        assert len(data.images) + len(data.test_images) == 220 and data.classes == len(classes)


def test_a_picture_goes_to_the_same_split_whatever_lies_beside_it(tmp_path):
    folder = pictures(tmp_path / "x", classes=(), n=260)
    before = mnist.load(folder, tmp_path)
    tests = {each.numpy().tobytes() for each in before.test_images}
    validation = {each.numpy().tobytes() for each in before.validation_images}
    for number in range(0, 260, 7):
        (folder / f"{number}.png").unlink()
    moved = folder.rename(tmp_path / "elsewhere")
    after = mnist.load(moved, tmp_path)
    assert {each.numpy().tobytes() for each in after.test_images} < tests
    assert {each.numpy().tobytes() for each in after.validation_images} < validation


def test_a_picture_is_what_is_seen(tmp_path):
    """Upright as its camera says, transparent paper white, 16 bits as 8, the centre of the longer side."""
    left = np.zeros((56, 56), np.uint8)
    left[:, :28] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(left).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = np.asarray(mnist._picture(str(tmp_path / "turned.jpg")).convert("L"))
    assert turned[:, :28].max() < 20 and turned[:, 30:].min() > 230
    Image.fromarray(np.zeros((28, 28, 4), np.uint8)).save(tmp_path / "clear.png")
    assert np.asarray(mnist._picture(str(tmp_path / "clear.png"))).min() == 255
    Image.fromarray(np.full((28, 28), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    assert np.unique(np.asarray(mnist._picture(str(tmp_path / "deep.png")))).tolist() == [0x80]
    wide = np.zeros((28, 84), np.uint8)
    wide[:, 28:56] = 200
    folder = pictures(tmp_path / "x", classes=())
    for path in folder.iterdir():
        Image.fromarray(wide).save(path)
    assert mnist.load(folder, tmp_path).images.unique().tolist() == [200]


def test_folders_of_no_use_are_one_line(tmp_path):
    def fails(folder, words):
        with pytest.raises(UserError, match=words) as error:
            mnist.load(folder, tmp_path)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)

    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no pictures")
    fails(pictures(tmp_path / "few", n=30), "at least 200")
    fails(pictures(tmp_path / "splits", classes=("train", "test")), "a folder for each split")
    folder = pictures(tmp_path / "both", classes=())
    (folder / "cats").mkdir()
    fails(folder, r"0\.png beside the subfolder cats: put all")
    folder = pictures(tmp_path / "broken")
    for content in (b"", b"text", (folder / "cats" / "0.png").read_bytes()[:-300]):
        (folder / "dogs" / "7.png").write_bytes(content)
        fails(folder, r"7\.png is no picture that can be read")


# Runs


@pytest.mark.parametrize("text", ["nowhere.npz", "/"])
def test_a_path_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match="--dataset"):
        vae.flags().parse_args([f"--dataset={text}"])


@pytest.mark.parametrize("name", ["a:b.npz", "-x.npz", "a\nb.npz", f"{'x' * 100}.npz", "what?.npz", "x .npz"])
def test_names_that_no_file_system_likes(tmp_path, name):
    npz(tmp_path / "x.npz", images=IMAGES).rename(tmp_path / name)
    with pytest.raises(UserError, match=r"--dataset: .*rename it"):
        vae.flags().parse_args([f"--dataset={tmp_path / name}"])


def test_a_config_names_the_data_without_their_place(tmp_path):
    for name, expected in (("mnist.npz", "mnist.npz"), ("mnist", "mnist/"), ("Ziffern äöü", "Ziffern äöü/")):
        there = tmp_path / name
        there.touch() if there.suffix else there.mkdir()
        args = vae.flags().parse_args([f"--dataset={there}"])
        assert cli.settings(args)["dataset"] == expected and expected != "mnist"


def test_different_folders_name_different_runs(tmp_path):
    """Also those that torchvision makes, which are all called `raw`."""
    for place, name in (("KMNIST/raw", "KMNIST"), ("QMNIST/raw", "QMNIST"), ("x.v1", "x.v1"), ("x.v2", "x.v2")):
        (tmp_path / place).mkdir(parents=True)
        args = vae.flags().parse_args([f"--dataset={tmp_path / place}", f"--out={tmp_path}"])
        run = experiment.Run("vae", vae.flags(), args)
        names = run.name, judge.name_of(args.dataset), run.config["dataset"]
        assert names == (f"vae_{name}", f"judge_{name}", f"{name}/")
    assert cli.stem(tmp_path / "x.v1" / ".." / "raw") == "raw"  # no folder
    (tmp_path / "raw").mkdir()
    assert cli.stem(tmp_path / "x.v1" / ".." / "raw") == tmp_path.name


@pytest.mark.parametrize("script", RUNS)
def test_every_script_trains_on_200_images_without_labels(tmp_path, monkeypatch, script):
    module = importlib.import_module(script)
    monkeypatch.setattr(judge, "JUDGED", 100)
    monkeypatch.setattr(module, "seconds_per_1000", lambda *_: 0.0)
    path = npz(tmp_path / "own.npz", images=IMAGES[:200])
    flags = [*SMALL[script], "--dataset", str(path), "--out", str(tmp_path / "out")]
    assert module.main(flags) == 0
    content = result_of(tmp_path / "out", f"{RUNS[script]}_own")
    assert content["config"]["dataset"] == "own.npz" and not content["result"].keys() & VERDICT
    assert module.main([*flags, "--resume"]) == 0
    assert module.main([*flags, "--sample", "5"]) == 0


def test_a_judge_of_ones_own_images_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(judge.SETTINGS, "epochs", 1)
    monkeypatch.setattr(judge, "JUDGED", 100)
    monkeypatch.setattr(judge, "FEWEST", 100)
    path, out = npz(tmp_path / "own.npz", images=IMAGES, labels=LABELS), tmp_path / "out"
    flags = ["--dataset", str(path), "--out", str(out)]
    assert judge.main(["--train", *flags]) == 0
    content = result_of(out, "judge_own")
    assert content["config"]["dataset"] == "own.npz" and len(content["result"]["floor"]["class_counts"]) == 3
    assert vae.main([*SMALL["vae"], *flags]) == 0
    assert len(result_of(out, "vae_z20_own")["result"]["class_counts"]) == 3
    assert vae.main([*SMALL["vae"], *flags, "--sample", "100"]) == 0
    capsys.readouterr()
    assert judge.main([str(out / "figures" / "vae_z20_own_samples.npz"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6  # what, head, three of the floor, the file
    assert lines[2].index("(mean") == lines[3].index("(least") == lines[4].index("(greatest")
    other = npz(tmp_path / "elsewhere.npz", images=IMAGES)
    assert judge.main(["--train", "--dataset", str(other), "--out", str(out)]) == 2
    assert "no labels" in capsys.readouterr().err
    folder = pictures(tmp_path / "own")  # of the same stem
    assert (
        judge.main([str(out / "figures" / "vae_z20_own_samples.npz"), "--dataset", str(folder), "--out", str(out)]) == 2
    )
    assert "is of own.npz, not of own/" in capsys.readouterr().err


def test_as_a_user_types_it(tmp_path):
    """From the folder with the images, and by their name there, which the run's files bear."""
    npz(tmp_path / "own.npz", images=IMAGES)
    command = [sys.executable, ROOT / "code" / "vae.py", "--dataset", "own.npz", "--out", "here", *SMALL["vae"]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 4, done.stderr
    assert "images without labels" in done.stderr and "judge.py" not in done.stderr
    assert "figures/vae_z20_own.json" in contents(tmp_path / "here")
    assert str(tmp_path) not in json.dumps(result_of(tmp_path / "here", "vae_z20_own"))
