"""One judge of sample quality for all three models.

A small convolutional classifier, trained once on the 60,000 training images and frozen from then on
(weights/judge.pt). Its 128 penultimate features are the space in which sets of images are compared: by the Frechet
distance (Heusel et al. 2017) and by precision and recall (Kynkaanniemi et al. 2019). Its answers count the classes.
The distances mean nothing beside those of another judge, so the floor is printed with them: what real training images
get in place of samples.

    python code/judge.py figures/vae_z20_samples.npz    # a row for each file of samples
    python code/judge.py --train                        # the judge itself, where its weights are missing
    python code/judge.py --train --dataset PATH         # one of other images, if they have labels
"""

import hashlib
import shlex
import sys
import time
from pathlib import Path

import cli  # before torch is loaded

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import experiment
import mnist
import training
from cli import ROOT, UserError

SETTINGS = {"epochs": 7, "batch_size": 128, "lr": 2e-3, "seed": 0, "shift": 1}  # of its training
NEIGHBOURS = 3  # of which the farthest sets an image's radius
JUDGED = 10_000  # samples of a model
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


def covered(features: Tensor, by: Tensor) -> float:
    """Share of the rows of `features` that lie within the radius of at least one row of `by`."""
    reach = squared_radii(by)
    inside = [(squared_distances(part, by) <= reach).any(1) for part in features.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def verdict(model: Judge, images: Tensor, reference: Tensor) -> dict:
    """fid, precision, recall and class_counts of images (n, 28, 28) uint8 against those of `reference`.

    Precision is the share of images near a real one, recall the share of real ones near an image, nearness being within
    the distance of a NEIGHBOURS-th nearest neighbour.
    """
    features, logits = features_and_logits(model, images)
    real, _ = features_and_logits(model, reference)
    return {
        "fid": frechet_distance(features, real),
        "precision": covered(features, by=real),
        "recall": covered(real, by=features),
        "class_counts": logits.argmax(1).bincount(minlength=logits.shape[1]).tolist(),
    }


def name_of(dataset: str | Path) -> str:
    """The name of the judge of a data set, as in weights/<name>.pt: `judge` for MNIST."""
    return "judge" if dataset == "mnist" else f"judge_{Path(dataset).stem}"


def home(dataset: str | Path) -> Path:
    """Where a judge is without --out: MNIST's in the repository, others beside the trials, in out/."""
    return ROOT if dataset == "mnist" else ROOT / "out"


def load(device: torch.device, root: Path = ROOT, dataset: str | Path = "mnist") -> Judge:
    """The frozen judge of a data set. Raises UserError if its weights are missing, damaged or of other data: it is
    never trained silently.

    The random numbers that its layers start from are not taken from the caller's.
    """
    path = root / "weights" / f"{name_of(dataset)}.pt"
    command = "python code/judge.py --train" + ("" if dataset == "mnist" else f" --dataset {shlex.quote(str(dataset))}")
    if not path.exists():
        raise UserError(f"no judge at {path}: train it with: {command}")
    restore = "git checkout weights/judge.pt" if dataset == "mnist" else command
    archive = experiment.load_archive(path, "the judge", f"restore it with: {restore}")
    config = archive.get("config")
    theirs = config.get("dataset", "mnist") if isinstance(config, dict) else "mnist"
    if theirs != cli.dataset_name(dataset):
        raise UserError(f"the judge {path} is of {theirs}, not of {cli.dataset_name(dataset)}")
    with torch.random.fork_rng(devices=[]):
        model = Judge(config["classes"] if isinstance(config, dict) and "classes" in config else 10).to(device)
    experiment.load_state(model, archive, path, "the judge")
    return model


def find(run: experiment.Run, quiet: bool = False) -> Judge | None:
    """The judge of the run's data. Where there is none, None and, unless `quiet`, a line on what the result lacks."""
    dataset = run.args.dataset
    try:
        if dataset != "mnist" and (run.out / "weights" / f"{name_of(dataset)}.pt").exists():
            return load(run.device, run.out, dataset)
        return load(run.device, home(dataset), dataset) if dataset != "mnist" else load(run.device)
    except UserError as error:
        if not quiet:
            run.say(f"the result is without fid, precision, recall and class_counts: {error}")
        return None


def read_samples(path: Path) -> Tensor:
    """The images of an .npz as (n, 28, 28) uint8. Raises UserError if it holds anything else."""
    try:
        archive = np.load(path, allow_pickle=False)
        images = archive["images"] if isinstance(archive, np.lib.npyio.NpzFile) else None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # numpy, zipfile and zlib each have errors of their own
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} has no readable 'images' ({reason}): write it with numpy.savez, no objects") from None
    if not isinstance(images, np.ndarray):
        raise UserError(f"{path} is no .npz with an array 'images': write it with numpy.savez")
    if images.dtype != np.uint8:
        raise UserError(f"{path} holds {images.dtype}, not uint8: scale the images to 0 .. 255 and round them")
    if images.ndim != 3 or images.shape[1:] != (mnist.SIDE, mnist.SIDE):
        raise UserError(f"{path} holds images of shape {images.shape}, not (N, {mnist.SIDE}, {mnist.SIDE})")
    if len(images) < FEWEST:
        raise UserError(f"{path} holds {len(images)} images: at least {FEWEST} are needed")
    if images.max() <= 1:
        raise UserError(f"{path} holds no value above 1: scale the images to 0 .. 255")
    return torch.from_numpy(images)


def head(classes: int) -> str:
    """The head of the table."""
    return "  Frechet  precision  recall  " + " ".join(f"{number:5d}" for number in range(classes))


def row(name: str, result: dict) -> str:
    """A line of the table, below its head."""
    counts = " ".join(f"{count:5d}" for count in result["class_counts"])
    return f"{result['fid']:9.2f}  {result['precision']:9.3f}  {result['recall']:6.3f}  {counts}  {name}"


def floor(model: Judge, data: mnist.Data, reference: Tensor) -> dict:
    """The verdict on 10,000 real training images: what perfect samples would get."""
    return verdict(model, data.train_images[:JUDGED], reference)


def train_and_save(data: mnist.Data, device: torch.device, out: Path, dataset: str | Path = "mnist") -> None:
    """Train the judge, and write its weights and its JSON in figures/."""
    name = name_of(dataset)
    path = experiment.folder(out / "weights") / f"{name}.pt"
    figures = experiment.folder(out / "figures")
    if data.classes < 2:
        raise UserError(f"{dataset} has no labels of two classes or more, one for each image: a judge needs them")
    if path.exists() and (figures / f"{name}.json").exists():
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
        "floor": floor(model, data, data.test_images),
        "floor_validation": floor(model, data, data.validation_images),
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
    if args.train == bool(args.files):
        raise UserError("name one or more .npz files of samples, or --train")
    out = args.out or home(args.dataset)
    if args.train:
        train_and_save(mnist.load(args.dataset, args.data_dir, device), device, out, args.dataset)
        return
    model = load(device, out, args.dataset)
    samples = [(path, read_samples(path)) for path in args.files]
    data = mnist.load(args.dataset, args.data_dir, device)
    reference = data.test_images if args.reference == "test" else data.validation_images
    cli.tell(f"against {len(reference):,} {args.reference} images; k = {NEIGHBOURS}")
    cli.tell(head(model.head.out_features))
    cli.tell(row(f"({JUDGED:,} training images: the floor)", floor(model, data, reference)))
    for path, images in samples:
        cli.tell(row(f"{path} ({len(images):,})", verdict(model, images, reference)))


if __name__ == "__main__":
    sys.exit(main())
