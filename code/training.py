"""What any training needs: noise, the learning rate, Adam, averaged weights, paths through noise, the captured step,
and the processes that torchrun starts.

Of N such processes each takes its share of every batch and draws noise of its own. `adam` makes every gradient the mean
over the processes as soon as it is there, so a step is that of the whole batch, and all hold the same weights.
"""

import contextlib
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cli
from cli import RunError


def fixed_generator(label: str) -> torch.Generator:
    """A CPU generator for noise that must be the same in every run, seeded by what the noise is for and nothing else.

    Uniform numbers drawn from it image by image are a function of the label and of the image's index alone.
    """
    return torch.Generator().manual_seed(zlib.crc32(label.encode()))


def fixed_normal(label: str, n: int, dimensions: int) -> Tensor:
    """Standard normal numbers (n, dimensions): a function of the label and of the image's index alone.

    Torch draws normal numbers in blocks of 16 and a ragged last block differently, so n is rounded up for drawing.
    """
    return torch.randn(-(-n // 16) * 16, dimensions, generator=fixed_generator(label))[:n]


def slerp(start: Tensor, end: Tensor, points: int) -> Tensor:
    """Spherical interpolation (Shoemake 1985): start and end, (n, d) each, to (n, points, d), both ends included.

    The path turns by equal angles. Between vectors of equal norm it keeps the norm, where a straight line would pass
    nearer to the origin than draws of N(0, I) ever are. Where the angle is 0 it is that straight line. Between opposite
    vectors there is no one arc, and the result means nothing.
    """
    cosine = (F.normalize(start, dim=-1) * F.normalize(end, dim=-1)).sum(-1).clamp(-1, 1)
    angle = torch.acos(cosine)[:, None, None]  # (n, 1, 1)
    t = torch.linspace(0, 1, points, dtype=start.dtype, device=start.device)[:, None]
    weight_start, weight_end = (torch.where(angle == 0, s, torch.sin(s * angle) / torch.sin(angle)) for s in (1 - t, t))
    return weight_start * start[:, None] + weight_end * end[:, None]


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate at `step` of 0 .. steps-1: a linear rise, then half a cosine to 0.

    warmup: the share of the steps that the rise takes, in [0, 1).
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def adam(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, **settings: Any
) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015) in one pass over the parameters, whose step a CUDA graph can hold.

    For that its learning rate must be a number on the device. It stays one when the state of a run elsewhere is loaded.
    weight_decay: a step also shrinks matrices, not vectors, by lr * weight_decay of themselves (Loshchilov & Hutter
    2019).
    """
    parameters = list(parameters)
    matrices = {"params": [each for each in parameters if each.ndim > 1], "weight_decay": weight_decay}
    vectors = {"params": [each for each in parameters if each.ndim <= 1]}
    groups = [matrices, vectors] if weight_decay else parameters
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True, **settings)
    _match_device(optimizer)
    optimizer.register_load_state_dict_post_hook(_match_device)
    if connected():
        for each in parameters:
            each.register_post_accumulate_grad_hook(lambda parameter: average(parameter.grad))
    return optimizer


def _match_device(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        device, lr = group["params"][0].device, float(group["lr"])
        group["capturable"] = device.type == "cuda"
        group["lr"] = torch.tensor(lr, device=device) if group["capturable"] else lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every parameter from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr


def connect(device: torch.device) -> None:
    """Join the processes that torchrun started: over gloo on CPUs, over NCCL on CUDA. One alone joins nobody."""
    if cli.processes() > 1:
        # The first optimizer imports this module anyway. Once there is a group, its functions would hold it as a
        # default, so its threads would outlive it, and a thread that is left when Python exits can abort the process.
        import torch.distributed.nn  # noqa: F401

        with together():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        cli.at_end.callback(disconnect)


def connected() -> bool:
    """Whether this process has joined others. Some builds of PyTorch cannot."""
    return dist.is_available() and dist.is_initialized()


def disconnect() -> None:
    """Leave them: from now on this process's gradients and batches are its own."""
    if connected():
        dist.destroy_process_group()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """For whatever waits for the other processes. Raises RunError if that fails, of which one on a machine tells."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what gloo and NCCL say of a connection that is gone
        reason = str(error).partition("\n")[0]
        ended = f"another process of this training has ended or cannot be reached ({reason})"
        advice = "all of them end; go on with the same command and --resume"
        raise RunError("" if cli.local_rank() else f"{ended}: {advice}") from error


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if connected():
        with together():
            dist.barrier()


def average(values: Tensor) -> None:
    """Make `values`, of one shape in all processes, their mean over the processes, in place."""
    if connected():
        with together():
            dist.all_reduce(values)
        values.div_(dist.get_world_size())


def from_process_0(content: Any) -> Any:
    """What process 0 has in every process: a tensor, in place, or anything that can be pickled."""
    if not connected():
        return content
    box = [content]
    with together():
        dist.broadcast(content, src=0) if isinstance(content, Tensor) else dist.broadcast_object_list(box)
    return box[0]


def share(index: Tensor) -> Tensor:
    """This process's part of a batch (batch,), which all of them divide equally."""
    return index.chunk(dist.get_world_size())[dist.get_rank()] if connected() else index


def own_noise(seed: int, epoch: int) -> None:
    """From now on this process draws numbers that no other process or epoch draws; alone, it goes on as it is.

    They are a function of the seed, the epoch and the process, so a resumed run draws the same.
    """
    if connected():
        torch.manual_seed(zlib.crc32(f"{seed}, epoch {epoch}, process {cli.rank()}".encode()))


def same_buffers(parts: Iterable[Any]) -> None:
    """Give all processes the buffers of process 0's models, such as batch norm's, taken over its share of a batch."""
    for part in parts:
        for buffer in part.buffers() if isinstance(part, nn.Module) else ():
            from_process_0(buffer)


def check_finite(epoch: int, **losses: Tensor) -> None:
    """Raise RunError if a loss of the epoch's steps (a vector each) is not finite, naming the first bad step.

    With several processes the losses become their means over the processes first, in place.
    """
    for values in losses.values() if connected() else ():
        mean = values.clone(memory_format=torch.contiguous_format)
        average(mean)
        values.copy_(mean)
    for name, values in losses.items():
        for step, value in enumerate(values.tolist(), start=1):
            if not math.isfinite(value):
                where = f"in epoch {epoch} at step {step} of {len(values)}"
                said = f"{name} is {value} {where}: diverged; the last checkpoint is kept. Try a smaller --lr"
                raise RunError("" if cli.rank() else said)


def ema_weight(step: int, decay: float) -> float:
    """The newest weights' share in their exponential moving average at `step` of 0, 1, ...: 1 less the decay.

    The decay rises to `decay`, so that the start is soon forgotten.
    """
    return 1 - min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, weight: float | Tensor) -> None:
    """Parameters of `average` become 1 - weight times themselves plus weight times the model's (Polyak averaging)."""
    for mean, value in zip(average.parameters(), model.parameters()):
        mean.lerp_(value, weight)


class CapturedStep:
    """A training step, `step(index, *numbers)`, that CUDA records once as a graph and then replays.

    A replay is one launch where the step itself is hundreds. The batch's index and the numbers are copied into the
    memory that the graph reads. What comes back is memory that the next call overwrites. Random numbers differ from
    replay to replay, as each advances the device's generator. Recording needs the optimizer's state and the libraries'
    workspaces to exist, so the first WARM_UP calls run uncaptured, on the same memory; they are steps of the training
    like all others. On other devices every call is the step's own.
    """

    WARM_UP = 3

    def __init__(self, step: Callable, device: torch.device):
        self._step, self._device = step, device
        self._calls = 0

    def __call__(self, index: Tensor, *numbers: float) -> Any:
        if self._device.type != "cuda":
            return self._step(index, *numbers)
        self._calls += 1
        if self._calls == 1:
            self._memory = [torch.empty_like(index), *(torch.zeros((), device=index.device) for _ in numbers)]
            self._aside = torch.cuda.Stream()  # a graph is not recorded on the default stream
        self._memory[0].copy_(index)
        for memory, number in zip(self._memory[1:], numbers):
            memory.fill_(number)
        if self._calls <= self.WARM_UP:
            self._aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._aside), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*capturable=True")  # Adam's, of steps outside a graph
                returned = self._step(*self._memory)
            torch.cuda.current_stream().wait_stream(self._aside)
            return returned
        if self._calls == self.WARM_UP + 1:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._aside):  # records the step, and does not run it
                self._returned = self._step(*self._memory)
        self._graph.replay()
        return self._returned
