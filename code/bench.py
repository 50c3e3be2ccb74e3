"""How near the machine's limit training runs, and how far from a textbook loop.

    python code/bench.py        # a few minutes; writes figures/bench.json and prints its table

Three things are measured in turns, round after round, so that a machine whose speed drifts treats all alike; every
figure is the median of the rounds. (1) The ceiling: float32 multiplication of two 1024 x 1024 matrices. (2) A model's
training step, the very function that its script calls, with floating-point operations counted from its layers.
(3) The same model and batch size in a textbook loop (a torchvision dataset with ToTensor, a DataLoader, default Adam,
.item() at each step), and what each habit of the script adds to it.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import experiment
import mnist
import vae
from experiment import UserError

STEPS = 40  # of training in one measurement
CEILING_SIDE, CEILING_PRODUCTS = 1024, 40


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
    images: Tensor  # (n, 784) uint8, an epoch's
    textbook: Callable[..., Callable[[Tensor], object]]  # (fused, item) -> a step, given images in [0, 1]
    tried: dict[str, Callable[[Tensor], object]]  # variants of the step that the script does not use


def vae_case(z_dim: int, data: mnist.Data) -> Case:
    """The VAE at the report's settings."""
    args = vae.flags().parse_args([])
    images = data.train_images.flatten(1)
    model = vae.VAE(z_dim).to(images.device)
    optimizer = vae.make_optimizer(model, args.lr)
    evaluated = [vae.evaluation_set(images[: vae.EVALUATION_IMAGES], "training", z_dim) for _ in range(2)]
    idle = vae.make_optimizer(vae.VAE(z_dim).to(images.device), args.lr)  # updates without moving the trained model
    for parameter in idle.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)

    def textbook(fused: bool, item: bool) -> Callable[[Tensor], None]:
        other = vae.VAE(z_dim).to(images.device)
        adam = torch.optim.Adam(other.parameters(), lr=args.lr, fused=fused or None)  # None: torch's own choice

        def step(batch: Tensor) -> None:
            x = torch.bernoulli(batch.flatten(1))
            mu, logvar = other.encode(x)
            logits = other.decode(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu))
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
        step=lambda index: vae.training_step(model, optimizer, images, index),
        data=lambda index: vae.draw_batch(images, index, z_dim),
        optimizer=idle.step,
        evaluate=lambda: [vae.per_image_elbo(model, *each) for each in evaluated],
        images=images,
        textbook=textbook,
        tried={"the objective compiled": compiled_step, "pixels from float noise, indexed": with_float_noise},
    )


def layer_shapes(case: Case) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear layer."""
    return [(layer.in_features, layer.out_features) for layer in case.model.modules() if isinstance(layer, nn.Linear)]


def training_flops(shapes: list[tuple[int, int]]) -> int:
    """Floating-point operations of one image in training, a multiply-add being two.

    Each layer multiplies three times: forward, for the weights' gradient, and for the inputs' gradient, which the first
    layer does not need. Everything but the matrix products is left out.
    """
    products = sum(3 * inputs * outputs for inputs, outputs in shapes) - shapes[0][0] * shapes[0][1]
    return 2 * products


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, in seconds, waiting for the device."""
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
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


def product(rows: int, inner: int, columns: int, times: int, device: torch.device) -> Callable[[], None]:
    """Multiplies (rows, inner) by (inner, columns), `times` times, into the same memory."""
    a, b = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    out = torch.empty(rows, columns, device=device)

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return run


def layer_products(case: Case, device: torch.device) -> Callable[[], None]:
    """The matrix products of one training step, and nothing else: the time that the model's own shapes need."""
    shapes = layer_shapes(case)
    products = []
    for number, (inputs, outputs) in enumerate(shapes):
        products.append(product(case.batch, inputs, outputs, 1, device))  # forward
        products.append(product(outputs, case.batch, inputs, 1, device))  # the weights' gradient
        if number:
            products.append(product(case.batch, outputs, inputs, 1, device))  # the inputs' gradient

    def run() -> None:
        for _ in range(STEPS):
            for each in products:
                each()

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
                if number + 1 == STEPS:
                    break

        return run

    def repeat(function: Callable[[Tensor], object], times: float = 1) -> Callable[[], None]:
        """As many images as in STEPS steps, in batches `times` the script's."""
        drawn = indices(case, int(times * case.batch), device)
        return lambda: [function(next(drawn)) for _ in range(int(STEPS / times))]

    def resident(step: Callable[[Tensor], object]) -> Callable[[], None]:
        return repeat(lambda index: step(case.images[index] / 255))

    ladder = {
        "textbook loop": from_loader(case.textbook(fused=False, item=True)),
        "images resident, batches by index": resident(case.textbook(fused=False, item=True)),
        "and Adam fused": resident(case.textbook(fused=True, item=True)),
        "and no .item()": resident(case.textbook(fused=True, item=False)),
        "the script's step": repeat(case.step),
    }
    tried = {name: repeat(step) for name, step in case.tried.items()}
    tried |= {"half the batch size": repeat(case.step, 0.5), "twice the batch size": repeat(case.step, 2)}
    shares = {
        "ceiling": product(CEILING_SIDE, CEILING_SIDE, CEILING_SIDE, CEILING_PRODUCTS, device),
        "products": layer_products(case, device),
        "data": repeat(case.data),
        "optimizer": lambda: [case.optimizer() for _ in range(STEPS)],
        "evaluation": case.evaluate,
    }
    compiled = next(name for name in tried if "compiled" in name)
    try:
        compiling = seconds(tried[compiled], device)  # its first steps
    except RuntimeError:  # no C++ compiler here
        del tried[compiled]
        compiling = None
    times = in_turns({**ladder, **tried, **shares}, rounds, device)
    step = times["the script's step"]
    images, flops = STEPS * case.batch, training_flops(layer_shapes(case))
    ceiling = CEILING_PRODUCTS * 2 * CEILING_SIDE**3 / times["ceiling"]
    rest = step - times["products"] - times["data"] - times["optimizer"]
    epoch = step / images * len(case.images) + times["evaluation"]
    return {
        "batch_size": case.batch,
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        "flops_per_image": flops,
        "ceiling_gflops": ceiling / 1e9,
        "products_gflops": flops * images / times["products"] / 1e9,
        "images_per_second": images / step,
        "gflops": flops * images / step / 1e9,
        "percent_of_ceiling": 100 * flops * images / step / ceiling,
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
    parser.add_argument(
        "--out", type=Path, default=experiment.ROOT, metavar="DIR", help="writes DIR/figures/bench.json"
    )
    return parser


@experiment.exit_status
def main(argv: list[str] | None = None) -> None:
    """Measure every model and write figures/bench.json."""
    args = flags().parse_args(argv)
    device = experiment.device(args.device)
    path = experiment.folder(args.out / "figures") / "bench.json"
    data = mnist.load("mnist", args.data_dir, device)
    rows = {}
    for case in (vae_case(20, data),):
        rows[case.name] = measure(case, args.rounds, args.data_dir, device)
    print(table(rows))
    content = {"environment": experiment.environment(device), "rounds": args.rounds, "models": rows}
    experiment.write(path, experiment.json_bytes(content))


if __name__ == "__main__":
    sys.exit(main())
