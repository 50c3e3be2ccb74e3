"""One judge of sample quality for all three models.

A small convolutional classifier, trained once on the 60,000 training images and frozen from then on
(weights/judge.pt). Its 128 penultimate features are the space in which sets of images are compared: by the Frechet
distance (Heusel et al. 2017) and by precision and recall (Kynkaanniemi et al. 2019). Its answers count the classes.
The distances mean nothing beside those of another judge, and they fall with the number of samples, so the floor is
printed with them: mean and range of what as many random training images get in place of samples.

    python code/judge.py figures/vae_z20_samples.npz    # a row for each file of samples
    python code/judge.py --train                        # the judge itself, where its weights are missing
    python code/judge.py --train --dataset PATH         # one of other images, if they have labels
    python code/judge.py --floor                        # the floor in figures/judge.json, of the judge that is there
"""

import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import cli  # before torch is loaded

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import experiment
import mnist
import training
from cli import ROOT, UserError

SETTINGS = {"epochs": 7, "batch_size": 128, "lr": 2e-3, "seed": 0, "shift": 1}  # of its training
MEASURES = ("fid", "precision", "recall")
NEIGHBOURS = 3  # of which the farthest sets an image's radius
JUDGED = 10_000  # samples of a model
DRAWS = 5  # of real images, for the floor
SURE = 0.85  # of its confidence in real images; less brings a warning (digits of the worst model here have 0.87)
FEWEST = 1000  # samples that a file may hold: fewer say little
BLOCK = 100  # images at once, in evaluation: small enough to stay in the cache


class Judge(nn.Module):
    """A classifier, of ten digits if not told otherwise: two convolutions with pooling, 128 features.

    The features are taken before their ReLU, which would fold half of the space onto its walls: after it, uniform noise
    fell within the radius of a few real images.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 128),
        )  # fmt: skip
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (batch, 28, 28) uint8 to features (batch, 128) and the logits (batch, classes)."""
        features = self.body((images.float() / 255).unsqueeze(1))
        return features, self.head(features.relu())


def train(
    data: mnist.Data, device: torch.device, epochs: int, batch_size: int, lr: float, seed: int, shift: int
) -> tuple[Judge, list[dict]]:
    """The judge, trained on all images that are not test, and its history."""
    torch.manual_seed(seed)
    model = Judge(data.classes).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    batch_size = min(batch_size, len(data.images))
    steps = len(data.images) // batch_size
    losses = torch.zeros(steps, device=device)
    history = []
    for epoch in range(1, epochs + 1):
        begin = time.perf_counter()
        drawn = cli.progress(mnist.batches(len(data.images), batch_size, device), f"judge {epoch}/{epochs}", steps)
        for step, index in enumerate(drawn):
            factor = training.warmup_cosine((epoch - 1) * steps + step, epochs * steps, warmup=0.05)
            training.set_lr(optimizer, lr * factor)
            _, logits = model(shifted(data.images[index], shift))
            loss = F.cross_entropy(logits, data.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
        row = {"epoch": epoch, "loss": float(losses.mean()), "seconds": time.perf_counter() - begin}
        history.append(row)
        cli.say(f"judge  epoch {epoch}/{epochs}  loss {row['loss']:.4f}  {row['seconds']:.1f} s")
    return model, history


def shifted(images: Tensor, shift: int) -> Tensor:
    """The batch (n, 28, 28) moved by the same random number of pixels, up to `shift` each way; background moves in."""
    down, right = torch.randint(2 * shift + 1, (2,)).tolist()
    return F.pad(images, (shift,) * 4)[:, down : down + mnist.SIDE, right : right + mnist.SIDE]


@torch.inference_mode()
def features_and_logits(model: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, 128) in float64 and the logits (n, classes) of images (n, 28, 28) uint8, both on the CPU."""
    device = next(model.parameters()).device
    parts = [model(part.to(device)) for part in images.split(BLOCK)]
    features, logits = (torch.cat(each).cpu() for each in zip(*parts))
    return features.double(), logits


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians with the means and covariances of features (n, d) and (m, d), in float64.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the last trace being the sum of the square roots of the
    eigenvalues of a symmetric matrix, which are real and, but for rounding, not negative.
    """
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(torch.cov(a.T))
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    between = torch.linalg.eigvalsh(root_a @ torch.cov(b.T) @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + values.sum() + torch.cov(b.T).trace() - 2 * between
    return float(distance.clamp(min=0))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances (n, m) of the rows of (n, d) and (m, d)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1)).addmm_(a, b.T, alpha=-2).clamp_(min=0)


def squared_radii(features: Tensor) -> Tensor:
    """Squared distance (n,) of each row to its NEIGHBOURS-th nearest other row."""
    count = NEIGHBOURS + 1  # the nearest of all is the row itself
    parts = features.split(BLOCK)
    return torch.cat([squared_distances(part, features).topk(count, largest=False).values[:, -1] for part in parts])


def covered(features: Tensor, by: Tensor, reach: Tensor) -> float:
    """Share of the rows of `features` that lie within the radius of at least one row of `by`.

    features: (n, d); by: (m, d); reach: (m,), the radii's squares.
    """
    inside = [(squared_distances(part, by) <= reach).any(1) for part in features.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


class Described(NamedTuple):
    """What the judge makes of n images: features (n, 128), their squared radii (n,), logits of the classes (n, c)."""

    features: Tensor
    reach: Tensor
    logits: Tensor


def described(model: Judge, images: Tensor) -> Described:
    """Images (n, 28, 28) uint8 as the judge sees them; a reference is described once for all that is compared to it."""
    features, logits = features_and_logits(model, images)
    return Described(features, squared_radii(features), logits)


def compared(samples: Described, real: Described) -> dict:
    """fid, precision, recall and class_counts of samples against real images.

    Precision is the share of samples near a real image, recall the share of real ones near a sample, nearness being
    within the distance of a NEIGHBOURS-th nearest neighbour.
    """
    return {
        "fid": frechet_distance(samples.features, real.features),
        "precision": covered(samples.features, real.features, real.reach),
        "recall": covered(real.features, samples.features, samples.reach),
        "class_counts": samples.logits.argmax(1).bincount(minlength=samples.logits.shape[1]).tolist(),
    }


def verdict(model: Judge, images: Tensor, reference: Tensor) -> dict:
    """What `compared` says of images (n, 28, 28) uint8 against those of `reference`."""
    return compared(described(model, images), described(model, reference))


def name_of(dataset: str | Path) -> str:
    """The name of the judge of a data set, as in weights/<name>.pt: `judge` for MNIST."""
    return "judge" if dataset == "mnist" else f"judge_{cli.stem(dataset)}"


def home(dataset: str | Path) -> Path:
    """Where a judge is without --out: MNIST's in the repository, others beside the trials, in out/."""
    return ROOT if dataset == "mnist" else ROOT / "out"


def load(device: torch.device, root: Path = ROOT, dataset: str | Path = "mnist") -> Judge:
    """The frozen judge of a data set. Raises UserError if its weights are missing, damaged or of other data: it is
    never trained silently.

    The random numbers that its layers start from are not taken from the caller's.
    """
    path = root / "weights" / f"{name_of(dataset)}.pt"
    flags = [] if dataset == "mnist" else ["--dataset", str(dataset)]
    flags += [] if root == home(dataset) else ["--out", str(root)]
    command = cli.typed(["python", "code/judge.py", "--train", *flags])
    if not path.exists():
        raise UserError(f"no judge at {path}: train it with: {command}")
    restore = f"delete it, and train another with: {command}" if flags else "restore it: git checkout weights/judge.pt"
    archive = experiment.load_archive(path, "the judge", restore)
    config = archive.get("config") or {}
    theirs = config.get("dataset", "mnist")
    if theirs != cli.dataset_name(dataset):
        raise UserError(f"the judge {path} is of {theirs}, not of {cli.dataset_name(dataset)}")
    with torch.random.fork_rng(devices=[]):
        model = Judge(config.get("classes", 10)).to(device)
    experiment.load_state(model, archive, path, "the judge")
    return model


def find(run: experiment.Run, data: mnist.Data | None = None, quiet: bool = False) -> Judge | None:
    """The judge of the run's data. Where there is none, None and, unless `quiet`, a line on what the result lacks.

    data: the run's, of which it may be that no judge can be trained.
    """
    dataset = run.args.dataset
    own = dataset != "mnist" and (run.out / "weights" / f"{name_of(dataset)}.pt").exists()
    try:
        return load(run.device, run.out if own else home(dataset), dataset)
    except UserError as error:
        if not quiet:
            none = data is not None and data.classes < 2
            why = "images without labels of two classes or more have no judge" if none else error
            run.say(f"the result is without fid, precision, recall and class_counts: {why}")
        return None


def read_samples(path: Path) -> Tensor:
    """The images of an .npz as (n, 28, 28) uint8. Raises UserError if it holds anything else."""
    arrays = mnist.read_npz(path, {"images"})
    if "images" not in arrays:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'} and no images: name the array so")
    images = mnist.checked(str(path), arrays["images"])
    if len(images) < FEWEST:
        raise UserError(f"{path} holds {len(images)} images: at least {FEWEST} are needed")
    return torch.from_numpy(images)


def confidence(seen: Described) -> float:
    """The judge's mean confidence in its answers."""
    return float(seen.logits.softmax(1).amax(1).mean())


def head(classes: int) -> str:
    """The head of the table."""
    return "  Frechet  precision  recall  " + " ".join(f"{number:5d}" for number in range(classes))


def row(name: str, result: dict) -> str:
    """A line of the table, below its head."""
    counts = " ".join(f"{count:5.0f}" for count in result["class_counts"])
    return f"{result['fid']:9.2f}  {result['precision']:9.3f}  {result['recall']:6.3f}  {counts}  {name}"


def real_draws(model: Judge, data: mnist.Data, n: int) -> list[Described]:
    """DRAWS random draws of n of the training images, or of all if there are fewer; the same ones in every call.

    The files' first images are no random draw: their writers come in order.
    """
    images, generator = data.train_images, training.fixed_generator("floor")
    draws = [torch.randperm(len(images), generator=generator)[:n].to(images.device) for _ in range(DRAWS)]
    return [described(model, images[index]) for index in draws]


def floor(draws: list[Described], real: Described) -> dict:
    """What real images get in place of samples: mean of each measure over `draws`, and the draws' own.

    Every verdict depends on the number of samples, so it is the floor of as many samples as a draw has.
    """
    verdicts = [compared(draw, real) for draw in draws]
    means = {key: statistics.mean(each[key] for each in verdicts) for key in MEASURES}
    counts = zip(*(each["class_counts"] for each in verdicts))
    return {**means, "class_counts": [statistics.mean(each) for each in counts], "draws": verdicts}


def floors(model: Judge, data: mnist.Data) -> dict:
    """The floors of as many samples as a model is judged by, against test and validation images."""
    draws = real_draws(model, data, JUDGED)
    return {
        "floor": floor(draws, described(model, data.test_images)),
        "floor_validation": floor(draws, described(model, data.validation_images)),
    }


def floor_rows(n: int, floor: dict) -> str:
    """Three lines of the table: mean, least and greatest of each measure over the draws of n real images."""
    name = f"{len(floor['draws'])} draws of {n:,} training images: the floor"
    lines = [row(f"(mean of {name})", floor)]
    for word, choose in (("least", min), ("greatest", max)):
        fid, precision, recall = (choose(draw[key] for draw in floor["draws"]) for key in MEASURES)
        blank = " " * (6 * len(floor["class_counts"]) - 1)
        lines.append(f"{fid:9.2f}  {precision:9.3f}  {recall:6.3f}  {blank}  ({word} of each)")
    return "\n".join(lines)


def measure_floors(data: mnist.Data, device: torch.device, out: Path, dataset: str | Path) -> None:
    """Put the floors of the judge that is there into its JSON."""
    name = name_of(dataset)
    path = out / "figures" / f"{name}.json"
    model = load(device, out, dataset)
    try:
        content = json.loads(path.read_bytes())
        same = content["weights_sha256"] == hashlib.sha256((out / "weights" / f"{name}.pt").read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError):
        same = False
    if not same:
        raise UserError(f"{path} is not of the judge in {out / 'weights'}: delete both, and train with --train")
    content["result"] |= floors(model, data)
    experiment.write(path, experiment.json_bytes(content))


def train_and_save(data: mnist.Data, device: torch.device, out: Path, dataset: str | Path) -> None:
    """Train the judge, and write its weights and its JSON in figures/."""
    name = name_of(dataset)
    path = experiment.folder(out / "weights") / f"{name}.pt"
    figures = experiment.folder(out / "figures")
    if data.classes < 2:
        raise UserError(f"{dataset} has no labels of two classes or more, one for each image: a judge needs them")
    if path.exists():
        raise UserError(f"{path} is there, and every committed distance depends on it: delete it to train another")
    environment = experiment.environment(device)
    model, history = train(data, device, **SETTINGS)
    _, logits = features_and_logits(model, data.test_images)
    config = {**SETTINGS, "neighbours": NEIGHBOURS}
    if dataset != "mnist":
        config |= {"dataset": cli.dataset_name(dataset), "classes": data.classes}
    weights = experiment.weights_bytes(name, config, model)
    result = {
        "test_accuracy": float((logits.argmax(1) == data.test_labels.cpu()).double().mean()),
        **floors(model, data),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_seconds": sum(each["seconds"] for each in history),
        "peak_memory_mib": experiment.peak_memory_mib(device),
    }
    content = {"run": name, "config": config, "environment": environment, "history": history, "result": result}
    experiment.write(path, weights)
    content["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    experiment.write(figures / f"{name}.json", experiment.json_bytes(content))
    cli.tell(f"test accuracy {100 * result['test_accuracy']:.2f}%, {result['train_seconds']:.0f} s of training")


def flags() -> cli.Parser:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument("files", nargs="*", type=cli.path, metavar="FILE.npz", help="key images: uint8, N x 28 x 28")
    parser.add_argument("--reference", choices=("test", "validation"), default="test", help="the real images")
    parser.add_argument("--train", action="store_true", help="train the judge, if there is none yet")
    parser.add_argument("--floor", action="store_true", help="measure again what real images get, for the judge's JSON")
    parser.add_argument(
        "--out",
        type=cli.path,
        metavar="DIR",
        help="the judge is in DIR/weights (without it: this repository's, or out's)",
    )
    cli.add_data_flags(parser)
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Judge files of samples, or train the judge."""
    args = flags().parse_args(argv)
    device = cli.device(args.device)
    if args.train + args.floor + bool(args.files) != 1:
        raise UserError("name one or more .npz files of samples, or --train, or --floor")
    out = args.out or home(args.dataset)
    if not args.files:
        write = train_and_save if args.train else measure_floors
        write(mnist.load(args.dataset, args.data_dir, device), device, out, args.dataset)
        return
    model = load(device, out, args.dataset)
    samples = [(path, read_samples(path)) for path in args.files]
    data = mnist.load(args.dataset, args.data_dir, device)
    reference = data.test_images if args.reference == "test" else data.validation_images
    real = described(model, reference)
    cli.tell(f"against {len(reference):,} {args.reference} images; k = {NEIGHBOURS}")
    cli.tell(head(model.head.out_features))
    for n in sorted({len(images) for _, images in samples}):
        draws = real_draws(model, data, n)
        cli.tell(floor_rows(len(draws[0].features), floor(draws, real)))
        for path, images in samples:
            if len(images) == n:
                seen = described(model, images)
                cli.tell(row(f"{path} ({n:,})", compared(seen, real)))
                if confidence(seen) < SURE * confidence(real):
                    sure, usual = (f"{100 * confidence(each):.0f}%" for each in (seen, real))
                    cli.say(
                        f"{path}: the judge's mean confidence is {sure}, in real images {usual}: are these images of "
                        "other data, inverted or turned? Then its figures mean nothing"
                    )


if __name__ == "__main__":
    sys.exit(main())
