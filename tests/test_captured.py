"""A training step as a CUDA graph: what of it can be tested on a CPU, and the rest where there is a GPU."""

import contextlib
import functools
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cli
import gan
import mnist
import nf
import training
import vae
from conftest import RUNS, SMALL, built

CUDA = torch.device("cuda")


@pytest.fixture
def cuda() -> torch.device:
    """The GPU with the scripts' settings of it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return cli.device("cuda")


def captured_step(script: str, device: torch.device) -> tuple[list[torch.Tensor], object]:
    """The state of a fresh model, and its captured training step: on the batch's index, and the step's number."""
    torch.manual_seed(0)
    images = torch.randint(256, (64, 28, 28), dtype=torch.uint8).to(device)
    flat = images.flatten(1)
    model = built({"vae": vae, "gan": gan, "nf": nf}[script], *SMALL[script]).to(device)
    if script == "gan":
        optimizers = gan.make_optimizers(model, 1e-3, (0.0, 0.999))
        step = training.CapturedStep(lambda *batch: gan.training_step(model, optimizers, flat, *batch), device)
        return list(model.state_dict().values()), lambda index, number: step(index, 0.5 - number / 100)
    optimizer = training.adam(model.parameters(), 1e-3)
    plain = {
        "vae": lambda index: vae.training_step(model, optimizer, flat, index, True, 500.0),
        "nf": lambda index: nf.training_step(model, optimizer, images, index, 100.0),
    }
    step = training.CapturedStep(plain[script], device)

    def scheduled(index: torch.Tensor, number: int) -> object:
        training.set_lr(optimizer, 1e-3 / (1 + number))
        return step(index)

    return list(model.state_dict().values()), scheduled


def test_on_a_cpu_a_call_is_the_steps_own():
    calls = []
    step = training.CapturedStep(lambda *arguments: calls.append(arguments) or len(calls), torch.device("cpu"))
    index = torch.arange(3)
    assert [step(index, 0.25) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    assert all(arguments[0] is index and arguments[1] == 0.25 for arguments in calls)


def test_after_warming_up_the_graph_is_fed_and_replayed(monkeypatch):
    """With a stand-in for torch.cuda that records what is asked of it; the step adds up what it is given."""
    asked, seen, total = [], set(), torch.zeros(())

    def step(index: torch.Tensor, number: float | torch.Tensor) -> torch.Tensor:
        asked.append("step")
        seen.add(index.data_ptr())
        return total.add_(index.sum() * number)

    class Graph:
        def replay(self) -> None:
            asked.append("replay")
            total.add_(captured._memory[0].sum() * captured._memory[1])

    @contextlib.contextmanager
    def working_on(stream: object):
        asked.append("aside" if stream is aside else "elsewhere")
        yield

    @contextlib.contextmanager
    def recording(graph: Graph, stream: object):
        asked.append("record" if stream is aside else "elsewhere")
        before = total.clone()
        yield
        total.copy_(before)  # a capture does not run what it records

    aside, main = (types.SimpleNamespace(wait_stream=waits) for waits in (asked.append, asked.append))
    stand_in = types.SimpleNamespace(
        Stream=lambda: aside, current_stream=lambda: main, stream=lambda stream: working_on(stream),
        CUDAGraph=Graph, graph=lambda graph, stream: recording(graph, stream),
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", stand_in)
    captured = training.CapturedStep(step, CUDA)
    expected = 0.0
    for n in range(1, 8):
        index = torch.tensor([n, 2 * n])
        expected += 3 * n * (0.5 + n)
        assert float(captured(index, 0.5 + n)) == expected
    plainly = [main, "aside", "step", aside]  # waits for what was before it, as what follows waits for it
    assert asked == plainly * captured.WARM_UP + ["record", "step"] + ["replay"] * (7 - captured.WARM_UP)
    assert len(seen) == 1  # the graph reads the memory that it was warmed up on


def test_adam_is_torchs_and_keeps_its_settings_when_it_is_loaded():
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = training.adam([ours], 0.1, betas=(0.5, 0.9)), torch.optim.Adam([theirs], lr=0.1, betas=(0.5, 0.9))
    for step in range(4):
        for parameter, optimizer in zip((ours, theirs), optimizers):
            if step == 2:
                training.set_lr(optimizer, 0.01)
            parameter.grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    state = optimizers[0].state_dict()
    state["param_groups"][0] |= {"lr": torch.tensor(0.25), "capturable": True}  # as a run on CUDA leaves them
    again = training.adam([torch.nn.Parameter(torch.ones(3))], 0.1)
    again.load_state_dict(state)
    (group,) = again.param_groups
    assert group["lr"] == 0.25 and type(group["lr"]) is float and group["capturable"] is False
    assert group["betas"] == (0.5, 0.9)


def test_only_matrices_decay():
    """By the rate times the decay, apart from Adam's own step, which is zero here."""
    matrix, vector = (torch.nn.Parameter(torch.full(shape, 2.0)) for shape in ((2, 2), (2,)))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    training.adam([vector, matrix], 0.1, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 2.0 * (1 - 0.1 * 0.5)))
    assert torch.equal(vector, torch.full((2,), 2.0))


class NoReadingBack(TorchDispatchMode):
    """Fails where a program on a GPU would have to wait for it: numbers, truth values and sizes out of tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        assert name not in {f"aten::{each}" for each in ("_local_scalar_dense", "nonzero", "masked_select", "equal")}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("script", RUNS)
def test_a_step_reads_nothing_back(script):
    _, step = captured_step(script, torch.device("cpu"))
    step(torch.arange(32), 0)
    with NoReadingBack():
        step(torch.arange(32), 1)
    with pytest.raises(AssertionError), NoReadingBack():
        torch.ones(2).sum().item()


def test_batches_and_noise_are_drawn_where_the_images_are():
    """On a device without numbers, as no other is sure to be there."""
    meta = torch.device("meta")
    images = torch.zeros(64, 28, 28, dtype=torch.uint8, device=meta)
    index = next(iter(mnist.batches(64, 32, meta)))
    drawn = [index, *vae.draw_batch(images.flatten(1), index, 2), *gan.draw_batch(images.flatten(1), index, 100)]
    drawn += nf.draw_batch(images, index)
    assert [each.device for each in drawn] == 7 * [meta]


def test_a_rate_on_the_device_is_changed_in_place():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(0.5))
    rate = optimizer.param_groups[0]["lr"]
    training.set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.25


def test_on_cuda_adams_rate_is_on_the_device():
    """Also when the state is of a run on a CPU. With tensors that know their device and hold no numbers."""
    state = training.adam([torch.nn.Parameter(torch.ones(2))], 0.1).state_dict()
    with FakeTensorMode():
        optimizer = training.adam([torch.nn.Parameter(torch.ones(2, device=CUDA))], 0.1)
        for loaded in (False, True):
            if loaded:
                optimizer.load_state_dict(state)
            (group,) = optimizer.param_groups
            assert group["lr"].device.type == "cuda" and group["capturable"]


@pytest.mark.parametrize("script", RUNS)
def test_replays_leave_the_weights_that_plain_steps_do(script, monkeypatch, cuda):
    """With the same random numbers, hence on noise that is new at every step in both, and another index each time."""
    left = []
    for warm_up in (3, 100):
        monkeypatch.setattr(training.CapturedStep, "WARM_UP", warm_up)
        parameters, step = captured_step(script, cuda)
        torch.manual_seed(1)
        for number in range(8):
            step(torch.arange(32, device=cuda) + number, number)
        left.append(parameters)
    for one, other in zip(*left):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_two_sizes_of_batch_are_two_graphs(monkeypatch, cuda):
    """As the GAN's game has them, one after the other, on the same networks."""
    left = []
    for warm_up in (3, 100):
        monkeypatch.setattr(training.CapturedStep, "WARM_UP", warm_up)
        torch.manual_seed(0)
        images = torch.randint(256, (64, mnist.PIXELS), dtype=torch.uint8).to(cuda)
        model = built(gan, *SMALL["gan"]).to(cuda)
        plain = functools.partial(gan.training_step, model, gan.make_optimizers(model, 1e-3, (0.0, 0.999)), images)
        torch.manual_seed(1)
        for size in (16, 32):
            step = training.CapturedStep(plain, cuda)
            for number in range(8):
                step(torch.arange(size, device=cuda) + number, 0.1)
        left.append(list(model.state_dict().values()))
    for one, other in zip(*left):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_random_numbers_differ_from_replay_to_replay(cuda):
    torch.manual_seed(0)
    step = training.CapturedStep(lambda index: torch.rand(1000, device=index.device), cuda)
    drawn = [step(torch.arange(2, device=cuda)).clone() for _ in range(8)]
    for n, one in enumerate(drawn):
        assert abs(one.mean() - 0.5) < 4 / 12**0.5 / 1000**0.5
        assert not any(torch.equal(one, other) for other in drawn[:n])


@pytest.mark.parametrize("script", RUNS)
def test_a_step_does_not_wait_for_the_device(script, cuda):
    _, step = captured_step(script, cuda)
    losses = torch.zeros(8, device=cuda)
    for number in range(5):
        step(torch.arange(32, device=cuda), number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, index in zip(range(8), mnist.batches(64, 8, cuda)):
            returned = step(index.repeat(4), number)
            losses[number] = (returned[0] if isinstance(returned, tuple) else returned).sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")
