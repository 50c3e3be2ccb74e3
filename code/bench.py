"""How near the machine's limit training runs, how far from a textbook loop, and how its cost grows.

    python code/bench.py        # an hour or so; writes figures/bench.json and bench_growth, prints its table

All parts are timed in alternating rounds, so that drift in the machine's speed affects them alike; figures are medians:
(1) the ceiling, float32 multiplication of two 1024 x 1024 matrices; (2) a model's training step, the very function that
its script calls, its floating-point operations counted by PyTorch's own counter, and its products alone; (3) the same
model and batch size in a textbook loop (a torchvision dataset with ToTensor, a DataLoader, Adam by its default
implementation, .item() at each step). Then, on a CPU, races of a textbook's VAE and flow against the scripts', until
validation passes some marks; and time and memory against width, batch size, number of images and threads, each point in
a process of its own, whose memory is thus its own; and the VAE's speed beside other work (`beside`).
"""

import functools
import itertools
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cli  # before torch is loaded

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import experiment
import gan
import mnist
import nf
import training
import vae
from experiment import seconds

CEILING_SIDE, CEILING_PRODUCTS = 1024, 40
GROWTH = {  # what grows -> script -> values; but for the images, the script's own setting is among them
    "width": {"vae": (100, 200, 400, 800, 1600), "nf": (8, 16, 32, 64)},
    "batch_size": {"vae": (80, 160, 320, 640, 1280), "gan": (64, 128, 256, 512, 1024), "nf": (12, 24, 48, 96, 192)},
    "images": {"vae": (5120, 20_480, 81_920), "gan": (4096, 16_384, 65_536), "nf": (480, 1920, 7680)},
    "threads": {"vae": (1, 2), "gan": (1, 2), "nf": (1, 2)},
}
GROWN_OVER = {"vae": 7680, "gan": 5120, "nf": 960}  # images of an epoch, unless they are what grows
GROWTH_ROUNDS = 4
MARKS = {"vae": (-105.0, -101.7), "nf": (-1.82,)}  # of the races: nats (ELBO), and minus bits per dimension
RACE_SECONDS = 600  # of training at most


@dataclass
class Case:
    """A model and how it is trained, at the report's settings but for some flags."""

    args: Namespace
    images: Tensor  # (n, ...) uint8, an epoch's
    model: nn.Module
    optimizer: object
    step: Callable[[Tensor], object]  # a training step of the script, on the batch's indices
    textbook: Callable[[Tensor], None]  # the textbook's, of a second model, on images (batch, 1, 28, 28) in [0, 1]
    steps: int  # of training in one measurement


def vae_case(images: Tensor, *flags: str) -> Case:
    """vae.py on images (n, 28, 28) uint8."""
    args, images = vae.flags().parse_args(flags), images.flatten(1)
    model, plain = (vae.build(cli.settings(args)).to(images.device) for _ in range(2))
    optimizer = training.adam(model.parameters(), args.lr, args.weight_decay, betas=args.betas)
    textbook = vae_textbook(plain, torch.optim.Adam(plain.parameters(), lr=args.lr, betas=args.betas))

    def step(index: Tensor) -> Tensor:
        return vae.training_step(model, optimizer, images, index, args.gradient == "stopped", args.clip)

    return Case(args, images, model, optimizer, step, textbook, 40)


def vae_textbook(model: vae.VAE, adam: torch.optim.Adam) -> Callable[[Tensor], None]:
    """The step that tutorials show, down minus the ELBO (under a flow prior: with its sampled KL)."""

    def step(batch: Tensor) -> None:
        x = torch.bernoulli(batch.flatten(1))
        mu, logvar = model.encode(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        cross_entropy = F.binary_cross_entropy_with_logits(model.decode(z), x, reduction="sum")
        if model.prior.couplings:
            u, ladj = model.prior(z)
            log_q = -0.5 * (logvar + (z - mu) ** 2 / logvar.exp()).sum(1)
            kl = (log_q + 0.5 * (u**2).sum(1) - ladj).sum()
        else:
            kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()
        loss = (cross_entropy + kl) / len(x)
        adam.zero_grad()
        loss.backward()
        adam.step()
        loss.item()

    return step


def gan_case(images: Tensor, *flags: str) -> Case:
    """gan.py on images (n, 28, 28) uint8."""
    args, images = gan.flags().parse_args(flags), images.flatten(1)
    model, plain = (gan.build(cli.settings(args)).to(images.device) for _ in range(2))
    optimizers = gan.make_optimizers(model, args.lr, args.betas)
    networks = (plain.discriminator, plain.generator)
    adam_d, adam_g = (torch.optim.Adam(each.parameters(), lr=args.lr, betas=args.betas) for each in networks)
    loss = nn.BCEWithLogitsLoss()

    def textbook(batch: Tensor) -> None:
        x = (batch.flatten(1) - 0.5) / 0.5
        real, fake = torch.ones(len(x), device=x.device), torch.zeros(len(x), device=x.device)
        z_d, z_g = (torch.randn(len(x), args.z_dim, device=x.device) for _ in range(2))
        adam_d.zero_grad()
        loss_d = loss(plain.discriminate(x), real) + loss(plain.discriminate(plain.generate(z_d).detach()), fake)
        loss_d.backward()
        adam_d.step()
        adam_g.zero_grad()
        loss_g = loss(plain.discriminate(plain.generate(z_g)), real)
        loss_g.backward()
        adam_g.step()
        loss_d.item(), loss_g.item()

    def step(index: Tensor) -> Tensor:
        return gan.training_step(model, optimizers, images, index, 1 - args.decay)

    return Case(args, images, model, optimizers, step, textbook, 40)


def nf_case(images: Tensor, *flags: str) -> Case:
    """nf.py on images (n, 28, 28) uint8."""
    args = nf.flags().parse_args(flags)
    model, plain = (nf.build(cli.settings(args)).to(images.device) for _ in range(2))
    optimizer = training.adam(model.parameters(), args.lr, betas=args.betas)
    textbook = nf_textbook(plain, torch.optim.Adam(plain.parameters(), lr=args.lr, betas=args.betas), args.clip)

    def step(index: Tensor) -> tuple[Tensor, ...]:
        return nf.training_step(model, optimizer, images, index, args.clip)

    return Case(args, images, model, optimizer, step, textbook, 10)


def nf_textbook(model: nn.Module, adam: torch.optim.Adam, clip: float) -> Callable[[Tensor], None]:
    """The step that tutorials show, down the bits per dimension."""

    def step(batch: Tensor) -> None:
        images = batch.view(-1, mnist.SIDE, mnist.SIDE) * 255
        loss = nf.bits_per_dim(nf.bound(model, images, torch.rand_like(images))).mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        adam.step()
        loss.item()

    return step


CASES = {
    "vae": vae_case,
    "vae_best": lambda images, *flags: vae_case(images, "--best", *flags),
    "gan": gan_case,
    "nf": nf_case,
}


class _Products(TorchDispatchMode):
    """Keeps every matrix product and convolution that runs under it, with its operands."""

    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in flop_registry:
            operands = [each.detach() if isinstance(each, Tensor) else each for each in args]  # without their graph
            self.calls.append(functools.partial(function, *operands, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def products(case: Case) -> tuple[Callable[[Tensor], None], int]:
    """A function that repeats a training step's matrix products and convolutions and nothing else, whatever the batch's
    indices; and their floating-point operations for each image, a multiply-add being two.
    """
    index = torch.arange(case.args.batch_size, device=case.images.device)
    case.step(index)  # an optimizer's first makes its state
    with FlopCounterMode(display=False) as counter, _Products() as kept:
        case.step(index)

    def repeat(index: Tensor) -> None:
        with torch.inference_mode():
            for each in kept.calls:
                each()

    return repeat, counter.get_total_flops() // case.args.batch_size


def in_turns(functions: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function over the rounds, each round calling all of them, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in cli.progress(range(rounds + 1), "rounds"):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def repeated(case: Case, step: Callable[[Tensor], object]) -> Callable[[], None]:
    """A function that takes `case.steps` steps on the case's batches."""
    batch, device = case.args.batch_size, case.images.device
    epochs = (mnist.batches(len(case.images), batch, device) for _ in itertools.count())
    drawn, captured = itertools.chain.from_iterable(epochs), training.CapturedStep(step, device)
    return lambda: [captured(next(drawn)) for _ in range(case.steps)]


def loader_of(data_dir: Path, batch_size: int, images: int | None = None) -> torch.utils.data.DataLoader:
    """The textbook's: shuffled batches of MNIST, of the first `images` training images or of all."""
    import torchvision

    try:
        dataset = torchvision.datasets.MNIST(data_dir, train=True, transform=torchvision.transforms.ToTensor())
    except RuntimeError:
        message = f"torchvision, which the textbook loop uses, wants unpacked files: gunzip those in {data_dir}"
        raise cli.UserError(message) from None
    subset = torch.utils.data.Subset(dataset, range(images or len(dataset)))
    return torch.utils.data.DataLoader(subset, batch_size=batch_size, shuffle=True)


def measure(case: Case, rounds: int, data_dir: Path) -> dict:
    """One model's row of the table."""
    device, batch = case.images.device, case.args.batch_size
    loader = loader_of(data_dir, batch)

    def textbook() -> None:
        for pixels, _ in itertools.islice(loader, case.steps):
            case.textbook(pixels.to(device))

    a, b, out = (torch.randn(CEILING_SIDE, CEILING_SIDE, device=device) for _ in range(3))
    only_products, flops = products(case)
    parts = {
        "ceiling": lambda: [torch.mm(a, b, out=out) for _ in range(CEILING_PRODUCTS)],
        "textbook": textbook,
        "step": repeated(case, case.step),
        "products": repeated(case, only_products),
    }
    times = in_turns(parts, rounds, device)
    images = case.steps * batch
    limit = CEILING_PRODUCTS * 2 * CEILING_SIDE**3 / times["ceiling"]  # operations a second
    return {
        "batch_size": batch,
        "flops_per_image": flops,
        "ceiling_gflops": limit / 1e9,
        "products_gflops": flops * images / times["products"] / 1e9,
        "images_per_second": images / times["step"],
        "gflops": flops * images / times["step"] / 1e9,
        "percent_of_ceiling": 100 * flops * images / times["step"] / limit,
        "products_percent_of_step": 100 * times["products"] / times["step"],
        "textbook_images_per_second": images / times["textbook"],
        "times_textbook": times["textbook"] / times["step"],
    }


# A race: what a user would write instead


class TextbookVAE(vae.VAE):
    """A tutorial's: 784-400-20 and its mirror, with ReLU; the encoder's second output is the log-variance itself."""

    def __init__(self):
        super().__init__(20, 400, depth=1)
        self.encoder[1] = self.decoder[1] = nn.ReLU()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (batch, 784) to mu and logvar, (batch, 20) each."""
        return self.encoder(x).chunk(2, dim=-1)


class TextbookFlow(nn.Module):
    """The assignment's flow: eight affine couplings by fully connected networks on a checkerboard, 27.7M weights."""

    def __init__(self, hidden: int = 1024):
        super().__init__()
        self.networks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(mnist.PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                nn.Linear(hidden, 2 * mnist.PIXELS),
            )
            for _ in range(8)
        )  # fmt: skip
        self.dequantiser = None  # the noise is uniform
        side = torch.arange(mnist.SIDE)
        self.register_buffer("white", ((side[:, None] + side) % 2).flatten().float())

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Images (batch, 28, 28) to z (batch, 784) and ladj (batch,), as `nf.Flow` does."""
        y, ladj = nf.to_logits(v.flatten(1), 1e-5)
        for number, network in enumerate(self.networks):
            moved = self.white if number % 2 else 1 - self.white
            log_scale, shift = (moved * each for each in network(y * (1 - moved)).chunk(2, dim=1))
            log_scale = torch.tanh(log_scale)
            y, ladj = y * torch.exp(log_scale) + shift, ladj + log_scale
        return y, ladj.sum(1)


def race(runners: dict[str, tuple[Callable[[], object], Callable[[], float]]], marks: Sequence[float]) -> dict:
    """Trains in turns, a little at a time, until all have passed the marks, diverged, or trained for RACE_SECONDS.

    runners: name -> (train a little, measure on validation: higher is better). Returns name -> seconds of training in
    all, what was reached by then (None: not finite), and the seconds until each mark (None: not passed); measuring is
    not counted.
    """
    rows: dict = {name: {"seconds": 0.0, "reached": None, "passed": dict.fromkeys(map(str, marks))} for name in runners}
    running = dict(runners)
    while running:
        for name, (train, validate) in list(running.items()):
            row = rows[name]
            row["seconds"] += seconds(train, torch.device("cpu"))
            reached = validate()
            row["reached"] = reached if math.isfinite(reached) else None
            for mark in marks:
                if reached >= mark and row["passed"][str(mark)] is None:
                    row["passed"][str(mark)] = row["seconds"]
            if None not in row["passed"].values() or row["seconds"] > RACE_SECONDS or row["reached"] is None:
                del running[name]
            cli.say(f"{name} {row['seconds']:.0f} s: {reached:.3f}")
    return rows


def in_parts(case: Case, parts: int) -> Callable[[], None]:
    """Trains as the script does, the learning rate included: an epoch divided by `parts` at each call.

    After the script's epochs it goes on at the last learning rate.
    """
    args, images = case.args, len(case.images)
    steps = mnist.steps_per_epoch(images, args.batch_size)
    epochs = (mnist.batches(images, args.batch_size) for _ in itertools.count())
    numbered, last = enumerate(itertools.chain.from_iterable(epochs)), args.epochs * steps - 1

    def train() -> None:
        for step, index in itertools.islice(numbered, -(-steps // parts)):
            factor = training.warmup_cosine(min(step, last), args.epochs * steps, args.warmup)
            training.set_lr(case.optimizer, args.lr * factor)
            case.step(index)

    return train


def from_loader(step: Callable[[Tensor], None], data_dir: Path, images: int, parts: int) -> Callable[[], None]:
    """Trains by a textbook's step on batches of 128 of the first `images` from a DataLoader: an epoch divided by
    `parts` at each call.
    """
    loader = loader_of(data_dir, 128, images)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: [step(pixels) for pixels, _ in itertools.islice(batches, -(-len(loader) // parts))]


def races(data: mnist.Data, data_dir: Path) -> dict:
    """For VAE and flow: the textbook's model and training, and the script's, until MARKS."""
    images = len(data.train_images)
    torch.manual_seed(0)
    plain = TextbookVAE()
    step = vae_textbook(plain, torch.optim.Adam(plain.parameters(), lr=1e-3))
    case = vae_case(data.train_images)
    pixels = vae.evaluation_set(data.validation_images, "validation", 20)
    vaes = {
        "textbook": (from_loader(step, data_dir, images, 4), lambda: float(vae.per_image_elbo(plain, *pixels).mean())),
        "script": (in_parts(case, 4), lambda: float(vae.per_image_elbo(case.model, *pixels).mean())),
    }
    affine = TextbookFlow()
    affine_step = nf_textbook(affine, torch.optim.Adam(affine.parameters(), lr=1e-3), 100.0)
    flow = nf_case(data.train_images)
    noisy = nf.evaluation_set(data.validation_images, "validation")
    flows = {
        "textbook": (from_loader(affine_step, data_dir, images, 4), lambda: -nf.mean_bpd(affine, *noisy)),
        "script": (in_parts(flow, 4), lambda: -nf.mean_bpd(flow.model, *noisy)),
    }
    return {"vae": race(vaes, MARKS["vae"]), "nf": race(flows, MARKS["nf"])}


# Growth


def settings(name: str, **changed: int) -> dict[str, int]:
    """What a script's points of the growth are measured with: its own settings, but for those `changed`.

    "width" is of its hidden layers (channels, in the flow); the GAN's are given by the assignment, and have none.
    """
    args = {"vae": vae, "gan": gan, "nf": nf}[name].flags().parse_args([])
    own = {"width": args.hidden} if "hidden" in args else {}
    own |= {"batch_size": args.batch_size, "images": GROWN_OVER[name], "threads": torch.get_num_threads()}
    return own | changed


def grown(
    name: str, data_dir: Path, batch_size: int, images: int, threads: int, width: int | None = None
) -> dict[str, float | None]:
    """Seconds of an epoch on the CPU, and this fresh process's peak memory in MiB beyond what its libraries take (None
    where the system does not tell).
    """
    torch.set_num_threads(threads)
    tiny = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(mnist.PIXELS, 1))
    tiny(torch.ones(8, 1, mnist.SIDE, mnist.SIDE)).sum().backward()  # libraries load much on first use
    training.adam(tiny.parameters(), 1e-3).step()
    idle = peak_memory_from_here()
    data = mnist.load("mnist", data_dir).images
    flags = ["--batch-size", str(batch_size), *(["--hidden", str(width)] if width else [])]
    step = CASES[name](data[torch.arange(images) % len(data)], *flags).step
    del data
    peak_memory_from_here()  # loading takes more than training
    for index in itertools.islice(mnist.batches(images, batch_size), 3):
        step(index)

    def epoch() -> None:  # what a step returns is let go: kept, it would hold more memory than its own
        for index in mnist.batches(images, batch_size):
            step(index)

    taken = seconds(epoch, torch.device("cpu"))
    used = images // batch_size * batch_size
    return {
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

    Each round takes the points in a new random order, as the machine drifts; the fastest is the least disturbed.
    There are at most as many threads as cores.
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
    for each in cli.progress(in_order, "growth"):
        name, *pairs = each
        try:
            with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
                one = fresh.submit(grown, name, data_dir, **dict(pairs)).result()
        except (BrokenExecutor, MemoryError, RuntimeError) as error:
            raise cli.RunError(f"{name} with {dict(pairs)} failed: {error or 'too little memory'}") from error
        found[each] = min(one, found.get(each, one), key=lambda point: point["seconds"])
    rows: dict = {}
    for (what, name, value), each in points.items():
        rows.setdefault(what, {}).setdefault(name, {})[str(value)] = found[each]
    return rows


def draw_growth(path: Path, rows: dict) -> None:
    """Seconds (above) and memory (below) against each thing that grows, log-log, a line for each model."""
    from matplotlib.ticker import LogLocator, NullLocator

    import pictures

    fig, panels = pictures.figure(7.2, 4.2, rows=2, columns=len(rows))
    colours = {"vae": pictures.FIRST_COLOUR, "gan": pictures.SECOND_COLOUR, "nf": pictures.MARK_COLOUR}
    for ax in panels[len(rows) + 1 :]:
        ax.sharey(panels[len(rows)])
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
    for ax in panels:
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=8)
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    panels[0].set_ylabel("seconds")
    fig.legend(*panels[-1].get_legend_handles_labels(), loc="outside upper center", ncols=len(colours), frameon=False)
    panels[len(rows)].set_ylabel("memory, MiB")
    pictures.save_figure(path, fig)


# Beside other work

BESIDE_ROUNDS = 5
BESIDE_SECONDS = 6.0  # of steps, after a third of that to warm up
SPINS = {"as OpenMP's default": {}, "as the scripts": cli.SPIN}  # environment of a process


def steps_for(seconds: float, data_dir: str) -> None:
    """Prints the images a second of the VAE's training step, over so many seconds."""
    case = vae_case(mnist.load("mnist", data_dir).train_images)
    take_steps, reached = repeated(case, case.step), []
    for limit in (seconds / 3, seconds):
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < limit:
            take_steps()
            steps += case.steps
        reached.append(steps * case.args.batch_size / (time.perf_counter() - begin))
    cli.tell(str(reached[-1]))


def beside(data_dir: Path) -> dict:
    """The VAE's images a second by what else runs and how threads wait: alone, beside a process that is always busy,
    and two such trainings at a time (each one's, on average).

    Each round measures everything once, in processes of their own; medians over the rounds.
    """
    code = str(Path(__file__).parent)
    train = [sys.executable, "-c", f"import bench; bench.steps_for({BESIDE_SECONDS}, {str(data_dir)!r})"]
    busy = [sys.executable, "-c", "while True: pass"]
    others = {"nothing": [], "a busy process": [busy], "another training": [train]}
    found: dict = {other: {spin: [] for spin in SPINS} for other in others}
    unset = {name: value for name, value in os.environ.items() if name not in {*cli.SPIN, "OMP_WAIT_POLICY"}}
    for _, other, spin in cli.progress([*itertools.product(range(BESIDE_ROUNDS), others, SPINS)], "beside other work"):
        environment = unset | SPINS[spin] | {"PYTHONPATH": code}
        started = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            for command in (train, *others[other])
        ]
        try:
            printed = [each.communicate()[0] for each in started if each.args is train]
        finally:
            for each in started:
                each.kill()
                each.wait()
        if not all(printed):
            raise cli.RunError("a training beside other work has failed: see its message above")
        found[other][spin].append(statistics.mean(map(float, printed)))
    return {other: {spin: statistics.median(each) for spin, each in spins.items()} for other, spins in found.items()}


def flags() -> cli.Parser:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser, dataset_too=False)
    parser.add_argument("--rounds", type=cli.positive_int, default=7, metavar="N", help="medians are over these")
    parser.add_argument("--out", type=cli.path, default=cli.ROOT, metavar="DIR", help="writes DIR/figures/bench*")
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Measure every model and write figures/bench.json, or, elsewhere than on a CPU, figures/bench_<device>.json."""
    args = flags().parse_args(argv)
    device = cli.device(args.device)
    name = "bench" if device.type == "cpu" else f"bench_{device.type}"
    folder = experiment.folder(args.out / "figures")
    data = mnist.load("mnist", args.data_dir, device)
    rows = {}
    for script, case in CASES.items():
        rows[script] = measure(case(data.images if script == "gan" else data.train_images), args.rounds, args.data_dir)
        if script == "vae_best":
            cases = {prior: case(data.train_images, "--prior", prior) for prior in ("flow", "normal")}
            times = in_turns({prior: repeated(each, each.step) for prior, each in cases.items()}, args.rounds, device)
            rows[script]["times_normal_prior"] = times["flow"] / times["normal"]
        cli.tell("\n  ".join((script, *(f"{key} {value:,.2f}" for key, value in rows[script].items()))))
    content = {"environment": experiment.environment(device), "rounds": args.rounds, "models": rows}
    if device.type == "cpu":
        content["races"] = races(data, args.data_dir)
        content["growth"] = growth(args.data_dir)
        content["beside"] = beside(args.data_dir)
    experiment.write(folder / f"{name}.json", experiment.json_bytes(content))
    if "growth" in content:
        draw_growth(folder / "bench_growth", content["growth"])


if __name__ == "__main__":
    sys.exit(main())
