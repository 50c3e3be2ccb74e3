"""The GAN's formulas against independent ones, and what its runs leave."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import gan
import judge
import mnist
import pictures
import training
from conftest import COSTS, SMALL, VERDICT, built, contents, result_of
from experiment import Run
from training import fixed_normal

Z_DIM = 100  # as the report has it


@pytest.fixture
def model() -> gan.GAN:
    """A GAN in float64 with statistics and logits that are not those of an untrained one."""
    torch.manual_seed(0)
    fresh = built(gan).double()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        fresh.generate(torch.randn(64, Z_DIM, dtype=torch.float64))  # moves batch norm's running statistics
    return fresh


def noise(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, Z_DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_networks_are_the_reports():
    """Question 2.5: the sizes, where batch norm and dropout are, the slope, the settings of Adam."""
    described = []
    model = built(gan)
    for network in (model.generator, model.discriminator):
        for layer in network.modules():
            match layer:
                case torch.nn.Linear():
                    described.append((layer.in_features, layer.out_features))
                case torch.nn.BatchNorm1d():
                    described.append(f"norm {layer.num_features}")
                case torch.nn.LeakyReLU():
                    described.append(f"leaky {layer.negative_slope}")
                case torch.nn.Dropout():
                    described.append(f"dropout {layer.p}")
                case torch.nn.Tanh():
                    described.append("tanh")
    doubling = [((n, 2 * n), f"norm {2 * n}", "leaky 0.2") for n in (128, 256, 512)]
    generator = [(100, 128), "leaky 0.2", *(each for layer in doubling for each in layer), (1024, 784), "tanh"]
    hidden = [((784, 512), "leaky 0.2", "dropout 0.1"), ((512, 256), "leaky 0.2", "dropout 0.1")]
    assert described == [*generator, *(each for layer in hidden for each in layer), (256, 1)]
    args = gan.flags().parse_args([])
    assert (args.lr, args.epochs) == (5e-4, 200)
    for optimizer, network in zip(
        gan.make_optimizers(model, args.lr, args.betas), (model.discriminator, model.generator)
    ):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"]) == (5e-4, (0.0, 0.999))
        assert {id(each) for each in group["params"]} == {id(each) for each in network.parameters()}


def test_losses_are_the_cross_entropies():
    real, fake = torch.randn(2, 50, dtype=torch.float64)
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    cross_entropy = F.binary_cross_entropy
    expected = cross_entropy(torch.sigmoid(real), ones) + cross_entropy(torch.sigmoid(fake), zeros)
    torch.testing.assert_close(gan.discriminator_loss(real, fake), expected)
    torch.testing.assert_close(gan.generator_loss(fake), cross_entropy(torch.sigmoid(fake), ones))


def test_zero_logits_give_log_4_and_log_2():
    zero = torch.zeros(7, dtype=torch.float64)
    assert gan.discriminator_loss(zero, zero).item() == pytest.approx(math.log(4), rel=1e-14)
    assert gan.generator_loss(zero).item() == pytest.approx(math.log(2), rel=1e-14)


@pytest.mark.parametrize("logit", [-30.0, -2.0, 0.0, 0.7, 5.0])
def test_gradients_with_respect_to_the_logits(logit):
    real, fake = torch.tensor([0.4], dtype=torch.float64), torch.tensor([logit], dtype=torch.float64)
    fake.requires_grad_()
    one = torch.sigmoid(fake.detach())
    saturating = -F.softplus(fake).mean()  # the mean of log(1 - D), which the generator of the original game minimises
    losses = (gan.discriminator_loss(real, fake), gan.generator_loss(fake), saturating)
    for loss, expected in zip(losses, (one, -(1 - one), -one)):
        torch.testing.assert_close(torch.autograd.grad(loss, fake)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_losses_are_finite_and_right_at_extreme_logits(logit):
    real, fake = torch.tensor([logit], requires_grad=True), torch.tensor([-logit], requires_grad=True)
    loss_d, loss_g = gan.discriminator_loss(real, fake), gan.generator_loss(fake)
    assert loss_d.item() == 2 * max(-logit, 0.0) and loss_g.item() == max(logit, 0.0)
    (loss_d + loss_g).backward()
    wrong = float(logit < 0)  # D's mistake on both
    assert real.grad.item() == -wrong and fake.grad.item() == wrong - (1 - wrong)


def test_each_objective_is_its_loss_on_the_networks_logits(model):
    model.eval()
    x, z = torch.rand(9, mnist.PIXELS, dtype=torch.float64), noise(9)
    real, fake = model.discriminate(x), model.discriminate(model.generate(z))
    loss, outputs = gan.discriminator_objective(model, x, z)
    torch.testing.assert_close(loss, gan.discriminator_loss(real, fake))
    torch.testing.assert_close(outputs, torch.stack((torch.sigmoid(real).mean(), torch.sigmoid(fake).mean())))
    assert not outputs.requires_grad
    torch.testing.assert_close(gan.generator_objective(model, z), gan.generator_loss(fake))


def test_each_step_leaves_the_other_networks_gradients_empty():
    torch.manual_seed(0)
    model = built(gan)
    optimizers = gan.make_optimizers(model, 5e-4, (0.0, 0.999))
    seen = []

    def look(which):
        def before_update(*_):
            empty = [
                all(p.grad is None or not p.grad.any() for p in network.parameters())
                for network in (model.discriminator, model.generator)
            ]
            seen.append((which, *empty))

        return before_update

    for which, optimizer in zip("dg", optimizers):
        optimizer.register_step_pre_hook(look(which))
        optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    images = torch.randint(256, (20, mnist.PIXELS), dtype=torch.uint8)
    gan.training_step(model, optimizers, images, torch.arange(20), 0.1)
    assert seen == [("d", False, True), ("g", True, False)]
    assert all(not torch.equal(*pair) for pair in zip(before, model.parameters()) if pair[0].ndim == 2)


def test_a_step_is_the_textbooks_two_steps():
    """`training_step` leaves the weights where two plain updates of D and G with cross-entropies do."""
    images = torch.randint(256, (30, mnist.PIXELS), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    betas, models = (0.0, 0.999), []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(built(gan, "--dropout", 0))  # masks would differ: one forward pass over both halves, or two
    ours, plain = models
    torch.manual_seed(3)
    figures = gan.training_step(ours, gan.make_optimizers(ours, 1e-3, betas), images, torch.arange(30), 0.1)
    torch.manual_seed(3)
    z_d, z_g = torch.randn(2, 30, Z_DIM)
    assert not torch.equal(z_d, z_g)
    adam_d, adam_g = (
        torch.optim.Adam(network.parameters(), lr=1e-3, betas=betas)
        for network in (plain.discriminator, plain.generator)
    )
    cross_entropy = F.binary_cross_entropy_with_logits
    real = plain.discriminator(images / 127.5 - 1)
    fake = plain.discriminator(plain.generator(z_d).detach())
    loss_d = cross_entropy(real, torch.ones_like(real)) + cross_entropy(fake, torch.zeros_like(fake))
    loss_d.backward()
    adam_d.step()
    fooled = plain.discriminator(plain.generator(z_g))
    loss_g = cross_entropy(fooled, torch.ones_like(fooled))
    loss_g.backward()
    adam_g.step()
    expected = torch.stack((loss_d, loss_g, torch.sigmoid(real).mean(), torch.sigmoid(fake).mean()))
    torch.testing.assert_close(figures, expected, rtol=1e-5, atol=1e-6)
    trained = [*ours.generator.parameters(), *ours.discriminator.parameters()]
    for a, b in zip(trained, [*plain.generator.parameters(), *plain.discriminator.parameters()]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # a tenth of the step that Adam takes


def test_slerp_keeps_the_norm_and_turns_by_equal_angles():
    start, end = noise(6, 1), noise(6, 2)
    end *= start.norm(dim=1, keepdim=True) / end.norm(dim=1, keepdim=True)
    path = training.slerp(start, end, 9)
    assert path.shape == (6, 9, Z_DIM)
    norms = start.norm(dim=1, keepdim=True).expand(6, 9)
    torch.testing.assert_close(path.norm(dim=2), norms, rtol=0, atol=1e-12)
    torch.testing.assert_close(path[:, 0], start, rtol=0, atol=1e-12)
    torch.testing.assert_close(path[:, -1], end, rtol=0, atol=1e-12)
    cosines = F.cosine_similarity(path[:, 1:], path[:, :-1], dim=2)
    torch.testing.assert_close(cosines, cosines[:, :1].expand(6, 8), rtol=0, atol=1e-12)
    straight = training.slerp(start, 3 * start, 3)
    torch.testing.assert_close(straight[:, 1], 2 * start)


def test_in_evaluation_mode_an_image_does_not_depend_on_its_batch_mates(model):
    model.eval()
    z = noise(50)
    together, alone = model.generate(z), torch.cat([model.generate(each) for each in z.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    model.train()
    assert (model.generate(z) - together).abs().max() > 1e-2
    with pytest.raises(ValueError, match="eval"):
        gan.generated(model.generator, z)


def test_samples_are_upright_and_of_the_full_range():
    torch.manual_seed(0)
    generator = built(gan).eval().generator
    with torch.no_grad():
        generator[-2].weight.zero_()
        generator[-2].bias.copy_(torch.linspace(-9, 9, mnist.PIXELS))
    image = gan.sample(generator, 3)[2]
    assert image.dtype == torch.uint8 and image.flatten().tolist() == sorted(image.flatten().tolist())
    assert (int(image[0, 0]), int(image[-1, -1])) == (0, 255)
    x = gan.scaled(torch.tensor([0, 255], dtype=torch.uint8))
    assert x.tolist() == [-1, 1]


def test_the_running_average_is_one():
    torch.manual_seed(0)
    model = built(gan)
    optimizers = gan.make_optimizers(model, 1e-2, (0.0, 0.999))
    images = torch.randint(256, (20, mnist.PIXELS), dtype=torch.uint8)
    expected = [parameter.detach().clone() for parameter in model.average.parameters()]
    assert all(torch.equal(*pair) for pair in zip(expected, model.generator.parameters()))
    for decay in (0.9, 0.5):
        gan.training_step(model, optimizers, images, torch.arange(20), 1 - decay)
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected, model.generator.parameters())]
    for average, value in zip(model.average.parameters(), expected):
        torch.testing.assert_close(average, value)
    shares = [training.ema_weight(step, 0.99) for step in (0, 90, 891, 10_000)]
    assert shares == pytest.approx([0.9, 0.09, 0.01, 0.01], abs=1e-3)


def test_nearest_is_the_least_distance():
    generator = torch.Generator().manual_seed(0)
    among = torch.randint(256, (40, 28, 28), generator=generator, dtype=torch.uint8)
    images = torch.randint(256, (7, 28, 28), generator=generator, dtype=torch.uint8)
    images[3] = among[11]
    found, distances = gan.nearest(images, among, block=3)
    for image, near, distance in zip(images.double(), found.double(), distances):
        assert (image - near).norm() == min((image - each).norm() for each in among.double())
        assert float(distance) == pytest.approx(float((image - near).norm()))
    assert torch.equal(found[3], among[11]) and distances[3] == 0
    assert gan.centre(torch.tensor([1.0, 2.0, 6.0])) == {"mean": 3, "median": 2}


def play(model: gan.GAN, tmp_path, *flags: object) -> Run:
    """A run of the model's config, not started."""
    parser = gan.flags()
    args = parser.parse_args([*map(str, flags), "--device", "cpu", "--out", str(tmp_path)])
    return Run("gan", parser, args, evaluation=("fresh_epochs",))


def test_a_fresh_discriminator_finds_what_is_there_to_find(tmp_path):
    """It is the game's own loss on unseen images: log 4 at best where generated and real ones are the same, and near 0
    where they are not. It starts from other weights than the game's, and changes neither."""
    torch.manual_seed(0)
    model = built(gan).eval()
    run = play(model, tmp_path, "--batch-size", 50, "--fresh-epochs", 3, "--dropout", 0)
    with torch.no_grad():  # it draws black images, -1 exactly, and nothing else
        model.average[-2].weight.zero_()
        model.average[-2].bias.fill_(-20)
    same = torch.zeros(600, 28, 28, dtype=torch.uint8)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def found(images: torch.Tensor, test_images: torch.Tensor) -> dict:
        labels = torch.zeros(len(images)), torch.zeros(len(test_images))
        return gan.fresh_discriminator(run, model, mnist.Data(images, labels[0], test_images, labels[1], 100))

    losses = found(same, same[:100])["loss"]
    assert len(losses) == 4 and losses[-1] == pytest.approx(math.log(4), abs=1e-3)
    other = 255 - same
    whites = found(other, other[:100])["loss"]
    assert whites[0] == pytest.approx(math.log(4), abs=0.3) and whites[-1] < 0.1
    mixed = torch.cat((same[:100], other[:100]))  # half of the unseen real images look generated
    fresh = found(other, mixed)
    assert fresh["loss"][-1] > 1 and fresh == found(other, mixed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():  # the game's own discriminator, on black images and on white ones
        black, white = (model.discriminate(torch.full((1, 784), grey)) for grey in (-1.0, 1.0))
    own = (F.softplus(-black) + F.softplus(-white)) / 2 + F.softplus(black)
    assert fresh["own"] == pytest.approx(own.item(), rel=1e-5)
    blacks = found(other, same[:100])["loss"]  # by the same discriminator, so the deviation of both is known
    assert fresh["jsd_se"] == pytest.approx((blacks[-1] - whites[-1]) / 2 / math.sqrt(200 - 1) / 2, rel=1e-4)


def test_the_losses_are_drawn_as_deviations(tmp_path, monkeypatch):
    """What is drawn, of a history with judged epochs: their distance above, and every loss less its equilibrium's."""
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda path, fig: figures.append(fig))
    run = play(built(gan), tmp_path)
    run.history = [
        {
            "epoch": epoch,
            "loss_d": math.log(4) - 0.1 * epoch,
            "loss_g": math.log(2) + epoch,
            "d_real": 0.6,
            "d_fake": 0.5,
        }
        for epoch in range(4)
    ]
    run.history[2] |= {"val_fid": 20.0, "val_precision": 0.7, "val_recall": 0.25}
    gan.draw_losses(run, [2.0, math.log(4) - 1, math.log(4) - 2])
    for row in run.history:
        row.pop("val_fid", None)
    gan.draw_losses(run, [2.0])
    run.history.clear()
    gan.draw_losses(run, [])  # of no history, nothing
    with_judge, without = figures
    distance, losses, outputs, shares = with_judge.axes
    drawn = [[line.get_xydata().round(6).tolist() for line in ax.lines] for ax in (distance, losses, shares)]
    assert drawn[0] == [[[2, 20.0]]] and drawn[2] == [[[2, 0.7]], [[2, 0.25]]]
    assert drawn[1][0] == [[1, -0.1], [2, -0.2], [3, -0.3]] and drawn[1][1] == [[1, 1], [2, 2], [3, 3]]
    assert drawn[1][2] == [[1, -1], [2, -2]]
    assert all(ax.get_xscale() == "log" for ax in (distance, losses, outputs))
    assert len(without.axes) == 2 and len(without.axes[0].lines) == 3  # both losses and the line at 0


@pytest.mark.parametrize("classes", [10, 2, 1])
def test_interpolation_is_between_classes_that_the_judge_is_sure_of(monkeypatch, classes):
    """A stand-in for the judge knows some classes, and of every third image is less than 0.99 sure."""
    model = built(gan).eval()

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        total = images.flatten(1).long().sum(1)
        certainty = torch.where(total // 10 % 3 > 0, 6.8, 6.7)  # with nine zeros beside it: 0.9901 or 0.9890
        return F.one_hot(total % classes, 10) * certainty.unsqueeze(1)

    monkeypatch.setattr(judge, "features_and_logits", lambda _, images: (None, logits_of(images)))
    start, end = gan.different_pairs(model, judge.Judge())
    assert start.shape == end.shape == (gan.INTERPOLATIONS, Z_DIM)
    (sure, found), (sure_too, other) = (logits_of(gan.generated(model.average, z)).max(1) for z in (start, end))
    if classes == 1:  # there are no such pairs, and it takes the first
        assert torch.equal(start, gan.different_pairs(model, None)[0])
    else:
        assert (found != other).all() and (sure > 6.75).all() and (sure_too > 6.75).all()


def test_what_a_run_leaves(finished, tiny):
    out = finished("gan")
    names = {name.removeprefix("figures/") for name in contents(out) if name.startswith("figures/")}
    panels = {f"gan_samples_epoch{epoch:02d}.png" for epoch in (0, 1, 2)}
    others = {"gan.json", "gan_samples.gif", "gan_losses.png", "gan_losses.pdf", "gan_interpolation.png"}
    assert names == panels | others | {"gan_nearest.png"}
    assert Image.open(out / "figures" / "gan_samples.gif").n_frames == 3
    content = result_of(out, "gan")
    keys = {"epoch", "loss_d", "loss_g", "d_real", "d_fake", "seconds"} | {f"val_{key}" for key in judge.MEASURES}
    assert all(set(row) == keys for row in content["history"])
    result = content["result"]
    assert set(result) == VERDICT | COSTS | {"unaveraged", "validation", "over_noise", "fresh_discriminator", "nearest"}
    assert set(result["unaveraged"]) == set(result["validation"]) == VERDICT
    assert result["parameters"] == 2_041_745
    assert [len(result["over_noise"]), len(result["fresh_discriminator"]["loss"])] == [gan.NOISES, 3]
    assert result["over_noise"][0] == {key: result[key] for key in judge.MEASURES}
    assert len({each["fid"] for each in result["over_noise"]}) == gan.NOISES
    last = result["fresh_discriminator"]["loss"][-1]
    assert result["fresh_discriminator"]["jsd_at_least"] == pytest.approx(max(0, (math.log(4) - last) / 2))
    model = built(gan).eval()
    model.load_state_dict(torch.load(out / "weights" / "gan.pt", weights_only=True)["model"])
    samples = gan.sample(model.average, judge.JUDGED)
    assert result["nearest"] == {
        name: gan.centre(gan.nearest(images[::2], tiny.images)[1])
        for name, images in (("samples", samples), ("test_images", tiny.test_images))
    }


def test_the_judge_looks_at_some_epochs_and_the_last(tiny, tmp_path, monkeypatch):
    """At 0, 1, 2, 4, then every eighth: PROBE samples of the average against validation images."""
    asked, described = [], judge.described
    monkeypatch.setattr(judge, "described", lambda model, images: asked.append(images) or described(model, images))
    assert gan.main([*SMALL["gan"], "--epochs", "9", "--out", str(tmp_path)]) == 0
    content = result_of(tmp_path, "gan")
    assert [row["epoch"] for row in content["history"] if "val_fid" in row] == [0, 1, 2, 4, 8, 9]
    assert torch.equal(asked[0], tiny.validation_images) and [len(each) for each in asked[1:7]] == 6 * [gan.PROBE]
    model = built(gan).eval()
    model.load_state_dict(torch.load(tmp_path / "weights" / "gan.pt", weights_only=True)["model"])
    verdict = judge.verdict(
        judge.load(torch.device("cpu")), gan.sample(model.average, gan.PROBE), tiny.validation_images
    )
    assert {f"val_{key}": verdict[key] for key in judge.MEASURES}.items() <= content["history"][-1].items()


def test_samples_are_drawn_by_the_settled_average(finished, tiny, tmp_path, monkeypatch, capsys):
    described, seen, compared = judge.described, {}, judge.compared
    pairs = []
    monkeypatch.setattr(
        judge, "described", lambda _, images: seen.setdefault(id(made := described(_, images)), (made, images))[0]
    )
    monkeypatch.setattr(
        judge, "compared", lambda *sides: pairs.append([seen[id(s)][1] for s in sides]) or compared(*sides)
    )
    out = shutil.copytree(finished("gan"), tmp_path / "out")
    flags, before = [*SMALL["gan"], "--out", str(out)], contents(out)
    model = built(gan).eval()
    model.load_state_dict(torch.load(out / "weights" / "gan.pt", weights_only=True)["model"])
    assert gan.main([*flags, "--sample", "23"]) == 0
    images = torch.from_numpy(np.load(out / "figures" / "gan_samples.npz")["images"])
    assert images.shape == (23, 28, 28) and torch.equal(images, gan.sample(model.average, 23))
    assert not torch.equal(images, gan.sample(model.generator, 23))
    frames = torch.load(out / "checkpoints" / "gan.pt", weights_only=True)["frames"]
    assert torch.equal(frames[2], gan.generated(model.average, fixed_normal("panels", gan.SIDE**2, Z_DIM)))
    linear, norm = model.average[2][:2]  # the first batch norm is over what its linear layer says of all the noise
    with torch.no_grad():
        h = linear(model.average[:2](fixed_normal("settling", 1500, Z_DIM)))
    torch.testing.assert_close(norm.running_mean, h.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, h.var(0), rtol=1e-2, atol=1e-5)
    capsys.readouterr()
    assert gan.main([*flags, "--evaluate"]) == 0
    result, trained = json.loads(capsys.readouterr().out), result_of(out, "gan")["result"]
    for key in VERDICT | {"unaveraged", "validation", "over_noise", "fresh_discriminator", "nearest"}:
        assert result[key] == trained[key]
    samples = gan.sample(model.average, judge.JUDGED)
    (ours, test), (same, validation), (last, test_too), *others = pairs
    assert torch.equal(ours, samples) and torch.equal(same, samples)
    assert torch.equal(last, gan.sample(model.generator, judge.JUDGED))
    assert torch.equal(test, tiny.test_images) and torch.equal(validation, tiny.validation_images)
    assert torch.equal(test_too, tiny.test_images) and len(others) == gan.NOISES - 1
    assert all(torch.equal(each[1], tiny.test_images) and not torch.equal(each[0], samples) for each in others)
    assert gan.main([*flags, "--resume"]) == 0
    after = contents(out)
    del after["figures/gan_samples.npz"]
    assert after == before


def test_epoch_0_updates_nothing(tiny, tmp_path, monkeypatch):
    states, panel = [], gan.panel

    def look(model):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return panel(model)

    monkeypatch.setattr(gan, "panel", look)
    assert gan.main([*SMALL["gan"], "--epochs", "1", "--out", str(tmp_path), "--seed", "5"]) == 0
    torch.manual_seed(5)
    trained = ("generator", "discriminator")
    fresh = {name: value for name, value in built(gan).state_dict().items() if name.startswith(trained)}
    before, after, _ = states  # in epochs 0 and 1, and for the pictures
    assert all(torch.equal(before[name], fresh[name]) for name in fresh)
    assert not any(torch.equal(after[name], fresh[name]) for name in fresh)
    figures = result_of(tmp_path, "gan")["history"][0]
    assert figures["loss_d"] == pytest.approx(math.log(4), abs=0.1)
    assert figures["loss_g"] == pytest.approx(math.log(2), abs=0.1)
    assert figures["d_real"] == pytest.approx(0.5, abs=0.1) == figures["d_fake"]


def test_the_second_half_takes_larger_batches(tiny, tmp_path, monkeypatch):
    """Of five epochs the last three; and steps are numbered on, by which the average's decay rises."""
    sizes, steps = [], []
    step, weight = gan.training_step, training.ema_weight
    monkeypatch.setattr(gan, "training_step", lambda *a, **b: sizes.append(len(a[3])) or step(*a, **b))
    monkeypatch.setattr(training, "ema_weight", lambda number, decay: steps.append(number) or weight(number, decay))
    flags = [*SMALL["gan"], "--epochs", "5", "--batch-size", "100", "--growth", "3"]
    assert gan.main([*flags, "--out", str(tmp_path)]) == 0
    assert sizes == 2 * 6 * [100] + 3 * 2 * [300] and steps == list(range(18))


def test_batches_that_cannot_be_are_refused_in_one_line(tiny, tmp_path, capsys):
    for flags, words in (
        ("--batch-size=1", "batch norm"),
        ("--batch-size=601 --growth=1", "601 times --growth 1 is more than the 600"),
        ("--growth=11", "60 times --growth 11 is more than the 600"),
    ):
        assert gan.main([*SMALL["gan"], *flags.split(), "--out", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line and "--batch-size" in line
    assert not contents(tmp_path)
