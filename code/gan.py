"""Generative adversarial network of MNIST (Goodfellow et al. 2014), with the non-saturating loss.

A generator G turns noise into images, and a discriminator D, two fully connected networks both, tells with its logit
a(x) whether x is real. Each is trained against the other as it is, on noise of its own,

    L_D = E_data[softplus(-a(x))] + E_z[softplus(a(G(z)))],    L_G = E_z[softplus(-a(G(z)))],        eq:gan

of the report. G circles the equilibrium and does not come to rest, so samples come from an average of its weights.

    python code/gan.py    # Frechet distance 12.2, precision 0.802, recall 0.800; 2303 s
    (seed 0; AMD EPYC, 2 threads, torch 2.15.0+cu132)
"""

import copy
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
from cli import UserError
from experiment import Run, save_samples, seconds_per_1000
from training import fixed_normal

EVALUATION_BATCH = 1000
SIDE = 5  # images along each side of a panel
INTERPOLATIONS, POINTS = 8, 9  # rows, and images in a row, both ends included
NEAREST = 20  # samples that are shown beside their nearest training images


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


def draw_batch(images: Tensor, index: Tensor, z_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real images (batch, 784) in [-1, 1], and noise (batch, z_dim) for D's loss and for G's."""
    z = torch.randn(2, len(index), z_dim, device=images.device)
    return scaled(images.index_select(0, index)), z[0], z[1]


def make_optimizers(model: GAN, lr: float, betas: tuple[float, float]) -> tuple[Optimizer, Optimizer]:
    """Adam for the discriminator, and for the generator."""
    return tuple(training.adam(each.parameters(), lr, betas=betas) for each in (model.discriminator, model.generator))


def training_step(
    model: GAN, optimizers: tuple[Optimizer, Optimizer], images: Tensor, index: Tensor, weight: float | Tensor
) -> Tensor:
    """One step of Adam down L_D on images[index], (batch,) of images (n, 784) uint8, one down L_G, one of the average.

    weight: of the new weights in the average. Returns loss_d, loss_g, and D's mean outputs on real and on fake images,
    (4,), detached. `backward` is told whose gradients to compute, so that neither step leaves any in the other network.
    Nothing here waits for the device.
    """
    optimizer_d, optimizer_g = optimizers
    x, z_d, z_g = draw_batch(images, index, model.z_dim)
    loss_d, outputs = discriminator_objective(model, x, z_d)
    optimizer_d.zero_grad()
    loss_d.backward(inputs=list(model.discriminator.parameters()))
    optimizer_d.step()
    loss_g = generator_objective(model, z_g)
    optimizer_g.zero_grad()
    loss_g.backward(inputs=list(model.generator.parameters()))
    optimizer_g.step()
    training.update_ema(model.average, model.generator, weight)
    return torch.stack((loss_d.detach(), loss_g.detach(), *outputs))


@torch.no_grad()
def untrained_step(model: GAN, images: Tensor, index: Tensor) -> Tensor:
    """What `training_step` returns, without its updates."""
    x, z_d, z_g = draw_batch(images, index, model.z_dim)
    loss_d, outputs = discriminator_objective(model, x, z_d)
    return torch.stack((loss_d, generator_objective(model, z_g), *outputs))


def train(run: Run, model: GAN, data: mnist.Data) -> None:
    """Play the game for the run's epochs on all 60,000 images, recording the means over each epoch's own steps."""
    args = run.args
    images = data.images.flatten(1)
    steps = mnist.steps_per_epoch(len(images), args.batch_size)
    optimizers = make_optimizers(model, args.lr, args.betas)
    run.start(model=model, optimizer_d=optimizers[0], optimizer_g=optimizers[1])
    take_step = training.CapturedStep(lambda *batch: training_step(model, optimizers, images, *batch), run.device)
    figures = torch.zeros(steps, 4, device=run.device)
    settling = fixed_normal("settling", args.settling, model.z_dim).to(run.device)
    settling = settling.chunk(-(-args.settling // EVALUATION_BATCH))  # of equal size, as they count alike
    for epoch in range(run.first_epoch, args.epochs + 1):
        model.train()
        untrained = copy.deepcopy(model) if epoch == 0 else None  # whose batch norm may count the pass
        for step, index in run.steps(epoch, mnist.batches(len(images), args.batch_size, run.device), steps):
            if epoch > 0:
                figures[step % steps] = take_step(index, training.ema_weight(step, args.decay))
            else:
                figures[step % steps] = untrained_step(untrained, images, index)
        model.eval()
        update_bn(settling, model.average)  # averaged weights have no statistics of their own
        named = dict(zip(("loss_d", "loss_g", "d_real", "d_fake"), figures.T))
        training.check_finite(epoch, **named)
        if run.follows:
            continue
        run.frames[epoch] = panel(model).cpu()
        run.record(epoch, **{name: float(values.cpu().double().mean()) for name, values in named.items()})


# Evaluation


def evaluate(run: Run, model: GAN, data: mnist.Data) -> dict:
    """The `result` of a trained model: the judge's verdict on samples against the test set.

    `unaveraged` is the verdict on what the generator draws with the weights of the last step, `validation` that on the
    averaged one's samples against the validation set, by which settings are chosen.
    """
    result = {"seconds_per_1000_samples": seconds_per_1000(lambda n: sample(model.average, n), run.device)}
    if judged_by := judge.find(run):
        images = sample(model.average, judge.JUDGED)
        result |= judge.verdict(judged_by, images, data.test_images)
        result["validation"] = judge.verdict(judged_by, images, data.validation_images)
        result["unaveraged"] = judge.verdict(judged_by, sample(model.generator, judge.JUDGED), data.test_images)
    return result


@torch.inference_mode()
def sample(generator: nn.Module, n: int) -> Tensor:
    """Images of n noise vectors: (n, 28, 28) uint8, of the same noise in every call."""
    first = generator[0].weight  # (128, z_dim)
    z = fixed_normal("samples", n, first.shape[1]).to(first.device)
    return torch.cat([generated(generator, part) for part in z.split(EVALUATION_BATCH)])


@torch.inference_mode()
def generated(generator: nn.Module, z: Tensor) -> Tensor:
    """Noise (n, z_dim) to images (n, 28, 28) uint8. Raises ValueError in training mode."""
    if generator.training:
        raise ValueError("in training mode an image depends on its batch mates: call eval() first")
    return pictures.to_uint8((generator(z) + 1) / 2).view(-1, mnist.SIDE, mnist.SIDE)


@torch.inference_mode()
def nearest(images: Tensor, among: Tensor, block: int = 100) -> Tensor:
    """Of each image (n, 28, 28) uint8 the image of `among` (m, 28, 28) at the least Euclidean distance: (n, 28, 28)."""
    rows, others = images.flatten(1).float(), among.flatten(1).float()
    squares = others.square().sum(1)
    index = [(squares - 2 * part @ others.T).argmin(1) for part in rows.split(block)]
    return among[torch.cat(index)]


# Pictures


def panel(model: GAN) -> Tensor:
    """(SIDE^2, 28, 28) uint8 of one fixed noise, so that an eye can follow an image through training."""
    z = fixed_normal("panels", SIDE * SIDE, model.z_dim).to(next(model.parameters()).device)
    return generated(model.average, z)


def draw(run: Run, model: GAN, data: mnist.Data) -> None:
    """Draw curves and panels from the history and the frames, everything else from the weights."""
    draw_losses(run)
    frames = {**run.frames, run.args.epochs: panel(model)}
    for epoch in frames.keys() & run.panels(0, 0.01, 0.04, 0.5, 1):
        pictures.save_grid(run.figure(f"samples_{run.stamp(epoch)}"), frames[epoch], columns=SIDE)
    tiles = [pictures.tile(images, SIDE) for images in run.frames.values()]
    pictures.save_gif(run.figure("samples"), tiles, milliseconds=80)
    path = training.slerp(*different_pairs(model, judge.find(run, quiet=True)), POINTS).flatten(0, 1)
    pictures.save_grid(run.figure("interpolation"), generated(model.average, path), columns=POINTS)
    images = sample(model.average, NEAREST)
    rows = zip(images.split(NEAREST // 2), nearest(images, data.images).split(NEAREST // 2))
    pictures.save_grid(run.figure("nearest"), torch.cat([row for pair in rows for row in pair]), columns=NEAREST // 2)


def draw_losses(run: Run) -> None:
    """Both losses and D's mean outputs per epoch, each with its value where D cannot tell real from fake."""
    if not run.history:
        return
    epochs = [row["epoch"] for row in run.history]
    fig, (losses, outputs) = pictures.figure(5.2, 4.6, rows=2)
    lines = (
        (losses, "loss_d", "discriminator", pictures.FIRST_COLOUR, "-"),
        (losses, "loss_g", "generator", pictures.SECOND_COLOUR, "--"),
        (outputs, "d_real", "on real images", pictures.FIRST_COLOUR, "-"),
        (outputs, "d_fake", "on generated images", pictures.SECOND_COLOUR, "--"),
    )
    for ax, key, label, colour, style in lines:
        ax.plot(epochs, [row[key] for row in run.history], style, color=colour, label=label)
    for ax, value, name in ((losses, math.log(4), "log 4"), (losses, math.log(2), "log 2"), (outputs, 0.5, "1/2")):
        ax.axhline(value, color=pictures.MARK_COLOUR, linestyle=":", linewidth=1)
        ax.annotate(
            name, (1.01, value), xycoords=("axes fraction", "data"), va="center", color=pictures.MARK_COLOUR, fontsize=8
        )
    losses.set(ylabel="loss, nats", title="The game, mean over each epoch's steps")
    outputs.set(xlabel="epoch", ylabel="mean output of D")
    outputs.xaxis.get_major_locator().set_params(integer=True)
    for ax in (losses, outputs):
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    pictures.save_figure(run.figure("losses"), fig)


def different_pairs(model: GAN, judged_by: judge.Judge | None) -> tuple[Tensor, Tensor]:
    """Two lots of noise, (INTERPOLATIONS, z_dim) each, whose images the judge, if any, is sure are of two classes.

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
    parser.add_argument("--dropout", type=share, default=0.3, metavar="X", help="share of D's units that are dropped")
    parser.add_argument("--decay", type=share, default=0.999, metavar="X", help="of the moving average of G's weights")
    parser.add_argument(
        "--settling", type=count, default=5000, metavar="N", help="noise vectors for the average's batch norm"
    )
    return parser


@cli.exit_status
def main(argv: list[str] | None = None) -> None:
    """Train, or with --evaluate or --sample use what was trained."""
    parser = flags()
    args = parser.parse_args(argv)
    if args.batch_size < 2 * cli.processes() or args.settling == 1:
        raise UserError("--batch-size or --settling: batch norm needs at least 2 images to a (process's) batch")
    run = Run("gan", parser, args)
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
    run.finish(model, lambda: evaluate(run, model, data), lambda: draw(run, model, data))


if __name__ == "__main__":
    sys.exit(main())
