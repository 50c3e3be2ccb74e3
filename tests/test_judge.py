"""The judge: its measures against closed forms, its errors, and the frozen weights on real images."""

import hashlib
import importlib
import io
import json
import math
import shutil
import zipfile

import numpy as np
import pytest
import torch
from torch import Tensor

import experiment
import judge
import mnist
import vae
from cli import UserError
from conftest import ROOT, RUNS, SMALL, VERDICT, lasting, result_of, run_script


@pytest.fixture(scope="module")
def model() -> judge.Judge:
    return judge.load(torch.device("cpu"), ROOT)


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_a_set_with_itself_is_zero():
    a = normal(500, 20, 0) @ normal(20, 20, 1)
    assert judge.frechet_distance(a, a) < 1e-9 * a.square().sum(1).mean()
    assert judge.frechet_distance(a, a.flip(0)) < 1e-9 * a.square().sum(1).mean()


def test_frechet_distance_of_two_gaussians_in_closed_form():
    """With exact moments and commuting covariances it is |difference of means|^2 + sum of (sd_a - sd_b)^2."""
    z = normal(400, 6, 2)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # covariance exactly I
    rotation = torch.linalg.qr(normal(6, 6, 3)).Q
    sd_a, sd_b = torch.tensor([1, 2, 3, 0.1, 0, 1]).double(), torch.tensor([2, 2, 1, 0.5, 1, 0]).double()
    shift = torch.arange(6.0, dtype=torch.float64)
    expected = shift.square().sum() + (sd_a - sd_b).square().sum()
    ours = judge.frechet_distance(z * sd_a @ rotation, (z * sd_b + shift) @ rotation)
    assert ours == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_agrees_with_the_eigenvalues_of_the_product():
    """tr (AB)^1/2 is the sum of the roots of AB's eigenvalues; AB is not symmetric."""
    a, b = normal(300, 12, 4) @ normal(12, 12, 5) + 1, normal(200, 12, 6) @ normal(12, 12, 7)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    expected = ((a.mean(0) - b.mean(0)).square().sum() + torch.trace(cov_a + cov_b) - 2 * root).item()
    assert judge.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert judge.frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_radii_are_distances_to_the_third_nearest_other_row():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0], [20.0]], dtype=torch.float64)
    assert judge.squared_radii(line).tolist() == [49, 36, 16, 49, 361]


def covered(a: Tensor, by: Tensor) -> float:
    return judge.covered(a, by, judge.squared_radii(by))


def test_covered_against_a_plain_loop():
    a, b = normal(60, 3, 8), 1.5 * normal(40, 3, 9)
    reach = [sorted(math.dist(row, other) for other in b.tolist())[judge.NEIGHBOURS] for row in b.tolist()]
    inside = [any(math.dist(row, each) <= r for each, r in zip(b.tolist(), reach)) for row in a.tolist()]
    assert 0 < sum(inside) < 60
    assert covered(a, by=b) == sum(inside) / 60


def test_precision_and_recall_tell_missing_modes_from_bad_samples():
    real = torch.cat((normal(500, 2, 10), normal(500, 2, 11) + 20))
    one_mode = normal(1000, 2, 12)
    assert covered(one_mode, by=real) > 0.9 and 0.4 < covered(real, by=one_mode) < 0.55
    scattered = torch.cat((normal(500, 2, 13), normal(500, 2, 14) + 20, 500 * normal(1000, 2, 15)))
    assert covered(scattered, by=real) < 0.6 and covered(real, by=scattered) > 0.9


def test_a_verdict_is_of_the_samples_against_the_reference(model):
    """Which side is which: all samples are of one real image, and near it; most real ones are near none of them."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(256, (50, 28, 28), generator=generator, dtype=torch.uint8)
    result = judge.verdict(model, real[:1].expand(20, 28, 28), real)
    assert result["precision"] == 1 and result["recall"] <= 0.1 and sum(result["class_counts"]) == 20
    ours, theirs = (judge.features_and_logits(model, each)[0] for each in (real[:1].expand(20, 28, 28), real))
    assert result["fid"] == pytest.approx(judge.frechet_distance(ours, theirs), rel=1e-9)


# The frozen judge


def test_accuracy_is_that_of_the_json(model, data):
    _, logits = judge.features_and_logits(model, data.test_images)
    accuracy = (logits.argmax(1) == data.test_labels).double().mean().item()
    assert accuracy == pytest.approx(result_of(ROOT, "judge")["result"]["test_accuracy"], abs=2e-4)
    assert accuracy >= 0.992


def test_noise_and_copies_are_seen_through(model, data):
    noise = torch.randint(256, (2000, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    result = judge.verdict(model, noise, data.test_images)
    floor = result_of(ROOT, "judge")["result"]["floor"]["fid"]
    assert result["fid"] > 100 * floor and result["precision"] == 0
    copies = judge.verdict(model, data.train_images[:1].expand(1000, 28, 28), data.test_images[:2000])
    assert copies["recall"] < 0.01 and max(copies["class_counts"]) == 1000


def test_floors_are_of_as_many_random_training_images(model, tiny):
    draws = judge.real_draws(model, tiny, 120)
    assert len(draws) == judge.DRAWS and all(draw.features.shape == (120, 128) for draw in draws)
    again = judge.real_draws(model, tiny, 120)
    assert all(torch.equal(a.features, b.features) for a, b in zip(draws, again))
    train, _ = judge.features_and_logits(model, tiny.train_images)
    rows = [[int((train - row).abs().sum(1).argmin()) for row in draw.features] for draw in draws]
    assert all(len(set(row)) == 120 for row in rows) and len({frozenset(row) for row in rows}) == len(rows)
    assert max(max(row) for row in rows) > 450  # of 500: they are not the first ones
    real = judge.described(model, tiny.test_images)
    floor, verdicts = judge.floor(draws, real), [judge.compared(draw, real) for draw in draws]
    assert floor["draws"] == verdicts
    for key in judge.MEASURES:
        assert floor[key] == pytest.approx(sum(each[key] for each in verdicts) / len(verdicts))
    assert sum(floor["class_counts"]) == pytest.approx(120)


def test_the_json_has_the_floors_of_five_draws():
    """Against validation images, which the judge was trained on, as against test images; none is an outlier."""
    result = result_of(ROOT, "judge")["result"]
    for floor in (result["floor"], result["floor_validation"]):
        assert len(floor["draws"]) == judge.DRAWS and all(
            sum(each["class_counts"]) == 10_000 for each in floor["draws"]
        )
        fids = [each["fid"] for each in floor["draws"]]
        assert min(fids) < floor["fid"] < max(fids) < 1.5 * min(fids)


def test_floor_and_samples_get_the_jsons_figures(tmp_path, data, data_dir):
    """Real images, and 10,000 samples of the committed VAE as --sample writes them, in less than 1.5 GiB."""
    archive = torch.load(ROOT / "weights" / "vae_z20.pt", weights_only=True)
    vae20 = vae.build(archive["config"])
    experiment.load_state(vae20, archive, tmp_path, "")
    real = data.train_images[torch.randperm(50_000, generator=torch.Generator().manual_seed(1))[:1000]]
    for name, images in (("samples", vae.sample(vae20, 10_000)), ("real", real)):
        np.savez_compressed(tmp_path / f"{name}.npz", images=images.numpy())
    patch = "import experiment, functools, torch\nmain = judge.main\njudge.DRAWS = 2  # of five, to save time\n"
    for name in ("features_and_logits", "squared_radii"):  # once for the reference, to save time
        patch += f"judge.{name} = functools.cache(judge.{name})\n"
    patch += "judge.main = lambda flags: main(flags) or print(experiment.peak_memory_mib(torch.device('cpu')))"
    flags = (tmp_path / "samples.npz", tmp_path / "real.npz", "--data-dir", data_dir, "--device", "cpu")
    out, said = run_script("judge", *flags, output=tmp_path / "said", patch=patch)
    head, _, *few, real, floor, least, greatest, samples, peak = out.splitlines()
    assert "test" in head and "floor" in floor and float(peak) < 1536
    assert "samples.npz (10,000)" in samples and "real.npz (1,000)" in real and not said
    assert len(few) == 3 and "2 draws of 1,000 training images" in few[0] and "2 draws of 10,000" in floor
    draws = result_of(ROOT, "judge")["result"]["floor"]["draws"][:2]
    mean = {key: sum(draw[key] for draw in draws) / 2 for key in judge.MEASURES}
    expected = mean, result_of(ROOT, "vae_z20")["result"]
    for row, result in zip((floor, samples), expected):
        fid, precision, recall, *counts = (float(value) for value in row.split()[:13])
        assert fid == pytest.approx(result["fid"], rel=1e-2, abs=0.01)
        assert (precision, recall) == pytest.approx((result["precision"], result["recall"]), abs=5e-3)
        assert sum(counts) == pytest.approx(10_000, abs=5)
    for row, choose in ((least, min), (greatest, max)):
        assert float(row.split()[0]) == pytest.approx(choose(draw["fid"] for draw in draws), rel=1e-2)
    assert expected[0]["precision"] > 0.8 and expected[0]["recall"] > 0.8
    low, high, ours = (float(row.split()[0]) for row in (few[1], few[2], real))
    assert 1.5 * expected[0]["fid"] < low < high and low / 2 < ours < 2 * high  # fewer images are farther away


# Where the judge is missing


def test_loading_the_judge_draws_no_random_numbers():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    judge.load(torch.device("cpu"), ROOT)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("script", RUNS)
@pytest.mark.parametrize("lacking", ["missing", "damaged", "of other data"])
def test_a_run_without_the_judge_ends_with_its_own_result(
    finished, tiny, tmp_path, monkeypatch, capsys, script, lacking
):
    """With the same history, and with one line on what is left out."""
    out, flags, name = tmp_path / "out", SMALL[script], RUNS[script]
    judged = {path.replace(name, "*"): content for path, content in lasting(finished(script)).items()}
    if lacking == "of other data":
        flags, name = [*flags, "--dataset", "fashion-mnist"], f"{name}_fashion-mnist"
    else:
        monkeypatch.setattr(judge, "home", lambda dataset: tmp_path)
    if lacking == "damaged":  # after training, which the other two cover
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "judge.pt").write_bytes((ROOT / "weights" / "judge.pt").read_bytes()[:-100])
        shutil.copytree(finished(script), out)
        (out / "figures" / f"{name}.json").unlink()
        flags = [*flags, "--resume"]
    module = importlib.import_module(script)
    assert module.main([*flags, "--out", str(out)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "  epoch " not in line]
    words = {"missing": "code/judge.py --train", "damaged": "is damaged", "of other data": "no judge at"}
    assert "without fid, precision, recall and class_counts" in line and words[lacking] in line
    ours = {path.replace(name, "*"): content for path, content in lasting(out).items()}
    assert ours.keys() == judged.keys()
    ours, judged = ours["figures/*.json"], judged["figures/*.json"]
    if lacking != "damaged":  # else its history was written with the judge
        for row in judged["history"]:
            for key in [key for key in row if script == "gan" and key.startswith("val_")]:
                del row[key]
    assert ours["history"] == judged["history"]
    judged_too = {"unaveraged", "validation", "over_noise", "at_temperature"}
    assert ours["result"].keys() == judged["result"].keys() - VERDICT - judged_too


# Files


def test_the_frozen_weights_are_those_of_the_json():
    content = result_of(ROOT, "judge")
    assert hashlib.sha256((ROOT / "weights" / "judge.pt").read_bytes()).hexdigest() == content["weights_sha256"]


GOOD = np.random.default_rng(0).integers(0, 256, (1000, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"samples": GOOD}, "images"),
        ({"images": GOOD.astype(np.float32)}, "float32"),
        ({"images": GOOD[:999]}, "999"),
    ],
)
def test_bad_samples_are_one_line(tmp_path, capsys, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    assert judge.main([str(tmp_path / "bad.npz"), "--out", str(ROOT)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and "bad.npz" in error


def damaged_files():
    """Names and contents of files that hold no readable samples."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=GOOD)
    whole = buffer.getvalue()
    yield "empty", b""
    yield "text", b"no archive"
    yield "half", whole[: len(whole) // 2]
    yield "flipped", whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]
    for name, content in (("raw member", b"raw"), ("huge", b"\x93NUMPY\x01\x00" + HUGE)):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("images.npy", content)
        yield name, buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, GOOD)
    yield "a single array", buffer.getvalue()


HEADER = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 28, 28), }\n"
HUGE = len(HEADER).to_bytes(2, "little") + HEADER


@pytest.mark.parametrize(("name", "content"), [("missing", None), *damaged_files()])
def test_files_that_cannot_be_read_are_one_line(tmp_path, capsys, name, content):
    path = tmp_path / "bad.npz"
    if content is not None:
        path.write_bytes(content)
    assert judge.main([str(path), "--out", str(ROOT)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "bad.npz" in error, name
    assert ("more than fits into memory" in error) == (name == "huge")


def test_missing_weights_name_the_command_and_nothing_is_trained(tmp_path, capsys):
    np.savez(tmp_path / "good.npz", images=GOOD)
    assert judge.main([str(tmp_path / "good.npz"), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"code/judge.py --train --out {tmp_path}" in error
    assert not (tmp_path / "weights").exists()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "judge.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"delete it, and train another with: .* --out {tmp_path}"):
        judge.load(torch.device("cpu"), tmp_path)


def test_real_images_are_those_of_the_reference(model, tiny, tmp_path, monkeypatch, capsys):
    references, compared = [], judge.compared
    monkeypatch.setattr(judge, "compared", lambda *args: references.append(args[1]) or compared(*args))
    np.savez(tmp_path / "good.npz", images=GOOD)
    for name, images in (("test", tiny.test_images), ("validation", tiny.validation_images)):
        assert judge.main([str(tmp_path / "good.npz"), "--reference", name, "--out", str(ROOT)]) == 0
        first, _, mean, *_ = capsys.readouterr().out.splitlines()
        assert name in first and "5 draws of 500 training images" in mean  # there are no 1,000
        features, _ = judge.features_and_logits(model, images)
        assert len(references) == judge.DRAWS + 1
        assert all(torch.equal(references.pop().features, features) for _ in range(judge.DRAWS + 1))


def test_images_of_other_data_are_warned_of(data, tmp_path, monkeypatch, capsys):
    """Digits in black on white, for one; not digits as they are. Each file is named that gives itself away."""
    small = mnist.Data(
        *(each[:1200] for each in (data.images, data.labels, data.test_images, data.test_labels)), validation=100
    )
    monkeypatch.setattr(mnist, "load", lambda *_: small)
    for name, images in (("digits", data.test_images[-1000:]), ("inverted", 255 - data.test_images[-1000:])):
        np.savez(tmp_path / f"{name}.npz", images=images.numpy())
    files = [str(tmp_path / f"{name}.npz") for name in ("digits", "inverted")]
    assert judge.main([*files, "--out", str(ROOT)]) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(files[1]) and "other data" in line
    assert len(said.out.splitlines()) == 7  # head, floor of the one size, a row for each file


def test_training_never_replaces_the_frozen_judge(tmp_path, data_dir, capsys):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "judge.pt").write_bytes(b"frozen")
    assert judge.main(["--train", "--data-dir", str(data_dir), "--out", str(tmp_path)]) == 2
    assert "delete it" in capsys.readouterr().err
    assert (tmp_path / "weights" / "judge.pt").read_bytes() == b"frozen"


def test_training_writes_weights_and_json(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(judge.SETTINGS, "epochs", 1)
    monkeypatch.setattr(judge, "JUDGED", 100)
    assert judge.main(["--train", "--out", str(tmp_path)]) == 0
    content = result_of(tmp_path, "judge")
    assert content["config"] == {**judge.SETTINGS, "neighbours": judge.NEIGHBOURS}
    assert {"test_accuracy", "floor", "floor_validation", "parameters", "train_seconds"} <= set(content["result"])
    path = tmp_path / "figures" / "judge.json"
    path.write_text(json.dumps({**content, "result": {**content["result"], "floor": None}}))
    assert judge.main(["--floor", "--out", str(tmp_path)]) == 0
    assert result_of(tmp_path, "judge") == content
    path.write_text(json.dumps({**content, "weights_sha256": "of another"}))
    assert judge.main(["--floor", "--out", str(tmp_path)]) == 2
    reread = judge.load(torch.device("cpu"), tmp_path)
    assert sum(p.numel() for p in reread.parameters()) == content["result"]["parameters"]


@pytest.mark.parametrize("flags", [[], ["--train", "x.npz"], ["--floor", "x.npz"], ["--floor", "--train"]])
def test_files_or_training(capsys, flags):
    assert judge.main(flags) == 2
    assert "--train" in capsys.readouterr().err


def test_shifted_moves_the_whole_batch_alike():
    images = torch.zeros(3, 28, 28, dtype=torch.uint8)
    images[:, 10, 10] = 200
    seen = set()
    near = (8, 9, 10, 11, 12)
    for _ in range(200):
        moved = judge.shifted(images, 2)
        assert moved.shape == images.shape and torch.equal(moved[0], moved[1]) and moved[0].sum() == 200
        seen.add(tuple(moved[0].nonzero()[0].tolist()))
    assert seen == {(y, x) for y in near for x in near}


def test_load_says_what_is_wrong_with_the_weights(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "judge.pt").write_bytes(experiment.torch_bytes({"model": {}}))
    with pytest.raises(UserError, match="another network"):
        judge.load(torch.device("cpu"), tmp_path)
