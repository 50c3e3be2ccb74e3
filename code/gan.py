"""Generative adversarial network of MNIST (Goodfellow et al. 2014), with the non-saturating loss.

A generator G turns noise into images, and a discriminator D, two fully connected networks both, tells with its logit
a(x) whether x is real. Each is trained against the other as it is, on noise of its own,

    L_D = E_data[softplus(-a(x))] + E_z[softplus(a(G(z)))],    L_G = E_z[softplus(-a(G(z)))],        eq:gan

of the report. G circles the equilibrium and does not come to rest, so samples come from an average of its weights.

    python code/gan.py    # Frechet distance 7.5, precision 0.834, recall 0.823; 1928 s
    (seeds 0 to 2, means; times of seed 0; AMD EPYC, 2 threads, torch 2.14.1+cu130)
"""

import copy
import functools
import math
import sys

import cli  # before torch is loaded

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

import judge
import mnist
import pictures
import training
from experiment import Run, save_samples, seconds_per_1000
from training import fixed_normal

EVALUATION_BATCH = 1000
SIDE = 5  # images along each side of a panel
INTERPOLATIONS, POINTS = 8, 9  # rows, and images in a row, both ends included
NEAREST = 20  # samples that are shown beside their nearest training images
PROBE, PROBE_EVERY, PROBE_EARLY = 5000, 8, (1, 2, 4)  # samples that the judge sees in training, and after which epochs
FRESH_BETAS = (0.9, 0.999)  # of a discriminator that is trained against the finished generator
NOISES = 5  # draws of noise that the distance's spread is taken over


# Model


def generator_block(inputs: int, leak: float) -> nn.Sequential:
    """A hidden layer of the generator: (batch, inputs) to (batch, 2 inputs). Batch norm would take off any bias."""
    return nn.Sequential(nn.Linear(inputs, 2 * inputs, bias=False), nn.BatchNorm1d(2 * inputs), nn.LeakyReLU(leak))


def discriminator_block(inputs: int, outputs: int, leak: float, dropout: float) -> nn.Sequential:
    """A hidden layer of the discriminator: (batch, inputs) to (batch, outputs)."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LeakyReLU(leak), nn.Dropout(dropout))


class GAN(nn.Module):
    """Generator and discriminator, and the moving average of the generator's weights, which is not trained itself.

    z_dim: numbers of noise; leak: slope of every leaky ReLU below 0; dropout: share of D's units that it drops.
    """

    def __init__(self, z_dim: int, leak: float, dropout: float):
        super().__init__()
        self.z_dim = z_dim
        hidden = (generator_block(units, leak) for units in (128, 256, 512))
        self.generator = nn.Sequential(
            nn.Linear(z_dim, 128), nn.LeakyReLU(leak), *hidden, nn.Linear(1024, mnist.PIXELS), nn.Tanh()
        )
        hidden = (discriminator_block(*units, leak, dropout) for units in ((mnist.PIXELS, 512), (512, 256)))
        self.discriminator = nn.Sequential(*hidden, nn.Linear(256, 1))
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def generate(self, z: Tensor) -> Tensor:
        """Noise (batch, z_dim) to images (batch, 784) in (-1, 1). In training mode each depends on its batch mates."""
        return self.generator(z)

    def discriminate(self, x: Tensor) -> Tensor:
        """Images (batch, 784) in [-1, 1] to the logits of their being real, (batch,)."""
        return self.discriminator(x).squeeze(-1)


def build(config: dict) -> GAN:
    """The model of a run's config, untrained."""
    return GAN(config["z_dim"], config["leak"], config["dropout"])


# Objective


def scaled(images: Tensor) -> Tensor:
    """Grey values, uint8 of any shape, as numbers in [-1, 1], tanh's range."""
    return images.float().div_(127.5).sub_(1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """L_D of eq:gan, (), in nats, from the logits (batch,) of real images and of generated ones; log 4 if all are 0."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """L_G of eq:gan, (), in nats, from the logits (batch,) of generated images; log 2 if all are 0.

    It is the non-saturating loss: its gradient with respect to a logit a is -(1 - sigmoid(a)), near -1 where D is sure
    that the image is not real, where that of the saturating loss, -sigmoid(a), vanishes.
    """
    return F.softplus(-fake).mean()


def discriminator_objective(model: GAN, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """L_D on images x (batch, 784) and noise z (batch, z_dim); with it D's mean output on real and on fake, (2,).

    The generated images are constants here. D sees them in one batch with the real ones, which is the same to it.
    """
    with torch.no_grad():
        fake = model.generate(z)
    logits = model.discriminate(torch.cat((x, fake))).view(2, -1)
    return discriminator_loss(*logits), torch.sigmoid(logits.detach()).mean(1)


def generator_objective(model: GAN, z: Tensor) -> Tensor:
    """L_G on noise z (batch, z_dim)."""
    return generator_loss(model.discriminate(model.generate(z)))


# Training


def draw_batch(images: Tensor, index: Tensor, z_dim: int) -> tuple[Tensor, Tensor]:
    """Real images (batch, 784) in [-1, 1], and noise for D's step and for G's, (2, batch, z_dim)."""
    x = scaled(images.index_select(0, index))
    return x, torch.randn(2, len(x), z_dim, device=images.device)


def make_optimizers(model: GAN, lr: float, betas: tuple[float, float]) -> tuple[Optimizer, Optimizer]:
    """Adam for the discriminator, and for the generator."""
    return tuple(training.adam(each.parameters(), lr, betas=betas) for each in (model.discriminator, model.generator))


def discriminator_step(model: GAN, optimizer: Optimizer, x: Tensor, z: Tensor) -> Tensor:
    """One step of Adam down L_D on images x (batch, 784) and noise z. Returns loss_d, D's mean outputs: (3,), detached.

    `backward` is told whose gradients to compute, here and in `training_step`, so that no step leaves any in the other
    network.
    """
    loss, outputs = discriminator_objective(model, x, z)
    optimizer.zero_grad()
    loss.backward(inputs=list(model.discriminator.parameters()))
    optimizer.step()
    return torch.stack((loss.detach(), *outputs))


def training_step(
    model: GAN,
    optimizers: tuple[Optimizer, Optimizer],
    images: Tensor,
    index: Tensor,
    weight: float | Tensor,
) -> Tensor:
    """One step of Adam down L_D, one down L_G, one of the average, on images[index] of images (n, 784) uint8.

    index: (batch,); weight: of the new weights in the average. Returns loss_d, loss_g, and D's mean outputs on real and
    on fake images, (4,), detached. Nothing here waits for the device.
    """
    optimizer_d, optimizer_g = optimizers
    x, (z_d, z_g) = draw_batch(images, index, model.z_dim)
    loss_d, *outputs = discriminator_step(model, optimizer_d, x, z_d)
    loss_g = generator_objective(model, z_g)
    optimizer_g.zero_grad()
    loss_g.backward(inputs=list(model.generator.parameters()))
    optimizer_g.step()
    training.update_ema(model.average, model.generator, weight)
    return torch.stack((loss_d, loss_g.detach(), *outputs))


@torch.no_grad()
def untrained_step(model: GAN, images: Tensor, index: Tensor) -> Tensor:
    """What `training_step` returns, without its updates."""
    x, (z_d, z_g) = draw_batch(images, index, model.z_dim)
    loss_d, outputs = discriminator_objective(model, x, z_d)
    return torch.stack((loss_d, generator_objective(model, z_g), *outputs))


def train(run: Run, model: GAN, data: mnist.Data) -> None:
    """Play the game for the run's epochs on all images but the test set, recording the means over each epoch's steps.

    The second half of the epochs takes larger batches: fewer steps, along gradients that are less noisy, and so the
    average, whose decay is by the step, is one over more epochs. After some epochs the judge, if there is one, compares
    samples of the average with the validation images.
    """
    args, half = run.args, run.args.epochs // 2
    images = data.images.flatten(1)
    sizes = (args.batch_size, args.growth * args.batch_size)
    if sizes[1] > len(images):
        factors = f"--batch-size {args.batch_size} times --growth {args.growth}"
        raise cli.UserError(f"{factors} is more than the {len(images)} training images")
    early, late = (mnist.steps_per_epoch(len(images), size) for size in sizes)
    judged_by = None if run.follows else judge.find(run, quiet=True)
    real = judge.described(judged_by, data.validation_images) if judged_by else None
    optimizers = make_optimizers(model, args.lr, args.betas)
    run.start(model=model, optimizer_d=optimizers[0], optimizer_g=optimizers[1])
    take_early, take_late = (  # a captured step is of one size of batch
        training.CapturedStep(lambda *batch: training_step(model, optimizers, images, *batch), run.device)
        for _ in sizes
    )
    settling = fixed_normal("settling", args.settling, model.z_dim).to(run.device)
    settling = settling.chunk(-(-args.settling // EVALUATION_BATCH))  # of equal size, as they count alike
    for epoch in range(run.first_epoch, args.epochs + 1):
        size, steps, take_step = (sizes[0], early, take_early) if epoch <= half else (sizes[1], late, take_late)
        first = early * min(epoch - 1, half) + late * max(0, epoch - 1 - half)  # the number of the epoch's first step
        figures = torch.zeros(steps, 4, device=run.device)
        model.train()
        untrained = copy.deepcopy(model) if epoch == 0 else None  # whose batch norm may count the pass
        batches = mnist.batches(len(images), size, run.device)
        for step, index in run.steps(epoch, batches, steps, first):
            if epoch > 0:
                figures[step - first] = take_step(index, training.ema_weight(step, args.decay))
            else:
                figures[step - first] = untrained_step(untrained, images, index)
        model.eval()
        update_bn(settling, model.average)  # averaged weights have no statistics of their own
        named = dict(zip(("loss_d", "loss_g", "d_real", "d_fake"), figures.T))
        training.check_finite(epoch, **named)
        if run.follows:
            continue
        run.frames[epoch] = panel(model).cpu()
        row = {name: float(values.cpu().double().mean()) for name, values in named.items()}
        if judged_by and (epoch in PROBE_EARLY or epoch % PROBE_EVERY == 0 or epoch == args.epochs):
            verdict = judge.compared(judge.described(judged_by, sample(model.average, PROBE)), real)
            row |= {f"val_{key}": verdict[key] for key in judge.MEASURES}
        run.record(epoch, **row)


# Evaluation


def evaluate(run: Run, model: GAN, data: mnist.Data, fresh: dict) -> dict:
    """The `result` of a trained model: the judge's verdict on samples against the test set, and what it leaves out.

    `validation` is the verdict on the same samples against the validation set, by which settings are chosen,
    `over_noise` those on other draws of noise, `unaveraged` that on what the generator draws with the weights of the
    last step. `fresh`, from `fresh_discriminator`, has a bound on how far the generator is from the data. `nearest` has
    the distances of samples to their nearest training images, and, to compare, of test images to theirs, both over
    every second image.
    """
    images = sample(model.average, judge.JUDGED)
    result = {
        "seconds_per_1000_samples": seconds_per_1000(lambda n: sample(model.average, n), run.device),
        "fresh_discriminator": fresh,
        "nearest": {name: centre(nearest(each[::2], data.images)[1]) for name, each in
                    (("samples", images), ("test_images", data.test_images))},
    }  # fmt: skip
    if judged_by := judge.find(run, data):
        test, validation = (judge.described(judged_by, each) for each in (data.test_images, data.validation_images))
        seen = judge.described(judged_by, images)
        result |= judge.compared(seen, test)
        result["validation"] = judge.compared(seen, validation)
        result["unaveraged"] = judge.compared(judge.described(judged_by, sample(model.generator, judge.JUDGED)), test)
        others = (sample(model.average, judge.JUDGED, f"samples {noise}") for noise in range(1, NOISES))
        verdicts = [result, *(judge.compared(judge.described(judged_by, each), test) for each in others)]
        result["over_noise"] = [{key: each[key] for key in judge.MEASURES} for each in verdicts]
    return result


def fresh_discriminator(run: Run, model: GAN, data: mnist.Data) -> dict:
    """How well a new discriminator, trained against the finished average, tells its images from real ones.

    `loss` is its L_D, in nats: untrained, and after each of --fresh-epochs. It is trained as the game trains, but with
    the common betas, as its opponent does not move, and it is measured in evaluation mode on images that neither
    network has seen: the test set, and as many from noise of their own. `own` is L_D of the game's own discriminator on
    the very same. As V(D, G) <= 2 JSD - log 4 for every D, eq:every, the Jensen-Shannon divergence of the generator's
    images and the data's is `jsd_at_least` = (log 4 - L_D)/2, up to that estimate's standard error, `jsd_se`.
    """
    torch.manual_seed(0)
    images, game = data.images.flatten(1), build(run.config).to(run.device)
    game.generator.load_state_dict(model.average.state_dict())
    optimizer = training.adam(game.discriminator.parameters(), run.args.lr, betas=FRESH_BETAS)
    real = scaled(data.test_images.flatten(1))
    z = fixed_normal("fresh", len(real), model.z_dim).to(run.device)

    @torch.inference_mode()
    def logits(player: GAN) -> tuple[Tensor, Tensor]:
        fake = (game.generate(part) for part in z.split(EVALUATION_BATCH))
        return tuple(torch.cat([player.discriminate(x) for x in xs]) for xs in (real.split(EVALUATION_BATCH), fake))

    def step(index: Tensor) -> Tensor:
        x, (z_d, _) = draw_batch(images, index, model.z_dim)
        return discriminator_step(game, optimizer, x, z_d)

    take_step, losses = training.CapturedStep(step, run.device), []
    for epoch in range(run.args.fresh_epochs + 1):
        if epoch > 0:
            game.train()
            game.generator.eval()
            drawn = mnist.batches(len(images), run.args.batch_size, run.device)
            steps = mnist.steps_per_epoch(len(images), run.args.batch_size)
            for index in cli.progress(drawn, f"fresh discriminator {epoch}/{run.args.fresh_epochs}", steps):
                take_step(index)
        game.eval()
        last = logits(game)
        losses.append(float(discriminator_loss(*last)))
    terms = F.softplus(-last[0]), F.softplus(last[1])
    return {
        "loss": losses,
        "own": float(discriminator_loss(*logits(model))),
        "jsd_at_least": max(0.0, (math.log(4) - losses[-1]) / 2),
        "jsd_se": float(sum(each.var() / len(each) for each in terms).sqrt()) / 2,
    }


def centre(distances: Tensor) -> dict:
    """Mean and median of distances (n,)."""
    return {"mean": float(distances.mean()), "median": float(distances.median())}


@torch.inference_mode()
def sample(generator: nn.Module, n: int, noise: str = "samples") -> Tensor:
    """Images of n noise vectors: (n, 28, 28) uint8, of the same noise in every call, as `noise` names it."""
    first = generator[0].weight  # (128, z_dim)
    z = fixed_normal(noise, n, first.shape[1]).to(first.device)
    return torch.cat([generated(generator, part) for part in z.split(EVALUATION_BATCH)])


@torch.inference_mode()
def generated(generator: nn.Module, z: Tensor) -> Tensor:
    """Noise (n, z_dim) to images (n, 28, 28) uint8. Raises ValueError in training mode."""
    if generator.training:
        raise ValueError("in training mode an image depends on its batch mates: call eval() first")
    return pictures.to_uint8((generator(z) + 1) / 2).view(-1, mnist.SIDE, mnist.SIDE)


@torch.inference_mode()
def nearest(images: Tensor, among: Tensor, block: int = 100) -> tuple[Tensor, Tensor]:
    """Of each image (n, 28, 28) uint8 the image of `among` (m, 28, 28) at the least Euclidean distance, and that.

    Returns (n, 28, 28) uint8, and the distances (n,) in grey values.
    """
    rows, others = images.flatten(1).float(), among.flatten(1).float()
    squares = others.square().sum(1)
    found = among[torch.cat([(squares - 2 * part @ others.T).argmin(1) for part in rows.split(block)])]
    return found, (rows - found.flatten(1)).norm(dim=1)


# Pictures


def panel(model: GAN) -> Tensor:
    """(SIDE^2, 28, 28) uint8 of one fixed noise, so that an eye can follow an image through training."""
    z = fixed_normal("panels", SIDE * SIDE, model.z_dim).to(next(model.parameters()).device)
    return generated(model.average, z)


def draw(run: Run, model: GAN, data: mnist.Data, fresh: dict) -> None:
    """Draw curves and panels from the history and the frames, everything else from the weights."""
    draw_losses(run, fresh["loss"])
    frames = {**run.frames, run.args.epochs: panel(model)}
    for epoch in frames.keys() & run.panels(0, 0.01, 0.04, 0.5, 1):
        pictures.save_grid(run.figure(f"samples_{run.stamp(epoch)}"), frames[epoch], columns=SIDE)
    tiles = [pictures.tile(images, SIDE) for images in run.frames.values()]
    pictures.save_gif(run.figure("samples"), tiles, milliseconds=80)
    path = training.slerp(*different_pairs(model, judge.find(run, quiet=True)), POINTS).flatten(0, 1)
    pictures.save_grid(run.figure("interpolation"), generated(model.average, path), columns=POINTS)
    images = sample(model.average, NEAREST)
    rows = zip(images.split(NEAREST // 2), nearest(images, data.images)[0].split(NEAREST // 2))
    pictures.save_grid(run.figure("nearest"), torch.cat([row for pair in rows for row in pair]), columns=NEAREST // 2)


def draw_losses(run: Run, fresh: list[float]) -> None:
    """The judge's figures, by how much both losses exceed log 4 and log 2, and D's mean outputs, against the epoch.

    Epochs from 1 on, on a logarithmic axis. fresh: the losses of a new discriminator, drawn at its own epochs.
    """
    history = [row for row in run.history if row["epoch"] > 0]
    judged = [row for row in history if "val_fid" in row]
    if not history:
        return
    fig, (*above, losses, outputs) = pictures.figure(8.4 if judged else 5.6, 2.6, columns=3 if judged else 2)
    first, second, third = pictures.FIRST_COLOUR, pictures.SECOND_COLOUR, pictures.MARK_COLOUR
    lines = [
        (losses, history, "loss_d", math.log(4), "discriminator", "-", first),
        (losses, history, "loss_g", math.log(2), "generator", "--", second),
        (outputs, history, "d_real", 0, "on real images", "-", first),
        (outputs, history, "d_fake", 0, "on generated images", "--", second),
    ]
    if fresh[1:]:
        rows = [{"epoch": epoch, "loss_d": loss} for epoch, loss in enumerate(fresh)][1:]
        lines.append((losses, rows, "loss_d", math.log(4), "new discriminator", ".:", third))
    for distance in above:
        shares = distance.twinx()
        lines += [
            (distance, judged, "val_fid", 0, None, ".-", first),
            (shares, judged, "val_precision", 0, "precision", ".--", second),
            (shares, judged, "val_recall", 0, "recall", ".:", third),
        ]
        distance.set(yscale="log", title=f"{PROBE:,} samples, validation images")
        distance.set_ylabel("Frechet distance", color=first)
        distance.yaxis.set_major_formatter("{x:g}")
        distance.yaxis.set_minor_formatter("")
        shares.set(ylabel="precision, recall", ylim=(0, 1))
    for ax, rows, key, less, label, style, colour in lines:
        ax.plot([row["epoch"] for row in rows], [row[key] - less for row in rows], style, color=colour, label=label)
    for ax, value in ((losses, 0), (outputs, 0.5)):
        ax.axhline(value, color=third, linestyle=":", linewidth=1)
    losses.set(ylabel="loss, nats", title="Losses, less log 4 and log 2")
    outputs.set(ylabel="mean output of D", title="D's mean outputs")
    for ax in (*above, losses, outputs):
        ax.set(xlabel="epoch", xscale="log")
        ax.title.set_fontsize(10)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    for ax in fig.axes:
        if ax not in above:
            ax.legend(frameon=False, fontsize=7, loc="best" if ax in (losses, outputs) else "center right")
    pictures.save_figure(run.figure("losses"), fig)


def different_pairs(model: GAN, judged_by: judge.Judge | None) -> tuple[Tensor, Tensor]:
    """Two sets of noise, (INTERPOLATIONS, z_dim) each, whose images the judge, if any, is sure are of two classes.

    Sure is a confidence above 0.99 at both ends. They are the first such pairs of a fixed list; others follow where a
    generator, as one that has collapsed, has too few of them.
    """
    z = fixed_normal("interpolation", 40 * INTERPOLATIONS, model.z_dim).to(next(model.parameters()).device)
    pairs = z.view(2, -1, model.z_dim)
    if judged_by is not None:
        logits = judge.features_and_logits(judged_by, generated(model.average, z))[1].view(2, pairs.shape[1], -1)
        sure, classes = logits.softmax(-1).max(-1)  # (2, pairs) each
        chosen = (classes[0] != classes[1]) & (sure > 0.99).all(0)
        pairs = pairs[:, torch.argsort((~chosen).int(), stable=True).to(z.device)]  # the chosen come first
    return pairs[0, :INTERPOLATIONS], pairs[1, :INTERPOLATIONS]


# Flags


def flags() -> cli.Parser:
    """The script's flags, with the report's settings as defaults."""
    parser = cli.Parser(__doc__)
    cli.add_flags(parser, epochs=200, batch_size=256, lr=5e-4, betas=(0.0, 0.999))
    count, share = cli.positive_int, cli.fraction
    parser.add_argument("--z-dim", type=count, default=100, metavar="N", help="numbers of noise")
    parser.add_argument("--leak", type=share, default=0.2, metavar="X", help="slope of every leaky ReLU below 0")
    parser.add_argument("--dropout", type=share, default=0.1, metavar="X", help="share of D's units that are dropped")
    parser.add_argument(
        "--growth", type=count, default=4, metavar="N", help="factor on --batch-size in the second half of the epochs"
    )
    parser.add_argument("--decay", type=share, default=0.999, metavar="X", help="of the moving average of G's weights")
    parser.add_argument(
        "--settling", type=count, default=5000, metavar="N", help="noise vectors for the average's batch norm"
    )
    parser.add_argument(
        "--fresh-epochs", type=cli.nonnegative_int, default=8, metavar="N", help="of a new D against the finished G"
    )
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Train, or with --evaluate or --sample use what was trained."""
    parser = flags()
    args = parser.parse_args(argv)
    if args.batch_size < 2 * cli.processes() or args.settling == 1:
        raise cli.UserError("--batch-size or --settling: batch norm needs at least 2 images to a (process's) batch")
    run = Run("gan", parser, args, evaluation=("fresh_epochs",))
    torch.manual_seed(args.seed)
    model = build(run.config).to(run.device).eval()
    if args.evaluate or args.sample:
        run.load(model)
    if args.sample:
        save_samples(run.figure("samples.npz"), sample(model.average, args.sample))
        return
    data = mnist.load(args.dataset, args.data_dir, run.device)
    if not args.evaluate:
        train(run, model, data)
    fresh = functools.cache(lambda: fresh_discriminator(run, model, data))
    run.finish(model, lambda: evaluate(run, model, data, fresh()), lambda: draw(run, model, data, fresh()))


if __name__ == "__main__":
    sys.exit(main())
