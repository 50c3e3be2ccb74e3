"""The bench counts and measures what it says."""

import json
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import gan
import mnist
import nf
import vae

BLANK = torch.zeros(60_000, 28, 28, dtype=torch.uint8)


def multiplications(model: torch.nn.Module) -> list[int]:
    """Inputs times outputs of every linear layer."""
    layers = (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    return [layer.in_features * layer.out_features for layer in layers]


def test_flops_are_those_of_the_layers():
    """Forward, weights' gradient, inputs' gradient, the last but for the first layer: a product each, twice counted."""
    case = bench.vae_case(BLANK)
    encoder = multiplications(case.model.encoder)
    expected = 3 * sum(multiplications(case.model)) - encoder[0]
    assert bench.products(case, torch.device("cpu"))[1] == 2 * expected
    case = bench.gan_case(BLANK)
    g, d = multiplications(case.model.generator), multiplications(case.model.discriminator)
    first = sum(g) + 2 * (3 * sum(d) - d[0])  # a generated image; D on it and on a real one
    second = 3 * sum(g) - g[0] + 2 * sum(d)  # G's gradients, and through D none of its weights'
    assert bench.products(case, torch.device("cpu"))[1] == 2 * (first + second)


def test_flops_of_convolutions_are_those_of_the_layers():
    """As above; a convolution has as many products as weights at every place. The first sees data, not activations."""
    case = bench.nf_case(BLANK)
    expected = 0
    for side, level in zip((14, 14, 7, 7), case.model.levels):
        weights = [layer.weight.numel() for layer in level.modules() if isinstance(layer, torch.nn.Conv2d)]
        expected += 3 * side * side * sum(weights)
    expected -= 14 * 14 * case.model.levels[0][0].conditioner[0].weight.numel()
    assert bench.products(case, torch.device("cpu"))[1] == 2 * expected


def test_products_are_repeated_as_they_were():
    case = bench.vae_case(BLANK)
    repeat, flops, calls = bench.products(case, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, bench._Products() as kept:
        repeat(torch.arange(3))
    assert counter.get_total_flops() == case.batch * flops
    assert 0 < kept.count < calls


def test_calls_are_counted_without_views():
    x = torch.ones(3, 4)
    with bench._Products() as kept:
        (x.t() @ x).view(2, 8).add_(1)
    assert kept.count == 2 and len(kept.calls) == 1


def alike(monkeypatch, module, name: str) -> list[torch.nn.Module]:
    """From now on all models of a module's class start from the same weights; the list of them, as they are built."""
    models, build = [], getattr(module, name)

    def remember(*args):
        torch.manual_seed(0)
        models.append(build(*args))
        return models[-1]

    monkeypatch.setattr(module, name, remember)
    return models


def test_the_textbook_loop_trains_the_same_objective(monkeypatch):
    """With the same weights and noise, the textbook's step leaves the weights where default Adam on our ELBO does."""
    batch = torch.ones(320, 1, 28, 28)  # certain pixels: both draw the same
    models = alike(monkeypatch, vae, "VAE")
    case = bench.vae_case(BLANK)
    step = case.textbook(fused=False, item=True)
    ours, textbook = models[0], models[-1]
    torch.manual_seed(1)
    step(batch)
    torch.manual_seed(1)
    torch.bernoulli(batch.flatten(1))  # uses up the same random numbers
    optimizer = torch.optim.Adam(ours.parameters(), lr=vae.flags().parse_args([]).lr)
    loss = -vae.elbo(ours, batch.flatten(1), torch.randn(320, 20)).mean()
    loss.backward()
    optimizer.step()
    for a, b in zip(ours.parameters(), textbook.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def trained(model: gan.GAN) -> list[torch.nn.Parameter]:
    """All but those of the average."""
    return [each for each in model.parameters() if each.requires_grad]


def test_the_gans_textbook_loop_takes_the_same_step(monkeypatch):
    """With the same weights and noise, and no dropout, it leaves the weights where the script's step does."""
    monkeypatch.setattr(gan, "DROPOUT", 0.0)
    pixels = torch.randint(256, (128, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    models = alike(monkeypatch, gan, "GAN")
    case = bench.gan_case(pixels)
    step = case.textbook(fused=False, item=True)
    ours, textbook = models[0], models[-1]
    torch.manual_seed(1)
    case.step(torch.arange(128))
    torch.manual_seed(1)
    step(pixels.unsqueeze(1) / 255)
    for a, b in zip(trained(ours), trained(textbook)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_the_flows_textbook_loop_takes_the_same_step(monkeypatch):
    """With the same weights and noise it leaves the weights where the script's step does."""
    pixels = torch.randint(256, (16, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    models = alike(monkeypatch, nf, "Flow")
    case = bench.nf_case(pixels)
    step = case.textbook(fused=False, item=True)
    ours, textbook = models[0], models[-1]
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    torch.manual_seed(1)
    case.step(torch.arange(16))
    torch.manual_seed(1)
    step(pixels.unsqueeze(1) / 255)
    assert not all(torch.equal(a, b) for a, b in zip(ours.parameters(), before))
    for a, b in zip(ours.parameters(), textbook.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_the_mixture_by_autograd_is_the_flows():
    """Its values and its gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 2, 3, 3), *3 * [(5, 4, 2, 3, 3)])
    arguments = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    both = [mixture(*arguments) for mixture in (nf.MixtureLogit.apply, bench.mixture_by_autograd)]
    gradients = [torch.autograd.grad((z.sin() + log_slope.square()).sum(), arguments) for z, log_slope in both]
    for ours, theirs in zip((*both[0], *gradients[0]), (*both[1], *gradients[1])):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_in_turns_takes_medians_after_warming_up(monkeypatch):
    taken = iter([100, 100, 1, 5, 2, 6, 9, 7])
    monkeypatch.setattr(bench, "seconds", lambda function, device: next(taken))
    assert bench.in_turns({"a": None, "b": None}, 3, torch.device("cpu")) == {"a": 2, "b": 6}


def test_a_short_bench_fills_the_table(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(nf, "EVALUATION_IMAGES", 100)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    grows = {"batch_size": {"vae": (80, 1280)}, "width": {"vae": (416, 1248)}, "images": {"vae": (640, 61_440)}}
    monkeypatch.setattr(bench, "GROWTH", {**grows, "threads": {"vae": (1,)}})
    monkeypatch.setattr(bench, "GROWTH_ROUNDS", 1)
    assert bench.main(["--rounds", "1", "--data-dir", str(data_dir), "--out", str(tmp_path), "--device", "cpu"]) == 0
    content = json.loads((tmp_path / "figures" / "bench.json").read_text())
    rows = content["models"]
    assert rows["vae_z20"]["parameters"] == sum(p.numel() for p in vae.VAE(20).parameters())
    assert rows["gan"]["parameters"] == 2_041_745  # not counting the average
    assert rows["nf"]["parameters"] == sum(p.numel() for p in nf.Flow(4).parameters())
    printed = capsys.readouterr().out
    assert "vae_z20" in printed and "on a GPU: not measured" in printed
    assert (tmp_path / "figures" / "bench_growth.pdf").exists()
    points = {what: list(scripts["vae"].values()) for what, scripts in content["growth"].items()}
    assert [point["images"] for point in points["images"] + points["batch_size"]] == [640, 61_440, 7680, 7680]
    assert points["images"][1]["seconds"] > points["images"][0]["seconds"]
    if sys.platform == "linux":
        images, weights = (
            2**20 * (more["memory_mib"] - less["memory_mib"]) for less, more in (points["images"], points["width"])
        )
        assert images > 0.8 * (61_440 - 640) * mnist.PIXELS
        assert 5 < points["images"][0]["memory_mib"] < 200  # without the libraries' hundreds
        narrow = sum(each.numel() for each in vae.VAE(20).parameters())
        monkeypatch.setattr(vae, "HIDDEN", 3 * vae.HIDDEN)
        wide = sum(each.numel() for each in vae.VAE(20).parameters())
        assert weights > 0.8 * 4 * 4 * (wide - narrow)  # themselves, their gradients, and Adam's two moments


def test_a_point_of_the_growth_has_its_settings(tiny, monkeypatch, tmp_path):
    threads, batches, widths = [], [], []
    monkeypatch.setattr(vae, "HIDDEN", vae.HIDDEN)  # to be put back
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(vae, "training_step", lambda model, _, images, index: batches.append((len(images), len(index))))
    build = vae.VAE
    monkeypatch.setattr(vae, "VAE", lambda z_dim: widths.append(vae.HIDDEN) or build(z_dim))
    for changed in ({"threads": 1}, {"width": 8}, {"batch_size": 64}, {"images": 960}):
        bench.grown("vae", tmp_path, **bench.settings("vae", **changed))
    own = torch.get_num_threads()
    assert threads == [1, own, own, own] and widths == [416, 8, 8, 8]
    assert sorted(set(batches)) == [(960, 320), (7680, 64), (7680, 320)]
    assert batches.count((960, 320)) == 3 + 3 and batches.count((7680, 64)) == 3 + 120
    assert "width" not in bench.settings("gan")


def test_growth_keeps_the_fastest_and_measures_a_setting_once(monkeypatch, tmp_path):
    calls = []

    class Here:
        """A pool that works in this process, and on numbers: each call is said to take less than the one before."""

        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, function, name, data_dir, **settings):
            calls.append((name, settings))
            point = {"seconds": 100 - len(calls)}
            return types.SimpleNamespace(result=lambda: point)

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(bench, "GROWTH", {"width": {"vae": (8, 416)}, "batch_size": {"vae": (320,), "nf": (24,)}})
    rows = bench.growth(tmp_path)
    different = [each for n, each in enumerate(calls) if each not in calls[:n]]
    assert len(calls) == bench.GROWTH_ROUNDS * len(different) == bench.GROWTH_ROUNDS * 3
    assert rows["width"]["vae"]["416"] == rows["batch_size"]["vae"]["320"]
    last = {str(each): 100 - n for n, each in enumerate(calls, start=1)}
    assert rows["width"]["vae"]["8"]["seconds"] == last[str(("vae", bench.settings("vae", width=8)))]
    assert rows["batch_size"]["nf"]["24"]["seconds"] == last[str(("nf", bench.settings("nf", batch_size=24)))]


def test_the_table_follows_from_the_medians(data_dir, monkeypatch):
    case = bench.vae_case(BLANK)
    medians = {"ceiling": 1.0, "the script's step": 2.0, "textbook loop": 9.0, "products": 1.0, "data": 0.2}
    medians |= {"optimizer": 0.3, "evaluation": 0.1}
    monkeypatch.setattr(bench, "seconds", lambda function, device: 1.0)
    monkeypatch.setattr(bench, "in_turns", lambda functions, *_: {name: medians.get(name, 4.0) for name in functions})
    row = bench.measure(case, 5, data_dir, torch.device("cpu"))
    images = case.steps * case.batch
    assert row["images_per_second"] == images / 2 and row["times_textbook"] == 4.5
    assert row["percent_of_step"] == pytest.approx(
        {"products": 50, "data_and_noise": 10, "optimizer": 15, "elementwise_and_rest": 25}
    )
    flops = images * row["flops_per_image"]
    assert row["percent_of_ceiling"] == pytest.approx(100 * flops / 2 / (bench.CEILING_PRODUCTS * 2 * 1024**3))
    assert row["evaluation_percent_of_epoch"] == pytest.approx(100 * 0.1 / (2 * len(BLANK) / images + 0.1))
