"""What other settings of the GAN would have given: short runs with one thing changed, judged against validation.

    python code/trials.py        # two minutes each; writes figures/trials.json and prints its table

Ten epochs favour what starts fast, and one run each says nothing of small differences: the row with another seed shows
how large chance is. Checkpoints are kept in out/trials, so that a stopped run goes on; delete it to begin afresh.
"""

import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

import experiment
import gan
import judge
import mnist
from experiment import Run

EPOCHS = 10


class NarrowGAN(gan.GAN):
    """The GAN with weights from N(0, 0.02^2), as in Radford et al. 2016, and no biases at first."""

    def __init__(self):
        super().__init__()
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.average.load_state_dict(self.generator.state_dict())


TRIALS = {  # key -> what is changed, as flags and constants of gan.py
    "as_it_is": ("nothing", [], {}),
    "other_seed": ("another seed", ["--seed", "1"], {}),
    "beta1_half": ("betas 0.5 and 0.999", [], {"BETAS": (0.5, 0.999)}),
    "betas_default": ("betas 0.9 and 0.999, Adam's default", [], {"BETAS": (0.9, 0.999)}),
    "beta2_lower": ("betas 0 and 0.99", [], {"BETAS": (0.0, 0.99)}),
    "init_normal": ("weights from a normal of deviation 0.02", [], {"GAN": NarrowGAN}),
    "lr_double": ("learning rate 1e-3", ["--lr", "1e-3"], {}),
    "lr_half": ("learning rate 2.5e-4", ["--lr", "2.5e-4"], {}),
    "batch_half": ("batch size 128", ["--batch-size", "128"], {}),
}


def trial(own: list[str], constants: dict, common: list[str], data: mnist.Data) -> dict:
    """Train with these flags and constants; verdicts of averaged and last weights, and the last epoch's figures."""
    parser = gan.flags()
    args = parser.parse_args([*common, *own, "--epochs", str(EPOCHS), "--resume"])
    changed = {name: str(value) for name, value in constants.items()}
    config = {"lr": args.lr, "batch_size": args.batch_size, "seed": args.seed, "epochs": EPOCHS, **changed}
    run = Run("gan", parser, args, config)
    torch.manual_seed(args.seed)
    with contextlib.ExitStack() as changes:
        for name, value in constants.items():
            changes.enter_context(patch.object(gan, name, value))
        model = gan.GAN().to(run.device)
        gan.train(run, model, data)
    model.eval()
    judged_by, reference = judge.load(run.device), data.validation_images
    return {
        "config": config,
        **{key: value for key, value in run.history[-1].items() if key not in ("epoch", "seconds")},
        **judge.verdict(judged_by, gan.sample(model.average, judge.JUDGED), reference),
        "unaveraged": judge.verdict(judged_by, gan.sample(model.generator, judge.JUDGED), reference),
    }


def flags() -> experiment.Parser:
    """The script's flags."""
    parser = experiment.Parser(description=__doc__.partition("\n")[0])
    experiment.add_machine_flags(parser)
    parser.add_argument(
        "--out", type=Path, default=experiment.ROOT, metavar="DIR", help="writes DIR/figures/trials.json"
    )
    return parser


@experiment.exit_status
def main(argv: list[str] | None = None) -> None:
    """Run every trial; one that was finished before is not run again."""
    args = flags().parse_args(argv)
    device = experiment.device(args.device)
    figures = experiment.folder(args.out / "figures")
    data = mnist.load("mnist", args.data_dir, device)
    results = {}
    for key, (changed, own, constants) in TRIALS.items():
        common = ["--device", args.device, "--out", str(args.out / "out" / "trials" / key)]
        results[key] = {"changed": changed, **trial(own, constants, common, data)}
    print(judge.HEAD)
    for each in results.values():
        print(judge.row(each["changed"], each))
    content = {"environment": experiment.environment(device), "epochs": EPOCHS, "gan": results}
    experiment.write(figures / "trials.json", experiment.json_bytes(content))


if __name__ == "__main__":
    sys.exit(main())
