"""The bench counts and measures what it says."""

import dataclasses
import functools
import json
import math
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import bench
import cli
import gan
import mnist
import nf
import vae
from conftest import FORKS, SMALL, built

BLANK = torch.zeros(60_000, 28, 28, dtype=torch.uint8)


def multiplications(model: nn.Module) -> list[int]:
    """Inputs times outputs of every linear layer."""
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    return [layer.in_features * layer.out_features for layer in layers]


def test_flops_are_those_of_the_layers():
    """Forward, weights' gradient, inputs' gradient, the last but for the first layer: a product each, twice counted."""
    case = bench.vae_case(BLANK, "--batch-size", "10")
    encoder = multiplications(case.model.encoder)
    expected = 3 * sum(multiplications(case.model)) - encoder[0]
    assert bench.products(case)[1] == 2 * expected
    case = bench.gan_case(BLANK, "--batch-size", "10")
    g, d = multiplications(case.model.generator), multiplications(case.model.discriminator)
    first = sum(g) + 2 * (3 * sum(d) - d[0])  # a generated image; D on it and on a real one
    second = 3 * sum(g) - g[0] + 2 * sum(d)  # G's gradients, and through D none of its weights'
    assert bench.products(case)[1] == 2 * (first + second)


def test_flops_of_convolutions_are_those_of_the_layers():
    """As above; a convolution has as many products as weights at every place. Only the noise's first sees mere data."""
    case = bench.nf_case(BLANK, "--batch-size", "3")
    networks = [(14, case.model.dequantiser), *zip((14, 14, 7, 7), case.model.levels)]
    expected = -(14**2) * case.model.dequantiser.network[0].weight.numel()
    for side, network in networks:
        weights = [layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        expected += 3 * side**2 * sum(weights)
    assert bench.products(case)[1] == 2 * expected


class Calls(TorchDispatchMode):
    """Keeps the name of everything that runs under it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket)
        return function(*args, **(kwargs or {}))


def test_products_are_repeated_as_they_were_and_nothing_else():
    case = bench.vae_case(BLANK, "--batch-size", "10")
    repeat, flops = bench.products(case)
    index = torch.arange(3)
    with FlopCounterMode(display=False) as counter, Calls() as calls:
        repeat(index)
    assert counter.get_total_flops() == 10 * flops
    assert calls.names and calls.names <= flop_registry.keys()


@pytest.mark.parametrize(
    ("script", "module", "flags"),
    [
        ("vae", vae, ("--gradient", "plain")), ("vae_best", vae, ("--gradient", "plain", "--weight-decay", "0")),
        ("gan", gan, ("--dropout", "0")), ("nf", nf, ("--hidden", "8", "--couplings", "1")),
    ],
)  # fmt: skip
def test_the_textbook_loop_takes_the_same_step(monkeypatch, script, module, flags):
    """With the same weights and noise, and no dropout, it leaves the weights where the script's step does."""
    models, build = [], module.build

    def remember(config: dict) -> nn.Module:
        torch.manual_seed(0)
        models.append(build(config))
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))  # no layer stays zero
        return models[-1]

    monkeypatch.setattr(module, "build", remember)
    pixels = torch.randint(256, (64, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    if module is vae:  # draws pixels in another way, so they are certain ones
        pixels = 255 * (pixels > 127).byte()
    case = bench.CASES[script](pixels, *flags)
    trained = [[each for each in model.parameters() if each.requires_grad] for model in models]
    before = [parameter.detach().clone() for parameter in trained[0]]
    if module is vae:
        eps = torch.randn(64, models[0].z_dim)
        monkeypatch.setattr(vae, "draw_batch", lambda images, index, z_dim: (images[index] / 255, eps))
        monkeypatch.setattr(torch, "randn_like", lambda _: eps)
    torch.manual_seed(1)
    case.step(torch.arange(64))
    torch.manual_seed(1)
    case.textbook(pixels.unsqueeze(1) / 255)
    assert not any(torch.equal(*pair) for pair in zip(trained[0], before) if pair[1].ndim == 2)
    for ours, textbook in zip(*trained):
        assert (ours - textbook).abs().mean() < 1e-3 * case.args.lr  # Adam's first step is as long as the rate


def test_in_turns_takes_medians_after_warming_up(monkeypatch):
    taken = iter([100, 100, 1, 5, 2, 6, 9, 7])
    monkeypatch.setattr(bench, "seconds", lambda function, device: next(taken))
    assert bench.in_turns({"a": None, "b": None}, 3, torch.device("cpu")) == {"a": 2, "b": 6}


def test_a_short_bench_fills_the_table(data_dir, tmp_path, monkeypatch, capsys):
    """And its growth: more images take more time and memory, wider layers more memory."""

    def short(make, *flags: str):
        return lambda images, *more: dataclasses.replace(make(images, *flags, *more), steps=2)

    small = short(bench.nf_case, "--hidden", "8", "--batch-size", "8")
    cases = {name: short(case) for name, case in bench.CASES.items()} | {"nf": small}
    monkeypatch.setattr(bench, "CASES", cases)
    monkeypatch.setattr(bench, "races", lambda *_: {"vae": "raced"})
    monkeypatch.setattr(bench, "beside", lambda *_: {"nothing": "beside"})
    monkeypatch.setattr(bench, "GROWTH", {"width": {"vae": (400, 1200)}, "images": {"vae": (640, 30_720)}})
    monkeypatch.setattr(bench, "GROWN_OVER", {"vae": 640})
    monkeypatch.setattr(bench, "GROWTH_ROUNDS", 1)
    monkeypatch.setattr(bench, "CEILING_PRODUCTS", 2)
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: FORKS)  # starts sooner
    assert bench.main(["--rounds", "1", "--data-dir", str(data_dir), "--out", str(tmp_path), "--device", "cpu"]) == 0
    content = json.loads((tmp_path / "figures" / "bench.json").read_text())
    rows = content["models"]
    assert [row["batch_size"] for row in rows.values()] == [320, 500, 256, 8] and rows.keys() == cases.keys()
    assert "times_normal_prior" in rows["vae_best"] and content["races"] == {"vae": "raced"}
    assert content["beside"] == {"nothing": "beside"}
    assert all(value > 0 for row in rows.values() for value in row.values())
    printed = capsys.readouterr().out
    assert "vae" in printed
    assert (tmp_path / "figures" / "bench_growth.pdf").exists()
    points = {what: list(scripts["vae"].values()) for what, scripts in content["growth"].items()}
    per_image = [point["seconds"] / point["seconds_per_1000_images"] for point in points["images"] + points["width"]]
    assert per_image == pytest.approx([0.64, 30.72, 0.64, 0.64])
    assert points["images"][1]["seconds"] > points["images"][0]["seconds"]
    if sys.platform == "linux":
        images, weights = (
            2**20 * (more["memory_mib"] - less["memory_mib"]) for less, more in (points["images"], points["width"])
        )
        assert images > 0.8 * (30_720 - 640) * mnist.PIXELS
        assert 5 < points["images"][0]["memory_mib"] < 200  # without the libraries' hundreds
        narrow, wide = (
            sum(each.numel() for each in built(vae, *flags).parameters()) for flags in ((), ("--hidden", 1200))
        )
        assert weights > 0.8 * 4 * 4 * (wide - narrow)  # themselves, their gradients, and Adam's two moments


def test_a_point_of_the_growth_has_its_settings(tiny, monkeypatch, tmp_path):
    threads, batches, widths = [], [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(
        vae, "training_step", lambda model, _, images, index, *how: batches.append((len(images), len(index)))
    )
    build = vae.build
    monkeypatch.setattr(vae, "build", lambda config: widths.append(config["hidden"]) or build(config))
    for changed in ({"threads": 3}, {"width": 8}, {"batch_size": 64}, {"images": 960}):
        bench.grown("vae", tmp_path, **bench.settings("vae", **changed))
    own = torch.get_num_threads()
    assert threads == [3, own, own, own] and widths[::2] == widths[1::2] == [400, 8, 400, 400]
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
    monkeypatch.setattr(bench, "GROWTH", {"width": {"vae": (8, 400)}, "batch_size": {"vae": (320,), "nf": (24,)}})
    rows = bench.growth(tmp_path)
    different = [each for n, each in enumerate(calls) if each not in calls[:n]]
    assert len(calls) == bench.GROWTH_ROUNDS * len(different) == bench.GROWTH_ROUNDS * 3
    assert rows["width"]["vae"]["400"] == rows["batch_size"]["vae"]["320"]
    last = {str(each): 100 - n for n, each in enumerate(calls, start=1)}
    assert rows["width"]["vae"]["8"]["seconds"] == last[str(("vae", bench.settings("vae", width=8)))]
    assert rows["batch_size"]["nf"]["24"]["seconds"] == last[str(("nf", bench.settings("nf", batch_size=24)))]


def test_training_beside_other_work_is_measured(data_dir, monkeypatch):
    monkeypatch.setattr(bench, "BESIDE_ROUNDS", 1)
    monkeypatch.setattr(bench, "BESIDE_SECONDS", 0.3)
    monkeypatch.setattr(bench, "SPINS", {"as the scripts": cli.SPIN})
    found = bench.beside(data_dir)
    assert [*found] == ["nothing", "a busy process", "another training"]
    assert all(speed > 0 for speeds in found.values() for speed in speeds.values())


def test_the_table_follows_from_the_medians(data_dir, monkeypatch):
    case = bench.vae_case(BLANK, "--batch-size", "16")
    medians = {"ceiling": 1.0, "step": 2.0, "textbook": 9.0, "products": 1.0}
    monkeypatch.setattr(bench, "in_turns", lambda functions, *_: {name: medians[name] for name in functions})
    row = bench.measure(case, 5, data_dir)
    images = case.steps * 16
    assert row["images_per_second"] == images / 2 and row["textbook_images_per_second"] == images / 9
    assert row["times_textbook"] == 4.5 and row["products_percent_of_step"] == 50 and row["batch_size"] == 16
    flops, limit = images * row["flops_per_image"], bench.CEILING_PRODUCTS * 2 * 1024**3
    assert row["percent_of_ceiling"] == pytest.approx(100 * flops / 2 / limit)
    assert row["ceiling_gflops"] == pytest.approx(limit / 1e9) and row["gflops"] == pytest.approx(flops / 2 / 1e9)
    assert row["products_gflops"] == pytest.approx(flops / 1e9)


# The races


def test_a_race_counts_training_alone_and_ends_with_the_marks(monkeypatch):
    """`train` sets the clock forward; a runner that passes the marks, or takes too long, leaves the race."""
    monkeypatch.setattr(bench, "seconds", lambda train, device: train())
    monkeypatch.setattr(bench, "RACE_SECONDS", 100)
    quick, slow = iter([-5.0, -2.0, -0.5]), iter([-9.0] * 10)
    runners = {
        "quick": (lambda: 4.0, lambda: next(quick)),
        "slow": (lambda: 30.0, lambda: next(slow)),
        "diverged": (lambda: 1.0, lambda: math.nan),
    }
    rows = bench.race(runners, (-3, -1))
    assert rows["quick"] == {"seconds": 12.0, "reached": -0.5, "passed": {"-3": 8.0, "-1": 12.0}}
    assert rows["slow"] == {"seconds": 120.0, "reached": -9.0, "passed": {"-3": None, "-1": None}}
    assert rows["diverged"] == {"seconds": 1.0, "reached": None, "passed": {"-3": None, "-1": None}}


def test_the_textbooks_flow_is_one():
    torch.manual_seed(0)
    flow = bench.TextbookFlow(hidden=4).double()
    v = 256 * torch.rand(1, 28, 28, dtype=torch.float64)
    ladj = flow(v)[1]
    jacobian = torch.autograd.functional.jacobian(lambda each: flow(each)[0], v).view(784, 784)
    assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(ladj.item(), abs=1e-8)
    assert sum(each.numel() for each in bench.TextbookFlow().parameters()) == pytest.approx(27.7e6, rel=1e-3)


def test_a_racer_trains_as_the_script_does(tiny, monkeypatch, tmp_path):
    """The same weights as after the script's two epochs, in four parts."""
    monkeypatch.setattr(vae, "importance_sampled_log_px", lambda *_, **__: torch.zeros(2))
    flags = [*SMALL["vae"], "--seed", "3"]
    assert vae.main([*flags, "--out", str(tmp_path)]) == 0
    trained = torch.load(tmp_path / "weights" / "vae_z20.pt", weights_only=True)["model"]
    case = bench.vae_case(tiny.train_images, *flags)
    torch.manual_seed(3)
    case.model.load_state_dict(vae.build(cli.settings(case.args)).state_dict())
    train = bench.in_parts(case, 2)
    for _ in range(4):
        train()
    assert all(torch.equal(case.model.state_dict()[name], each) for name, each in trained.items())
    train()  # beyond the script's epochs


def test_all_racers_run(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RACE_SECONDS", 0)
    batch = tiny.train_images[:128].unsqueeze(1) / 255
    monkeypatch.setattr(bench, "loader_of", lambda *_: [(batch, None)] * 12)
    monkeypatch.setattr(bench, "TextbookFlow", functools.partial(bench.TextbookFlow, hidden=8))
    rows = bench.races(tiny, tmp_path)
    assert rows.keys() == bench.MARKS.keys()
    for name, floor in (("vae", -560.0), ("nf", -11.0)):
        assert rows[name].keys() == {"textbook", "script"}
        assert all(row["seconds"] > 0 and row["reached"] > floor for row in rows[name].values())
