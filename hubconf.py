"""The committed models for PyTorch Hub, in evaluation mode.

    model = torch.hub.load("<repository>", "vae_z20")    # or source="local" and the path of a clone
    images = model.sample(16)                            # (16, 28, 28) uint8, of the same noise in every call

`pretrained=False` gives the same network untrained. `judge` classifies, and has no samples.
"""

import collections.abc
import contextlib
import functools
import importlib
import pathlib
import sys

import torch
from torch import nn

dependencies = ["torch", "numpy", "tqdm"]

_ROOT = pathlib.Path(__file__).resolve().parent


@contextlib.contextmanager
def _code() -> collections.abc.Iterator[None]:
    """Here `import vae` finds code/vae.py, whatever modules of such names the caller has, which afterwards are back."""
    names = {path.stem for path in (_ROOT / "code").glob("*.py")}
    theirs = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.path.insert(0, str(_ROOT / "code"))
    try:
        yield
    finally:
        sys.path.remove(str(_ROOT / "code"))
        for name in names & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(theirs)


def _model(script: str, run: str, pretrained: bool, *flags: str) -> nn.Module:
    """The model of a script's run, whose settings these flags give, with `sample(n)`."""
    with _code():
        import cli
        import experiment

        module = importlib.import_module(script)
        path = _ROOT / "weights" / f"{run}.pt"
        if pretrained:
            model = experiment.trained(path, module.build, "get the repository again (force_reload=True)")
        else:
            model = module.build(cli.settings(module.flags().parse_args(flags)))
    model.sample = functools.partial(module.sample, model.average if script == "gan" else model)
    return model.eval()


def vae_z20(pretrained: bool = True) -> nn.Module:
    """The variational autoencoder with 20 latents."""
    return _model("vae", "vae_z20", pretrained)


def vae_z2(pretrained: bool = True) -> nn.Module:
    """The variational autoencoder with a plane of latents."""
    return _model("vae", "vae_z2", pretrained, "--z-dim", "2")


def vae_best(pretrained: bool = True) -> nn.Module:
    """The variational autoencoder of the record run, with a flow as its prior."""
    return _model("vae", "vae_best", pretrained, "--best")


def gan(pretrained: bool = True) -> nn.Module:
    """Generator, discriminator and the averaged generator, which samples."""
    return _model("gan", "gan", pretrained)


def nf(pretrained: bool = True) -> nn.Module:
    """The normalizing flow."""
    return _model("nf", "nf", pretrained)


def nf_best(pretrained: bool = True) -> nn.Module:
    """The larger normalizing flow of the record run."""
    return _model("nf", "nf_best", pretrained, "--best")


def judge(pretrained: bool = True) -> nn.Module:
    """The classifier in whose features samples are compared: (n, 28, 28) uint8 to features and logits."""
    with _code():
        import judge

        return (judge.load(torch.device("cpu"), _ROOT) if pretrained else judge.Judge()).eval()
