"""How near the machine's limit training runs, and how far from a textbook loop.

    python code/bench.py        # half an hour; writes figures/bench.json and bench_growth, prints its table

Three things are measured in turns, round after round, so that a machine whose speed drifts treats all alike; every
figure is the median of the rounds. (1) The ceiling: float32 multiplication of two 1024 x 1024 matrices. (2) A model's
training step, the very function that its script calls, with the floating-point operations of its matrix products and
convolutions counted by PyTorch's own counter. (3) The same model and batch size in a textbook loop (a torchvision
dataset with ToTensor, a DataLoader, default Adam, .item() at each step), and what each habit of the script adds to it.
After that, on a CPU, how time and memory grow with width, batch size, number of images and threads, each point in a
process of its own, whose memory is thus its own.
"""

import functools
import itertools
import math
import multiprocessing
import random
import statistics
import sys
import time
import unittest.mock as mock
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import experiment
import gan
import mnist
import nf
import vae
from experiment import RunError, UserError

STEPS = 40  # of training in one measurement; of the flow, whose steps are long, a quarter
CEILING_SIDE, CEILING_PRODUCTS = 1024, 40
GROWTH = {  # what grows -> script -> values, of which the script's own is one but for the images
    "width": {"vae": (104, 208, 416, 832, 1664), "nf": (8, 16, 32, 64)},
    "batch_size": {"vae": (80, 160, 320, 640, 1280), "gan": (64, 128, 256, 512, 1024), "nf": (12, 24, 48, 96, 192)},
    "images": {"vae": (5120, 20_480, 81_920), "gan": (4096, 16_384, 65_536), "nf": (480, 1920, 7680)},
    "threads": {"vae": (1, 2), "gan": (1, 2), "nf": (1, 2)},
}
GROWN_OVER = {"vae": 7680, "gan": 5120, "nf": 960}  # images of an epoch, where it is not they that grow
GROWTH_ROUNDS = 4


@dataclass
class Case:
    """A model as its script trains it, and what to compare it with. Functions take no arguments unless said."""

    name: str
    batch: int
    model: nn.Module
    step: Callable[[Tensor], object]  # one training step, given the batch's indices
    data: Callable[[Tensor], object]  # its share that draws data and noise
    optimizer: Callable[[], object]  # its share that updates the parameters
    evaluate: Callable[[], object]  # what follows each epoch
    images: Tensor  # (n, ...) uint8, an epoch's
    textbook: Callable[..., Callable[[Tensor], object]]  # (fused, item) -> a step, given images in [0, 1]
    tried: dict[str, Callable[[Tensor], object]]  # variants of the step that the script does not use
    steps: int  # of training in one measurement


def updates(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Callable[[], None]:
    """Every optimizer's step on gradients that are there already."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def run() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return run


def vae_training(images: Tensor) -> tuple[vae.VAE, torch.optim.Optimizer, Callable[[Tensor], object]]:
    """The VAE, its optimizer and its training step at the report's settings, on images (n, 28, 28) uint8."""
    args = vae.flags().parse_args([])
    images = images.flatten(1)
    model = vae.VAE(args.z_dim).to(images.device)
    optimizer = experiment.adam(model.parameters(), args.lr)
    return model, optimizer, lambda index: vae.training_step(model, optimizer, images, index)


def vae_case(images: Tensor) -> Case:
    """`vae_training` and what to compare it with."""
    args = vae.flags().parse_args([])
    z_dim = args.z_dim
    model, optimizer, script_step = vae_training(images)
    images = images.flatten(1)
    evaluated = [vae.evaluation_set(images[: vae.EVALUATION_IMAGES], "training", z_dim) for _ in range(2)]
    other = vae.VAE(z_dim).to(images.device)

    def textbook(fused: bool, item: bool) -> Callable[[Tensor], None]:
        plain = vae.VAE(z_dim).to(images.device)
        adam = torch.optim.Adam(plain.parameters(), lr=args.lr, fused=fused or None)  # None: torch's own choice

        def step(batch: Tensor) -> None:
            x = torch.bernoulli(batch.flatten(1))
            mu, logvar = plain.encode(x)
            logits = plain.decode(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu))
            cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
            loss = (cross_entropy - 0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()) / len(x)
            adam.zero_grad()
            loss.backward()
            adam.step()
            if item:
                loss.item()

        return step

    compiled = torch.compile(vae.elbo)

    def compiled_step(index: Tensor) -> None:
        x, eps = vae.draw_batch(images, index, z_dim)
        loss = -compiled(model, x, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def with_float_noise(index: Tensor) -> None:
        pixels = images[index]
        x = (torch.rand(pixels.shape, device=images.device) < pixels / 255).float()
        loss = -vae.elbo(model, x, torch.randn(len(x), z_dim, device=images.device)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Case(
        name=f"vae_z{z_dim}",
        batch=args.batch_size,
        model=model,
        step=script_step,
        data=lambda index: vae.draw_batch(images, index, z_dim),
        optimizer=updates(other, experiment.adam(other.parameters(), args.lr)),
        evaluate=lambda: [vae.per_image_elbo(model, *each) for each in evaluated],
        images=images,
        textbook=textbook,
        tried={"the objective compiled": compiled_step, "pixels from float noise, indexed": with_float_noise},
        steps=STEPS,
    )


def gan_training(images: Tensor) -> tuple[gan.GAN, tuple, Callable[[Tensor], object]]:
    """The GAN, its optimizers and its training step at the report's settings, on images (n, 28, 28) uint8."""
    args = gan.flags().parse_args([])
    images = images.flatten(1)
    model = gan.GAN().to(images.device)
    optimizers = gan.make_optimizers(model, args.lr)
    return model, optimizers, lambda index: gan.training_step(model, optimizers, images, index, 1 - gan.DECAY)


def gan_case(images: Tensor) -> Case:
    """`gan_training` and what to compare it with."""
    args = gan.flags().parse_args([])
    model, optimizers, script_step = gan_training(images)
    images = images.flatten(1)
    other = gan.GAN().to(images.device)
    update = updates(other, *gan.make_optimizers(other, args.lr))
    settling = torch.randn(gan.SETTLING, gan.Z_DIM, device=images.device).split(gan.EVALUATION_BATCH)

    def textbook(fused: bool, item: bool) -> Callable[[Tensor], None]:
        plain = gan.GAN().to(images.device)
        networks = (plain.discriminator, plain.generator)
        adam_d, adam_g = (
            torch.optim.Adam(each.parameters(), lr=args.lr, betas=gan.BETAS, fused=fused or None) for each in networks
        )
        loss = nn.BCEWithLogitsLoss()

        def noise(n: int) -> Tensor:
            return torch.randn(n, gan.Z_DIM, device=images.device)

        def step(batch: Tensor) -> None:
            x = (batch.flatten(1) - 0.5) / 0.5
            real, fake = torch.ones(len(x), device=x.device), torch.zeros(len(x), device=x.device)
            adam_d.zero_grad()
            generated = plain.generate(noise(len(x))).detach()
            loss_d = loss(plain.discriminate(x), real) + loss(plain.discriminate(generated), fake)
            loss_d.backward()
            adam_d.step()
            adam_g.zero_grad()
            loss_g = loss(plain.discriminate(plain.generate(noise(len(x)))), real)
            loss_g.backward()
            adam_g.step()
            if item:
                loss_d.item(), loss_g.item()

        return step

    def separately(model: gan.GAN, x: Tensor, z: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            fake = model.generate(z)
        return (gan.discriminator_loss(model.discriminate(x), model.discriminate(fake)),)

    compiled = torch.compile(gan.discriminator_objective), torch.compile(gan.generator_objective)
    apart = (separately, gan.generator_objective)
    objectives = (gan.discriminator_objective, gan.generator_objective)

    def step_with(objectives: tuple[Callable, Callable], alone: bool) -> Callable[[Tensor], None]:
        """The script's step with other objectives; `alone`: each computes its own network's gradients only."""

        def step(index: Tensor) -> None:
            x, z_d, z_g = gan.draw_batch(images, index)
            losses = (lambda: objectives[0](model, x, z_d)[0], lambda: objectives[1](model, z_g))
            for loss, optimizer, network in zip(losses, optimizers, (model.discriminator, model.generator)):
                optimizer.zero_grad()
                loss().backward(inputs=list(network.parameters()) if alone else None)
                optimizer.step()
            experiment.move_average(model.average, model.generator, 1 - gan.DECAY)

        return step

    return Case(
        name="gan",
        batch=args.batch_size,
        model=model,
        step=script_step,
        data=lambda index: gan.draw_batch(images, index),
        optimizer=lambda: (update(), experiment.move_average(other.average, other.generator, 1 - gan.DECAY)),
        evaluate=lambda: update_bn(settling, model.average),
        images=images,
        textbook=textbook,
        tried={
            "the objectives compiled": step_with(compiled, alone=True),
            "real and generated images apart": step_with(apart, alone=True),
            "G's step with D's gradients too": step_with(objectives, alone=False),
        },
        steps=STEPS,
    )


def mixture_by_autograd(x: Tensor, logits: Tensor, mu: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
    """What `nf.MixtureLogit` computes, with the gradient left to autograd."""
    u = (x.unsqueeze(1) - mu) * torch.exp(-log_s)
    log_pi = torch.log_softmax(logits, 1)
    log_below = torch.logsumexp(log_pi + F.logsigmoid(u), 1)
    log_above = torch.logsumexp(log_pi + F.logsigmoid(-u), 1)
    log_density = torch.logsumexp(log_pi + F.logsigmoid(u) + F.logsigmoid(-u) - log_s, 1)
    return log_below - log_above, log_density - log_below - log_above


def nf_training(images: Tensor) -> tuple[nf.Flow, torch.optim.Optimizer, Callable[[Tensor], object]]:
    """The flow, its optimizer and its training step at the report's settings, on images (n, 28, 28) uint8."""
    args = nf.flags().parse_args([])
    model = nf.Flow(args.components).to(images.device)
    optimizer = experiment.adam(model.parameters(), args.lr, betas=nf.BETAS)
    return model, optimizer, lambda index: nf.training_step(model, optimizer, images, index)


def nf_case(images: Tensor) -> Case:
    """`nf_training` and what to compare it with."""
    args = nf.flags().parse_args([])
    model, optimizer, script_step = nf_training(images)
    other = nf.Flow(args.components).to(images.device)
    update = updates(other, experiment.adam(other.parameters(), args.lr, betas=nf.BETAS))
    evaluated = [nf.evaluation_set(images[: nf.EVALUATION_IMAGES], "training") for _ in range(2)]

    def textbook(fused: bool, item: bool) -> Callable[[Tensor], None]:
        plain = nf.Flow(args.components).to(images.device)
        adam = torch.optim.Adam(plain.parameters(), lr=args.lr, betas=nf.BETAS, fused=fused or None)

        def step(batch: Tensor) -> None:
            v = batch.view(-1, mnist.SIDE, mnist.SIDE) * 255
            loss = nf.bits_per_dim(nf.log_prob(plain, v + torch.rand_like(v))).mean()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), nf.CLIP)
            adam.step()
            if item:
                loss.item()

        return step

    def step_by_autograd(index: Tensor) -> None:
        with mock.patch.object(nf.MixtureLogit, "apply", mixture_by_autograd):
            nf.training_step(model, optimizer, images, index)

    return Case(
        name="nf",
        batch=args.batch_size,
        model=model,
        step=script_step,
        data=lambda index: nf.draw_batch(images, index),
        optimizer=lambda: (nn.utils.clip_grad_norm_(other.parameters(), nf.CLIP), update()),
        evaluate=lambda: [nf.per_image_log_prob(model, v) for v in evaluated],
        images=images,
        textbook=textbook,
        tried={"the mixture's gradient by autograd": step_by_autograd},
        steps=max(1, STEPS // 4),
    )


TRAINING = {"vae": (vae, vae_training), "gan": (gan, gan_training), "nf": (nf, nf_training)}


class _Products(TorchDispatchMode):
    """Keeps every matrix product and convolution that runs under it, with its operands; counts all calls."""

    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        if function.overloadpacket in flop_registry:
            operands = [each.detach() if isinstance(each, Tensor) else each for each in args]  # not what made them
            self.calls.append(functools.partial(function, *operands, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def products(case: Case, device: torch.device) -> tuple[Callable[[Tensor], None], int, int]:
    """A function that repeats the products of a training step and nothing else, whatever the batch's indices; their
    floating-point operations for each image; and how many calls into PyTorch's library the whole step is.

    A multiply-add counts as two. Everything but matrix products and convolutions is left out of the first two, and
    views, which compute nothing, of the third.
    """
    index = next(indices(case, case.batch, device))
    case.step(index)  # an optimizer's first makes its state
    with FlopCounterMode(display=False) as counter, _Products() as kept:
        case.step(index)

    def repeat(index: Tensor) -> None:
        with torch.inference_mode():
            for each in kept.calls:
                each()

    return repeat, counter.get_total_flops() // case.batch, kept.count


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, in seconds, waiting for the device."""
    begin = time.perf_counter()
    function()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - begin


def in_turns(functions: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function over the rounds, each round calling all of them, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in experiment.progress(range(rounds + 1), "rounds"):
        for name, function in functions.items():
            taken = seconds(function, device)
            if number:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def ceiling(device: torch.device) -> Callable[[], None]:
    """CEILING_PRODUCTS products of two square matrices, into the same memory."""
    a, b, out = (torch.randn(CEILING_SIDE, CEILING_SIDE, device=device) for _ in range(3))

    def run() -> None:
        for _ in range(CEILING_PRODUCTS):
            torch.mm(a, b, out=out)

    return run


def indices(case: Case, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of indices without end, as the script draws them."""
    while True:
        yield from mnist.batches(len(case.images), batch, device)


def measure(case: Case, rounds: int, data_dir: Path, device: torch.device) -> dict:
    """One model's row of the table."""
    import torchvision

    try:
        dataset = torchvision.datasets.MNIST(data_dir, train=True, transform=torchvision.transforms.ToTensor())
    except RuntimeError:
        message = f"torchvision, which the textbook loop uses, wants unpacked files: gunzip those in {data_dir}"
        raise UserError(message) from None
    loader = torch.utils.data.DataLoader(dataset, batch_size=case.batch, shuffle=True)

    def from_loader(step: Callable[[Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for number, (images, _) in enumerate(loader):
                step(images.to(device))
                if number + 1 == case.steps:
                    break

        return run

    def repeat(function: Callable[[Tensor], object], times: float = 1) -> Callable[[], None]:
        """As many images as in `case.steps` steps, in batches `times` the script's."""
        drawn = indices(case, int(times * case.batch), device)
        return lambda: [function(next(drawn)) for _ in range(int(case.steps / times))]

    def captured(function: Callable[[Tensor], object], times: float = 1) -> Callable[[], None]:
        return repeat(experiment.Captured(function, device), times)

    def resident(step: Callable[[Tensor], object]) -> Callable[[], None]:
        return repeat(lambda index: step(case.images[index] / 255))

    ladder = {
        "textbook loop": from_loader(case.textbook(fused=False, item=True)),
        "images resident, batches by index": resident(case.textbook(fused=False, item=True)),
        "and Adam fused": resident(case.textbook(fused=True, item=True)),
        "and no .item()": resident(case.textbook(fused=True, item=False)),
        "the script's step": captured(case.step),
    }
    tried = {name: captured(step) for name, step in case.tried.items()}
    for name, times in (("half the batch size", 0.5), ("twice the batch size", 2)):
        tried[name] = captured(case.step, times)
    only_products, flops, calls = products(case, device)
    shares = {
        "ceiling": ceiling(device),
        "products": captured(only_products),
        "data": captured(case.data),
        "optimizer": captured(lambda index: case.optimizer()),
        "evaluation": case.evaluate,
    }
    compiling = None
    for name in [name for name in tried if "compiled" in name]:
        try:
            compiling = seconds(tried[name], device)  # its first steps
        except RuntimeError:  # no C++ compiler here
            del tried[name]
    times = in_turns({**ladder, **tried, **shares}, rounds, device)
    step = times["the script's step"]
    images = case.steps * case.batch
    limit = CEILING_PRODUCTS * 2 * CEILING_SIDE**3 / times["ceiling"]  # operations a second
    rest = step - times["products"] - times["data"] - times["optimizer"]
    epoch = step / images * len(case.images) + times["evaluation"]
    return {
        "batch_size": case.batch,
        "parameters": sum(each.numel() for each in case.model.parameters() if each.requires_grad),
        "flops_per_image": flops,
        "calls_per_step": calls,
        "ceiling_gflops": limit / 1e9,
        "products_gflops": flops * images / times["products"] / 1e9,
        "images_per_second": images / step,
        "gflops": flops * images / step / 1e9,
        "percent_of_ceiling": 100 * flops * images / step / limit,
        "percent_of_step": {
            "products": 100 * times["products"] / step,
            "data_and_noise": 100 * times["data"] / step,
            "optimizer": 100 * times["optimizer"] / step,
            "elementwise_and_rest": 100 * rest / step,
        },
        "evaluation_percent_of_epoch": 100 * times["evaluation"] / epoch,
        "ladder_images_per_second": {name: images / times[name] for name in ladder},
        "tried_images_per_second": {name: images / times[name] for name in tried},
        "compile_seconds": compiling,
        "times_textbook": times["textbook loop"] / step,
    }


def settings(name: str, **changed: int) -> dict[str, int]:
    """What a script's points of the growth are measured with: its own settings, but for those `changed`.

    "width" is of its hidden layers (channels, in the flow); the GAN's are given by the assignment, and have none.
    """
    module, _ = TRAINING[name]
    own = {} if module is gan else {"width": module.HIDDEN}
    own["batch_size"] = module.flags().parse_args([]).batch_size
    return {**own, "images": GROWN_OVER[name], "threads": torch.get_num_threads(), **changed}


def grown(
    name: str, data_dir: Path, batch_size: int, images: int, threads: int, width: int | None = None
) -> dict[str, float | None]:
    """Seconds of an epoch of so many images on the CPU, and the most memory in MiB that this process, a fresh one, held
    in it beyond what it holds with its libraries loaded; None where the system has no such count.
    """
    module, training = TRAINING[name]
    torch.set_num_threads(threads)
    if width is not None:
        module.HIDDEN = width
    tiny = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(mnist.PIXELS, 1))
    tiny(torch.ones(8, 1, mnist.SIDE, mnist.SIDE)).sum().backward()  # libraries load much on first use
    experiment.adam(tiny.parameters(), 1e-3).step()
    idle = peak_memory_from_here()
    data = mnist.load("mnist", data_dir).images
    step = training(data[torch.arange(images) % len(data)])[2]
    del data
    peak_memory_from_here()  # loading takes more than training
    for index in itertools.islice(mnist.batches(images, batch_size), 3):
        step(index)
    taken = seconds(lambda: [step(index) for index in mnist.batches(images, batch_size)], torch.device("cpu"))
    used = images // batch_size * batch_size
    return {
        "images": used,
        "seconds": taken,
        "seconds_per_1000_images": 1000 * taken / used,
        "memory_mib": None if idle is None else experiment.peak_memory_mib(torch.device("cpu")) - idle,
    }


def peak_memory_from_here() -> float | None:
    """Makes `experiment.peak_memory_mib` count anew, and returns what is held now; None where only Linux could."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return experiment.peak_memory_mib(torch.device("cpu"))


def growth(data_dir: Path) -> dict:
    """Every point of GROWTH: what grows -> script -> value -> `grown`, the fastest of GROWTH_ROUNDS.

    Each round takes the points in another random order, as the machine drifts, and the fastest is the one least
    disturbed. Of threads, at most as many as there are cores.
    """
    spawn, shuffled = multiprocessing.get_context("spawn"), random.Random(0)
    points = {
        (what, name, value): (name, *settings(name, **{what: value}).items())
        for what, scripts in GROWTH.items()
        for name, values in scripts.items()
        for value in values
        if what != "threads" or value <= torch.get_num_threads()
    }
    different = sorted(set(points.values()))  # a script's own settings are a point of each thing that grows
    found: dict = {}
    in_order = [each for _ in range(GROWTH_ROUNDS) for each in shuffled.sample(different, len(different))]
    for each in experiment.progress(in_order, "growth"):
        name, *pairs = each
        try:
            with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
                one = fresh.submit(grown, name, data_dir, **dict(pairs)).result()
        except (BrokenExecutor, MemoryError, RuntimeError) as error:
            raise RunError(f"{name} with {dict(pairs)} failed: {error or 'too little memory'}") from error
        found[each] = min(one, found.get(each, one), key=lambda point: point["seconds"])
    rows: dict = {}
    for (what, name, value), each in points.items():
        rows.setdefault(what, {}).setdefault(name, {})[str(value)] = found[each]
    return rows


def draw_growth(path: Path, rows: dict) -> None:
    """Seconds (above) and memory (below) against each thing that grows, log-log, a line for each model."""
    from matplotlib.ticker import LogLocator, NullLocator

    import pictures

    whole, panels = pictures.figure(7.2, 4.2, rows=2, columns=len(rows))
    colours = {"vae": pictures.FIRST_COLOUR, "gan": pictures.SECOND_COLOUR, "nf": pictures.MARK_COLOUR}
    for axes in panels[len(rows) + 1 :]:
        axes.sharey(panels[len(rows)])
    for (what, scripts), above, below in zip(rows.items(), panels, panels[len(rows) :]):
        for name, points in scripts.items():
            style = {"marker": ".", "color": colours[name], "label": name}
            values = [int(value) for value in points]
            times = "seconds" if what == "images" else "seconds_per_1000_images"
            above.loglog(values, [point[times] for point in points.values()], **style)
            below.loglog(values, [point["memory_mib"] or math.nan for point in points.values()], **style)
        above.set_title("an epoch" if what == "images" else "per 1,000 images", fontsize=9)
        below.set_xlabel(what.replace("_", " "))
        if what == "threads":
            below.set_xticks(sorted({int(value) for points in scripts.values() for value in points}))
            below.xaxis.set(minor_locator=NullLocator(), major_formatter="{x:g}")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    panels[0].set_ylabel("seconds")
    most = max(panels[: len(rows)], key=lambda axes: len(axes.get_lines()))  # the GAN's width is fixed
    whole.legend(*most.get_legend_handles_labels(), loc="outside upper center", ncols=len(colours), frameon=False)
    panels[len(rows)].set_ylabel("memory, MiB")
    pictures.save_figure(path, whole)


def table(rows: dict[str, dict]) -> str:
    """The rows as text."""
    head = ("model", "images/s", "GFLOP/s", "% of ceiling", "ceiling GFLOP/s", "its shapes' own", "times textbook")
    keys = (
        "images_per_second", "gflops", "percent_of_ceiling", "ceiling_gflops", "products_gflops", "times_textbook"
    )  # fmt: skip
    lines = ["  ".join(f"{word:>17}" for word in head)]
    for name, row in rows.items():
        lines.append("  ".join([f"{name:>17}", *(f"{row[key]:17,.1f}" for key in keys)]))
        shares = ", ".join(f"{key.replace('_', ' ')} {value:.0f}%" for key, value in row["percent_of_step"].items())
        lines.append(f"  of a step: {shares}; evaluation {row['evaluation_percent_of_epoch']:.0f}% of an epoch")
        rates = {**row["ladder_images_per_second"], **row["tried_images_per_second"]}
        lines += [f"  {each:>36}  {rate:10,.0f} images/s" for each, rate in rates.items()]
    return "\n".join(lines)


def flags() -> experiment.Parser:
    """The script's flags."""
    parser = experiment.Parser(description=__doc__.partition("\n")[0])
    experiment.add_machine_flags(parser)
    parser.add_argument("--rounds", type=experiment.positive_int, default=7, metavar="N", help="medians are over these")
    parser.add_argument("--out", type=Path, default=experiment.ROOT, metavar="DIR", help="writes DIR/figures/bench*")
    return parser


@experiment.exit_status
def main(argv: list[str] | None = None) -> None:
    """Measure every model and write figures/bench.json, or, elsewhere than on a CPU, figures/bench_<device>.json."""
    args = flags().parse_args(argv)
    device = experiment.device(args.device)
    name = "bench" if device.type == "cpu" else f"bench_{device.type}"
    folder = experiment.folder(args.out / "figures")
    data = mnist.load("mnist", args.data_dir, device)
    rows = {}
    for case in (vae_case(data.train_images), gan_case(data.images), nf_case(data.train_images)):
        rows[case.name] = measure(case, args.rounds, args.data_dir, device)
    print(table(rows))
    content = {"environment": experiment.environment(device), "rounds": args.rounds, "models": rows}
    if device.type == "cpu":
        print("on a GPU: not measured (--device cuda)")
        content["growth"] = growth(args.data_dir)
    experiment.write(folder / f"{name}.json", experiment.json_bytes(content))
    if "growth" in content:
        draw_growth(folder / "bench_growth", content["growth"])


if __name__ == "__main__":
    sys.exit(main())
