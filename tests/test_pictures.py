"""Pictures: fixed value range, layout, and the same bytes for the same data."""

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
from conftest import ROOT

HISTORY = [{"epoch": e, "train_elbo": -500.0 / (e + 1), "val_elbo": -510.0 / (e + 1)} for e in range(5)]


def test_tile_puts_images_row_by_row_and_keeps_their_values():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1).expand(6, 28, 28)  # six faint, flat images
    picture = pictures.tile(images, columns=3, gap=2)
    assert picture.shape == (2 * 30 - 2, 3 * 30 - 2)
    assert [int(picture[y, x]) for y in (0, 30) for x in (0, 30, 60)] == [0, 1, 2, 3, 4, 5]
    assert (picture[:, 28:30] == 255).all() and (picture[28:30] == 255).all()
    with pytest.raises(ValueError, match="rows of 4"):
        pictures.tile(images, columns=4)
    with pytest.raises(ValueError, match="float32"):
        pictures.tile(images.float(), columns=3)


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 0.5, 1.0, 2.0])
    assert pictures.to_uint8(values).tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_same_data_same_bytes(tmp_path):
    images = torch.randint(256, (4, 28, 28), dtype=torch.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pictures.save_grid(tmp_path / name / "x.v1_grid", images, columns=2)  # the dot begins no suffix
        pictures.save_gif(tmp_path / name / "x.v1_film", [image.numpy() for image in images])
        keys = ("train_elbo", "val_elbo")
        pictures.save_training_curves(tmp_path / name / "x.v1_curves", HISTORY, keys, "nats", "ELBO")
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert written == ["x.v1_curves.pdf", "x.v1_curves.png", "x.v1_film.gif", "x.v1_grid.png"]
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert b"CreationDate" not in (tmp_path / "a" / "x.v1_curves.pdf").read_bytes()


def test_gif_has_every_frame_within_half_a_grey_step(tmp_path):
    frames = [np.full((8, 8), value, np.uint8) for value in (0, 100, 255)]
    pictures.save_gif(tmp_path / "film", frames)
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames == 3
    for index, frame in enumerate(frames):
        film.seek(index)
        assert np.abs(np.asarray(film.convert("L")).astype(int) - frame).max() <= 15


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_curves_of_any_length(tmp_path, rows):
    pictures.save_training_curves(tmp_path / "curves", HISTORY[:rows], ("train_elbo", "val_elbo"), "nats", "ELBO")
    size = Image.open(tmp_path / "curves.png").size
    for name in ("vae_z20_elbo", "vae_z2_elbo", "nf_bpd"):  # are as they are drawn today
        assert Image.open(ROOT / "figures" / f"{name}.png").size == size
