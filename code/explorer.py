"""The explorer: the three models in one web page that needs nothing, docs/explorer.html.

    python code/explorer.py    # the page, from weights/ and explorer/; or make explorer

The page is explorer/page.html with, in it, the scripts of explorer/ and the committed weights, so that a browser can
show it from a disk and asks no other machine for anything. The scripts compute what vae.py, gan.py, nf.py and judge.py
do, by functions of the same names. Weights are rounded to as few bits as keep what the page shows within WITHIN of
PyTorch's; tests/test_explorer.py holds the page itself to that, in a browser.
"""

import base64
import bisect
import copy
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import cli  # before torch is loaded

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

import experiment
import gan
import judge
import mnist
import nf
import vae
from cli import ROOT, UserError
from training import fixed_generator, fixed_normal

SOURCES = Path(__file__).resolve().parent / "explorer"
NUMERICS = ("numbers", "layers", "vae", "gan", "nf", "judge")  # scripts for the page and for its worker
PAGE = ("drawing", "pictures", "plane", "draw", "between", "sample", "page")  # for the page alone
MODULES = {"vae_z2": vae, "vae_best": vae, "gan": gan, "nf": nf}  # a run -> its script
PARTS = {  # a run -> what of it is in the page, "" being all of it
    "vae_z2": ("encoder", "decoder"), "vae_best": ("encoder", "decoder", "prior"),
    "gan": ("average", "discriminator"), "nf": ("",), "judge": ("",),
}  # fmt: skip
WITHIN = {  # what the page shows -> how far from PyTorch's it may be, on average and at most
    "grey": (2.0, 8.0),  # levels of a decoded pixel
    "elbo": (0.1, 0.1),  # nats, of the VAE that draws
    "bits": (0.002, 0.002),  # per dimension
    "share": (0.01, 0.01),  # what D and the judge say
    "position": (0.05, 0.05),  # on the plane
}
CHECKED = 64  # latents, and test images, on which that is measured
TEST_IMAGES = 500  # in the page: the dots on the plane
ENDS = 20  # test images to go between, two of each class
NOISES = 20_000  # of the GAN, among whose images each end's nearest is looked for
DRAWS = 8  # of q(z|x) for an ELBO
RANGED = 1000  # test images whose percentiles are the ranges
NUMBERS = '<script type="text/plain" class="numbers" id="{}">{}</script>'  # in the page: a part's name, its text
MOST_BITS = 20  # for a number: explorer/numbers.js reads the lower 12 of them from three bytes
LARGEST = 10_000_000  # bytes of the page


# Weights as text


def layers(module: nn.Module) -> list[dict]:
    """What explorer/layers.js needs to know of a network, its tensors included. Batch norm goes into the layer before.

    Raises TypeError for a layer that the page does not know.
    """
    match module:
        case nn.Sequential():
            found = []
            for each in module:
                if isinstance(each, nn.BatchNorm1d):
                    scale = each.weight / torch.sqrt(each.running_var + each.eps)
                    linear = found[-1]
                    linear["weight"] = linear["weight"] * scale[:, None]
                    linear["bias"] = (linear["bias"] - each.running_mean) * scale + each.bias
                else:
                    found += layers(each)
            return found
        case nn.Linear():
            bias = torch.zeros(module.out_features) if module.bias is None else module.bias
            return [{"kind": "dense", "weight": module.weight, "bias": bias}]
        case nn.Conv2d(kernel_size=(width, _)):
            weight = module.weight.flatten(1)  # (out, in * width * width)
            return [{"kind": "convolution", "width": width, "weight": weight, "bias": module.bias}]
        case vae.Residual():
            return [{"kind": "residual", "layers": [*layers(module.linear), {"kind": "silu"}]}]
        case nf.Residual():
            silu = {"kind": "silu"}
            return [{"kind": "residual", "layers": [silu, *layers(module.near), silu, *layers(module.mix)]}]
        case nn.LeakyReLU():
            return [{"kind": "leaky", "slope": module.negative_slope}]
        case nn.SiLU() | nn.ReLU() | nn.Tanh():
            return [{"kind": type(module).__name__.lower()}]
        case nn.MaxPool2d(kernel_size=2):
            return [{"kind": "pool"}]
        case nn.Dropout() | nn.Flatten():
            return []
    raise TypeError(f"explorer/layers.js has no {type(module).__name__}")


def content(part: nn.Module) -> Any:
    """What the page's scripts need to know of a part of a model: its layers and, in the flow, what is around them."""
    match part:
        case vae.Prior():
            return [{"conditioner": layers(each.conditioner)} for each in part.couplings]
        case nf.Flow():
            learned = layers(part.dequantiser.network) if part.dequantiser else None  # None: the noise is uniform
            levels = [[coupling(each) for each in level] for level in part.levels]
            return {"shrink": part.shrink, "dequantiser": learned, "levels": levels}
        case judge.Judge():
            return {"layers": [*layers(part.body), {"kind": "relu"}, *layers(part.head)]}
    return layers(part)


def coupling(part: nf.Coupling) -> dict:
    """What explorer/nf.js needs to know of a coupling."""
    return {
        "conditioner": layers(part.conditioner),
        "gain": part.gain.flatten(),  # (channels,)
        "spread": part.spread.flatten(),  # (J * channels,)
        "components": part.components,
        "limit": part.limit,
    }


def steps(weight: Tensor, bits: int) -> Tensor:
    """What each row of a matrix (rows, columns) is rounded to multiples of: (rows, 1) float32, the greatest fitting."""
    return weight.abs().amax(1, keepdim=True).clamp(min=1e-30).float() / (2 ** (bits - 1) - 1)


def multiples(weight: Tensor, step: Tensor) -> Tensor:
    """A matrix (rows, columns) in steps (rows, 1), whole numbers."""
    return (weight.float() / step).round()


def packed(value: Any, bits: int, stream: bytearray) -> Any:
    """`value` for JSON: its tensors, in its place only their type and shape, go to the end of `stream`.

    Vectors are float32, bytes are bytes, a matrix is rounded to `bits` bits a number: a float32 for every row's step,
    the upper 8 bits of all its numbers, which zlib will shrink, then the lower ones, which it cannot, close together.
    """
    match value:
        case dict():
            return {key: packed(each, bits, stream) for key, each in value.items()}
        case list():
            return [packed(each, bits, stream) for each in value]
        case Tensor(dtype=torch.uint8):
            stream += value.numpy().tobytes()
            return {"type": "bytes", "shape": list(value.shape)}
        case Tensor(ndim=1):
            stream += value.detach().float().numpy().astype("<f4").tobytes()
            return {"type": "vector", "shape": list(value.shape)}
        case Tensor(ndim=2):
            step = steps(value.detach(), bits)
            whole = multiples(value.detach(), step).to(torch.int32).numpy().ravel()
            low = bits - 8
            lower = (whole[:, None] >> np.arange(low)) & 1  # (numbers, low)
            stream += step.numpy().astype("<f4").tobytes() + (whole >> low).astype(np.int8).tobytes()
            stream += np.packbits(lower.astype(np.uint8).ravel(), bitorder="little").tobytes()
            return {"type": "matrix", "shape": list(value.shape)}
    return value


def text(stream: bytes) -> tuple[str, int]:
    """Bytes, made smaller by zlib, as text without "<", and their number before they were text."""
    small = zlib.compress(stream, 9)
    return base64.b85encode(small, pad=True).decode().replace("<", "."), len(small)


# How many bits


def rounded(module: nn.Module, bits: int) -> nn.Module:
    """A copy with every layer's weights as `packed` rounds them. (Batch norm scales a row and its step alike.)"""
    module = copy.deepcopy(module)
    for each in module.modules():
        if isinstance(each, nn.Linear | nn.Conv2d):
            weight = each.weight.data.flatten(1)
            step = steps(weight, bits)
            each.weight.data = (multiples(weight, step) * step).to(weight).view_as(each.weight)
    return module


@torch.no_grad()
def shown(run: str, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What the page computes with a model, by its kind in WITHIN: from CHECKED latents, and of images (n, 28, 28)."""
    like = next(model.parameters())
    match model:
        case vae.VAE():
            z = model.prior.inverse(latents(model.z_dim).to(like))
            found = {"grey": 255 * torch.sigmoid(model.decode(z))}
            if run == "vae_z2":
                return found | {"position": model.encode(pixels(images).to(like))[0]}
            return found | {"elbo": elbo(model, images)}
        case gan.GAN():
            return {"grey": 127.5 * (model.average(latents(model.z_dim).to(like)) + 1), "share": says(model, images)}
        case nf.Flow():
            values = model.inverse(latents(mnist.PIXELS).to(like)).flatten(1)
            return {"grey": values, "bits": bits_per_dim(model, images)}
        case judge.Judge():
            return {"share": model(images)[1].softmax(-1)}


def latents(dimensions: int) -> Tensor:
    """The CHECKED draws of N(0, I) that the page is checked on."""
    return fixed_normal("explorer, latents", CHECKED, dimensions)


def fewest_bits(run: str, model: nn.Module, part: str, images: Tensor) -> int:
    """The fewest bits for the weights of a part of a model that keep what is shown within WITHIN of PyTorch's.

    Where a model has several parts, each may use up half of that. Raises RunError if MOST_BITS are too few.
    """
    true, share = shown(run, model, images), 1 / min(2, len(PARTS[run]))

    def enough(bits: int) -> bool:
        found = shown(run, with_rounded(model, {part: bits}), images)
        errors = {kind: (each - true[kind]).abs() for kind, each in found.items()}
        return all(e.mean() <= share * WITHIN[k][0] and e.max() <= share * WITHIN[k][1] for k, e in errors.items())

    bits = 8 + bisect.bisect_left(range(8, MOST_BITS + 1), True, key=enough)
    if bits > MOST_BITS:
        raise cli.RunError(f"{MOST_BITS} bits for the weights of {run} are too few: see WITHIN in explorer.py")
    return bits


def with_rounded(model: nn.Module, bits: dict[str, int]) -> nn.Module:
    """A copy of a model, some parts of it `rounded` to so many bits."""
    other = copy.deepcopy(model)
    for part, each in bits.items():
        other.get_submodule(part).load_state_dict(rounded(model.get_submodule(part), each).state_dict())
    return other


# Of images


def thresholds() -> Tensor:
    """Below which grey values a pixel is 0 to the VAEs: (784,) uint8, drawn once, so that no figure flickers."""
    return torch.randint(255, (mnist.PIXELS,), dtype=torch.uint8, generator=fixed_generator("explorer, pixels"))


def noise() -> Tensor:
    """The flow's noise for any image: (784,) in [0, 1)."""
    return torch.rand(mnist.PIXELS, generator=fixed_generator("explorer, noise"))


def draws(dimensions: int) -> Tensor:
    """eps of the ELBO of any image: (DRAWS, dimensions)."""
    return fixed_normal("explorer, eps", DRAWS, dimensions)


def pixels(images: Tensor) -> Tensor:
    """Images (n, 28, 28) uint8 as the VAEs see them: (n, 784), 0. or 1."""
    return (thresholds() < images.flatten(1)).float()


def elbo(model: vae.VAE, images: Tensor) -> Tensor:
    """The ELBO of images (n, 28, 28) uint8, the mean over `draws`: (n,), in nats."""
    like = next(model.parameters())
    x = pixels(images).to(like)
    return vae.log_weight(model, x, *model.encode(x), draws(model.z_dim)[:, None].to(like)).mean(0)


def says(model: gan.GAN, images: Tensor) -> Tensor:
    """D's output, the probability that it gives images (n, 28, 28) uint8 of being real: (n,)."""
    x = gan.scaled(images).flatten(1).to(next(model.parameters()))
    return torch.sigmoid(model.discriminate(x))


def bits_per_dim(model: nf.Flow, images: Tensor) -> Tensor:
    """The flow's bits per dimension of images (n, 28, 28) uint8, for one draw of the noise: (n,)."""
    u = noise().view(mnist.SIDE, mnist.SIDE).to(next(model.parameters()))
    parts = images.split(nf.EVALUATION_BATCH)
    return torch.cat([nf.bits_per_dim(nf.bound(model, part, u.expand(len(part), -1, -1))) for part in parts])


@torch.no_grad()
def ranges(models: dict[str, nn.Module], images: Tensor) -> dict[str, list[float]]:
    """The 5th and the 95th percentile of what the page says of an image, over images (n, 28, 28) uint8."""
    values = {
        "elbo": elbo(models["vae_best"], images),
        "bits": bits_per_dim(models["nf"], images),
        "real": says(models["gan"], images),
        "sure": models["judge"](images)[1].softmax(-1).amax(-1),
    }
    shares = torch.tensor([0.05, 0.95], dtype=torch.float64)
    return {name: [round(each, 4) for each in x.double().quantile(shares).tolist()] for name, x in values.items()}


@torch.no_grad()
def nearest_noise(model: gan.GAN, images: Tensor) -> Tensor:
    """Of each image (n, 28, 28) uint8 the one of NOISES noise vectors whose image is nearest: (n, z_dim)."""
    z = fixed_normal("explorer, noises", NOISES, model.z_dim)
    rows, like = gan.scaled(images).flatten(1).double(), next(model.parameters())
    distances = [torch.cdist(rows, model.average(part.to(like)).double()) for part in z.split(gan.EVALUATION_BATCH)]
    return z[torch.cat(distances, 1).argmin(1)]


# The page


def load(run: str) -> nn.Module:
    """A committed model in float64, but for the judge, which takes no other than float32. Raises UserError."""
    if run == "judge":
        return judge.load(torch.device("cpu")).eval()
    return experiment.committed(run, MODULES[run].build).double()


def facts(models: dict[str, nn.Module], data: mnist.Data) -> dict:
    """What the page needs besides the models: test images, noise that was drawn once, ranges."""
    labels = data.test_labels[:TEST_IMAGES]
    ends = torch.cat([(labels == digit).nonzero().flatten()[: ENDS // 10] for digit in range(10)])
    return {
        "images": data.test_images[:TEST_IMAGES].flatten(1),
        "labels": labels.byte(),
        "thresholds": thresholds(),
        "noise": noise(),
        "zDim": models["vae_best"].z_dim,
        "noiseDim": models["gan"].z_dim,
        "eps": draws(models["vae_best"].z_dim).flatten(),
        "ends": ends.tolist(),
        "endNoise": nearest_noise(models["gan"], data.test_images[ends]).flatten(),
        "ranges": ranges(models, data.test_images[:RANGED]),
    }


def equations(report: str) -> dict[str, int]:
    """The number of every equation in the report's source by its label: all numbered ones have one."""
    return {label: number for number, label in enumerate(re.findall(r"\\label\{(eq:[\w-]+)\}", report), start=1)}


def page(data: mnist.Data) -> str:
    """The page. Raises UserError if weights are missing.

    Raises RunError if they do not fit into LARGEST bytes, or if what the page shows is not WITHIN of PyTorch's.
    """
    models = {run: load(run) for run in PARTS}
    images = data.test_images[:CHECKED]
    described, texts, differences = {}, {}, {}

    def add(run: str, part: str, value: Any, bits: int) -> None:
        stream = bytearray()
        value = packed(value, bits, stream)
        texts[f"{run}.{part}"], size = text(bytes(stream))
        described.setdefault(run, {})[part] = {"content": value, "bits": bits, "size": size}

    for run, model in models.items():
        bits = {part: fewest_bits(run, model, part, images) for part in PARTS[run]}
        for part, each in bits.items():
            add(run, part, content(model.get_submodule(part)), each)
        true, near = shown(run, model, images), shown(run, with_rounded(model, bits), images)
        errors = {kind: (each - true[kind]).abs() for kind, each in near.items()}
        differences[run] = {kind: [float(e.mean()), float(e.max())] for kind, e in errors.items()}
        if not all(mean <= WITHIN[k][0] and most <= WITHIN[k][1] for k, (mean, most) in differences[run].items()):
            raise cli.RunError(f"{run} would be too far from PyTorch's, see WITHIN in explorer.py: {differences[run]}")
    add("facts", "", facts(models, data), 8)
    html = filled(described, texts, difference_rows(differences, described))
    if len(html.encode()) > LARGEST:
        raise cli.RunError(f"the page has {len(html.encode()):,} bytes, more than {LARGEST:,}: put less into PARTS")
    return html


def filled(described: dict[str, dict], texts: dict[str, str], differences: str) -> str:
    """explorer/page.html with what its {{names}} stand for. Raises UserError for a name that stands for nothing."""
    scripts = {name: (SOURCES / f"{name}.js").read_text(encoding="utf-8") for name in (*NUMERICS, "worker", *PAGE)}
    names = {
        "numerics": "\n".join(scripts[name] for name in NUMERICS),
        "worker": scripts["worker"],
        "page": "\n".join(scripts[name] for name in PAGE),
        "parts": json.dumps(described, allow_nan=False),
        "weights": "\n".join(NUMBERS.format(name, each) for name, each in texts.items()),
        "differences": differences,
    }
    counts = {"checked": CHECKED, "test_images": TEST_IMAGES, "noises": NOISES, "draws": DRAWS, "ranged": RANGED}
    names |= {name: f"{count:,}" for name, count in counts.items()}
    numbers = equations((ROOT / "report" / "report.tex").read_text(encoding="utf-8"))
    names |= {label: str(number) for label, number in numbers.items()}
    template = (SOURCES / "page.html").read_text(encoding="utf-8")
    if unknown := set(re.findall(r"\{\{([\w:-]+)\}\}", template)) - names.keys():
        raise UserError(f"explorer/page.html names {', '.join(sorted(unknown))}, which report.tex does not label")
    return re.sub(r"\{\{([\w:-]+)\}\}", lambda match: names[match[1]], template)


def difference_rows(differences: dict[str, dict], described: dict[str, dict]) -> str:
    """Rows of a table in HTML: a model's bits a weight, and how far it is from PyTorch's, on average and at most."""
    names = {
        "vae_z2": "VAE, z of 2", "vae_best": "VAE, flow prior", "gan": "GAN", "nf": "Flow", "judge": "Judge"
    }  # fmt: skip
    units = {
        "grey": "grey levels", "elbo": "nats of the ELBO", "bits": "bits per dimension", "share": "of D or the judge",
        "position": "of z",
    }  # fmt: skip
    rows = []
    for run, errors in differences.items():
        bits = ", ".join(str(part["bits"]) for part in described[run].values())
        for kind, (mean, most) in errors.items():
            what = f"<th scope=row>{names[run]}</th><td>{bits}</td><td>{units[kind]}</td>"
            figures = (f"{each:#.2g}" if each >= 1e-4 else "below 0.0001" for each in (mean, most))
            rows.append(f"<tr>{what}<td>{'</td><td>'.join(figures)}</td></tr>")
    return "\n".join(rows)


def flags() -> cli.Parser:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", type=cli.path, default=ROOT, metavar="DIR", help="the page is DIR/docs/explorer.html")
    cli.add_data_flags(parser, device=False, dataset_too=False)
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Write the page."""
    args = flags().parse_args(argv)
    path = experiment.folder(args.out / "docs") / "explorer.html"
    html = page(mnist.load("mnist", args.data_dir))
    experiment.write(path, html.encode())
    cli.tell(f"{path}: {len(html.encode()):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
