"""Generative adversarial network of MNIST (Goodfellow et al. 2014), with the non-saturating loss.

A generator G turns noise into images, and a discriminator D, two fully connected networks both, tells with its logit
a(x) whether x is real. Each is trained against the other as it is, on noise of its own,

    L_D = E_data[softplus(-a(x))] + E_z[softplus(a(G(z)))],    L_G = E_z[softplus(-a(G(z)))],        eq:gan

of the report. G circles the equilibrium and does not come to rest in it; samples are drawn by the running average of
its weights.

    python code/gan.py    # Frechet distance 12.2, precision 0.802, recall 0.800; 2303 s
"""

import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import experiment
import judge
import mnist
import pictures
from experiment import Run, UserError, fixed_normal

Z_DIM = 100
LEAK = 0.2  # of every leaky ReLU
DROPOUT = 0.3
BETAS = (0.0, 0.999)  # Adam's, for both networks
DECAY = 0.999  # of the generator's running average, a step
SETTLING = 5000  # noise vectors that batch norm's statistics of the averaged generator are taken over
EVALUATION_BATCH = 1000
SIDE = 5  # images along each side of a panel
INTERPOLATIONS, POINTS = 8, 9  # rows, and images of a row, both ends included
NEAREST = 20  # samples that are shown beside their nearest training images


# Model


def doubling(inputs: int) -> nn.Sequential:
    """A hidden layer of the generator: (batch, inputs) to (batch, 2 inputs). Batch norm would take off any bias."""
    return nn.Sequential(nn.Linear(inputs, 2 * inputs, bias=False), nn.BatchNorm1d(2 * inputs), nn.LeakyReLU(LEAK))


def narrowing(inputs: int, outputs: int) -> nn.Sequential:
    """A hidden layer of the discriminator: (batch, inputs) to (batch, outputs)."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LeakyReLU(LEAK), nn.Dropout(DROPOUT))


class GAN(nn.Module):
    """Generator and discriminator, and the average of the generators on the way, which is not trained itself."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(Z_DIM, 128), nn.LeakyReLU(LEAK), doubling(128), doubling(256), doubling(512),
            nn.Linear(1024, mnist.PIXELS), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(narrowing(mnist.PIXELS, 512), narrowing(512, 256), nn.Linear(256, 1))
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def generate(self, z: Tensor) -> Tensor:
        """Noise (batch, Z_DIM) to images (batch, 784) in (-1, 1). In training mode each depends on its batch mates."""
        return self.generator(z)

    def discriminate(self, x: Tensor) -> Tensor:
        """Images (batch, 784) in [-1, 1] to the logits of their being real, (batch,)."""
        return self.discriminator(x).squeeze(-1)


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
    """L_D on images x (batch, 784) and noise z (batch, Z_DIM); with it D's mean output on real and on fake, (2,).

    The generated images are constants here. D sees them in one batch with the real ones, which is the same to it.
    """
    with torch.no_grad():
        fake = model.generate(z)
    logits = model.discriminate(torch.cat((x, fake))).view(2, -1)
    return discriminator_loss(*logits), torch.sigmoid(logits.detach()).mean(1)


def generator_objective(model: GAN, z: Tensor) -> Tensor:
    """L_G on noise z (batch, Z_DIM)."""
    return generator_loss(model.discriminate(model.generate(z)))


# Training


def draw_batch(images: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real images (batch, 784) in [-1, 1], and noise (batch, Z_DIM) for D's loss and for G's."""
    z = torch.randn(2, len(index), Z_DIM, device=images.device)
    return scaled(images.index_select(0, index)), z[0], z[1]


def make_optimizers(model: GAN, lr: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Adam for the discriminator, and for the generator."""
    return tuple(experiment.adam(each.parameters(), lr, betas=BETAS) for each in (model.discriminator, model.generator))


def training_step(
    model: GAN,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    images: Tensor,
    index: Tensor,
    share: float | Tensor,
) -> Tensor:
    """One step of Adam down L_D on images[index], (batch,) of images (n, 784) uint8, one down L_G, one of the average.

    Returns loss_d, loss_g, and D's mean outputs on real and on fake images, (4,), detached. `backward` is told whose
    gradients to compute, so that neither step leaves any in the other network. Nothing here waits for the device.
    """
    optimizer_d, optimizer_g = optimizers
    x, z_d, z_g = draw_batch(images, index)
    loss_d, outputs = discriminator_objective(model, x, z_d)
    optimizer_d.zero_grad()
    loss_d.backward(inputs=list(model.discriminator.parameters()))
    optimizer_d.step()
    loss_g = generator_objective(model, z_g)
    optimizer_g.zero_grad()
    loss_g.backward(inputs=list(model.generator.parameters()))
    optimizer_g.step()
    experiment.move_average(model.average, model.generator, share)
    return torch.stack((loss_d.detach(), loss_g.detach(), *outputs))


@torch.no_grad()
def untrained_step(model: GAN, images: Tensor, index: Tensor) -> Tensor:
    """What `training_step` returns, without its updates."""
    x, z_d, z_g = draw_batch(images, index)
    loss_d, outputs = discriminator_objective(model, x, z_d)
    return torch.stack((loss_d, generator_objective(model, z_g), *outputs))


def train(run: Run, model: GAN, data: mnist.Data) -> None:
    """Play the game for the run's epochs on all 60,000 images, recording the means over each epoch's own steps."""
    args = run.args
    optimizers = make_optimizers(model, args.lr)
    run.start(model=model, optimizer_d=optimizers[0], optimizer_g=optimizers[1])
    images = data.images.flatten(1)
    take_step = experiment.Captured(lambda *batch: training_step(model, optimizers, images, *batch), run.device)
    steps = len(images) // args.batch_size  # an epoch's
    figures = torch.zeros(steps, 4, device=run.device)
    untrained = [buffer.clone() for buffer in model.buffers()]
    for epoch in run.epochs():
        model.train()
        for step, index in run.steps(mnist.batches(len(images), args.batch_size, run.device), steps):
            if epoch > 0:
                figures[step % steps] = take_step(index, experiment.averaging(step, DECAY))
            else:
                figures[step % steps] = untrained_step(model, images, index)
        if epoch == 0:
            for buffer, before in zip(model.buffers(), untrained):  # what batch norm has counted on this pass
                buffer.copy_(before)
        model.eval()
        update_bn(fixed_normal("settling", SETTLING, Z_DIM).to(run.device).split(EVALUATION_BATCH), model.average)
        named = dict(zip(("loss_d", "loss_g", "d_real", "d_fake"), figures.T))
        run.check_finite(**named)
        run.frames.setdefault("samples", {})[epoch] = generated(model.average, panel_noise(run)).cpu()
        run.record(**{name: float(values.cpu().double().mean()) for name, values in named.items()})


# Evaluation


def evaluate(run: Run, model: GAN, data: mnist.Data, judged_by: judge.Judge | None) -> dict:
    """The `result` of a trained model; with a judge, also its verdict on samples against the test set.

    `unaveraged` is the verdict on the samples that the generator draws with the weights of the last step.
    """
    seconds = experiment.seconds_per_1000(lambda n: sample(model.average, n), run.device)
    result = {"seconds_per_1000_samples": seconds}
    if judged_by is not None:
        result |= judge.verdict(judged_by, sample(model.average, judge.JUDGED), data.test_images)
        result["unaveraged"] = judge.verdict(judged_by, sample(model.generator, judge.JUDGED), data.test_images)
    return result


@torch.inference_mode()
def sample(generator: nn.Module, n: int) -> Tensor:
    """Images of n noise vectors: (n, 28, 28) uint8, of the same noise in every call."""
    z = fixed_normal("samples", n, Z_DIM).to(next(generator.parameters()).device)
    return torch.cat([generated(generator, part) for part in z.split(EVALUATION_BATCH)])


@torch.inference_mode()
def generated(generator: nn.Module, z: Tensor) -> Tensor:
    """Noise (n, Z_DIM) to images (n, 28, 28) uint8. Raises ValueError in training mode."""
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


def panel_noise(run: Run) -> Tensor:
    """(SIDE^2, Z_DIM): the same through all training, so that an eye can follow an image."""
    return fixed_normal("panels", SIDE * SIDE, Z_DIM).to(run.device)


def draw_training(run: Run) -> None:
    """The pictures of the course of the training, from the history and the frames alone."""
    draw_losses(run)
    frames = run.frames.get("samples", {})
    if frames:
        for epoch in run.panels(0, 0.01, 0.04, 0.5, 1):
            pictures.save_grid(run.figure(f"samples_{run.stamp(epoch)}"), frames[epoch], columns=SIDE)
        tiles = [pictures.tile(images, SIDE) for images in frames.values()]
        pictures.save_gif(run.figure("samples"), tiles, milliseconds=80)


def draw_losses(run: Run) -> None:
    """Both losses and D's mean outputs per epoch, each with its value where D cannot tell real from fake."""
    epochs = [row["epoch"] for row in run.history]
    whole, (losses, outputs) = pictures.figure(5.2, 4.6, rows=2)
    lines = (
        (losses, "loss_d", "discriminator", pictures.FIRST_COLOUR, "-"),
        (losses, "loss_g", "generator", pictures.SECOND_COLOUR, "--"),
        (outputs, "d_real", "on real images", pictures.FIRST_COLOUR, "-"),
        (outputs, "d_fake", "on generated images", pictures.SECOND_COLOUR, "--"),
    )
    for axes, key, label, colour, style in lines:
        axes.plot(epochs, [row[key] for row in run.history], style, color=colour, label=label)
    for axes, value, name in ((losses, math.log(4), "log 4"), (losses, math.log(2), "log 2"), (outputs, 0.5, "1/2")):
        axes.axhline(value, color=pictures.MARK_COLOUR, linestyle=":", linewidth=1)
        axes.annotate(
            name, (1.01, value), xycoords=("axes fraction", "data"), va="center", color=pictures.MARK_COLOUR, fontsize=8
        )
    losses.set(ylabel="loss, nats", title="The game, mean over each epoch's steps")
    outputs.set(xlabel="epoch", ylabel="mean output of D")
    outputs.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, outputs):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    pictures.save_figure(run.figure("losses"), whole)


def draw_final(run: Run, model: GAN, data: mnist.Data, judged_by: judge.Judge | None) -> None:
    """The pictures of the trained model, from its weights and the data alone."""
    images = generated(model.average, panel_noise(run))
    pictures.save_grid(run.figure(f"samples_{run.stamp(run.args.epochs)}"), images, columns=SIDE)
    ends = different_pairs(model, judged_by, run.device)
    path = experiment.spherical_path(*ends, POINTS).flatten(0, 1)
    pictures.save_grid(run.figure("interpolation"), generated(model.average, path), columns=POINTS)
    images = sample(model.average, NEAREST)
    rows = zip(images.split(NEAREST // 2), nearest(images, data.images).split(NEAREST // 2))
    pictures.save_grid(run.figure("nearest"), torch.cat([row for pair in rows for row in pair]), columns=NEAREST // 2)


def different_pairs(model: GAN, judged_by: judge.Judge | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two lots of noise, (INTERPOLATIONS, Z_DIM) each, whose images the judge, if any, finds of different classes.

    The first such pairs of a fixed list; a generator that has collapsed may not have enough of them.
    """
    z = fixed_normal("interpolation", 40 * INTERPOLATIONS, Z_DIM).to(device)
    pairs = z.view(2, -1, Z_DIM)
    if judged_by is not None:
        start, end = judge.features_and_classes(judged_by, generated(model.average, z))[1].view(2, -1)
        pairs = pairs[:, torch.argsort((start == end).int(), stable=True).to(device)]  # those that differ come first
    return pairs[0, :INTERPOLATIONS], pairs[1, :INTERPOLATIONS]


# Flags


def flags() -> experiment.Parser:
    """The script's flags, with the report's settings as defaults."""
    parser = experiment.Parser(description=__doc__.partition("\n")[0])
    experiment.add_flags(parser, epochs=200, batch_size=256, lr=5e-4)
    return parser


@experiment.exit_status
def main(argv: list[str] | None = None) -> None:
    """Train, or with --evaluate or --sample use what was trained."""
    parser = flags()
    args = parser.parse_args(argv)
    config = {
        "dataset": args.dataset, "z_dim": Z_DIM, "leak": LEAK, "dropout": DROPOUT, "epochs": args.epochs,
        "lr": args.lr, "betas": list(BETAS), "decay": DECAY, "batch_size": args.batch_size, "seed": args.seed,
    }  # fmt: skip
    if args.batch_size == 1:
        raise UserError("--batch-size 1: batch norm needs at least 2 images to a batch")
    experiment.check_batch_size(args.batch_size, mnist.IMAGES)
    run = Run("gan", parser, args, config)
    torch.manual_seed(args.seed)
    model = GAN().to(run.device)
    if args.evaluate or args.sample:
        run.load_weights(model)
    model.eval()
    if args.sample:
        run.save_samples(sample(model.average, args.sample))
        return
    judged_by = judge.load(run.device) if args.dataset == "mnist" else None
    data = mnist.load(args.dataset, args.data_dir, run.device)
    if args.evaluate:
        run.recall()
    else:
        train(run, model, data)
    if run.history:
        draw_training(run)
    draw_final(run, model, data, judged_by)
    run.conclude(model, lambda: evaluate(run, model, data, judged_by))


if __name__ == "__main__":
    sys.exit(main())
