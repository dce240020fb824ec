"""Backward passes of several processes, each against one message after it; a fault ends with its traceback.

Run as ``python buckets_of_processes.py CHECK...``.
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import sys
import warnings
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from grid_of_processes import train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from softdefend.core.errors import LostProcessError
from softdefend.core.processes import Processes
from softdefend.core.rng import stream
from softdefend.execution.batch_norm import synchronize
from softdefend.execution.engine import Engine, RuntimeSettings
from softdefend.training import buckets, step
from softdefend.training.buckets import Buckets

DEVICE = os.environ.get("GRID_DEVICE", "cpu")


class Counted(Processes):
    """Counts the messages that have started."""

    started = 0

    def begin_sum_(self, tensor: Tensor) -> Callable[[], None]:
        self.started += 1
        return super().begin_sum_(tensor)


class Naive(Buckets):
    """One message after the pass."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        every = [parameter for bucket in self.buckets for parameter in bucket]
        self.processes.average_([parameter.grad for parameter in every if parameter.grad is not None])


class Net(nn.Module):
    """Five layers in a row, the fourth idle, and how the second is run."""

    def __init__(self) -> None:
        super().__init__()
        draw = stream(0, "weights")
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.idle, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.run = lambda layer, image: layer(image)
        self.double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 3

    def forward(self, image: Tensor) -> Tensor:
        return self.last(torch.tanh(self.third(self.run(self.second, torch.tanh(self.first(image))))))


class Mixed(nn.Module):
    """Convolutions in another memory format, one of another type."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 4, 2).double(), nn.Conv2d(4, 4, 2)
        self.last = nn.Linear(4, 4).double()
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(image.view(-1, 1, 2, 3)))
        return self.last(self.second(F.pad(hidden.float(), (0, 0, 0, 1))).double().mean((2, 3)))


class Gone(torch.autograd.Function):
    """Has no gradient for what it is given."""

    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, slope):
        return None


def cost(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % 4)


def once(net: nn.Module, image: Tensor) -> list[Tensor]:
    return [cost(net(image))]


def twice(net: nn.Module, image: Tensor) -> list[Tensor]:
    """As TRADES and MART do."""
    clean, moved = net(image), net(image + 0.1 * image.sign())
    return [cost(clean) + F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="batchmean")]


def halves(net: nn.Module, image: Tensor) -> list[Tensor]:
    """Two parts of a batch, the first through the idle layer too."""
    one, other = image.chunk(2)
    return [cost(net(one)) + net.idle(net.first(one)).square().mean(), cost(net(other))]


def without_gradient(net: nn.Module, image: Tensor) -> list[Tensor]:
    hidden = F.linear(net.first(image), Gone.apply(net.idle.weight))
    return [cost(net(image)) + hidden.mean()]


def tied(net: nn.Module, image: Tensor) -> list[Tensor]:
    return [cost(net.last(net.second(torch.tanh(net.second(net.first(image))))))]


def reentrant(layer: nn.Module, image: Tensor) -> Tensor:
    return checkpoint(layer, image, use_reentrant=True)


def recomputed(layer: nn.Module, image: Tensor) -> Tensor:
    return checkpoint(layer, image, use_reentrant=False)


def running(how: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = Net()
        net.run = how
        return net

    return build


def normalized() -> nn.Module:
    net = Net()
    net.third = nn.Sequential(net.third, nn.BatchNorm1d(8).double())
    return net


def frozen_in_part() -> nn.Module:
    net = Net()
    net.third.requires_grad_(False)
    net.first.bias.requires_grad_(False)
    return net


CASES = {
    "one forward": (Net, once),
    "frozen parameters": (frozen_in_part, twice),
    "two forwards": (Net, twice),
    "parts": (Net, halves),
    "no gradient": (Net, without_gradient),
    "a layer used twice": (Net, tied),
    "synchronized normalization": (normalized, twice),
    "recomputed": (running(recomputed), twice),
    "reentrant": (running(reentrant), twice),
    "types and formats": (Mixed, once),
}


def gradients(net: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in net.parameters()]


def images(ours: Processes, number: int = 0) -> Tensor:
    """Other ones in each process."""
    return torch.randn(6, 6, generator=stream(number, f"{ours.rank}"), dtype=torch.float64).to(DEVICE)


def check_averages(ours: Processes) -> None:
    for name, (build, losses) in CASES.items():
        net = build().to(DEVICE)
        if name == "synchronized normalization":
            synchronize(net, ours)
        alone = copy.deepcopy(net)
        averaging = Buckets(ours, list(net.parameters()))
        for number in range(2):
            net.zero_grad(), alone.zero_grad()
            for loss in losses(alone, images(ours, number)):
                loss.backward()
            *parts, last = losses(net, images(ours, number))
            for loss in parts:
                loss.backward()
            averaging.backward(last)
            own = gradients(alone)
            for found, mine in zip(gradients(net), own, strict=True):
                assert (found is None) == (mine is None), name
                if mine is not None:
                    torch.testing.assert_close(
                        found, ours.mean(mine.contiguous()), rtol=0, atol=1e-12, msg=name
                    )
            assert any(not torch.allclose(ours.mean(mine), mine) for mine in own if mine is not None), name
            plain = [None if found is None else found.tolist() for found in gradients(net)]
            assert ours.tell(plain) == [plain] * ours.size, name
            assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())


def started(counted: Counted, net: Net, losses, image: Tensor) -> list[int]:
    """How many messages have started whenever the first layer's gradient is known."""
    seen: list[int] = []
    averaging, counted.started = Buckets(counted, list(net.parameters())), 0
    watch = net.first.weight.register_hook(lambda slope: seen.append(counted.started))
    *parts, last = losses(net, image)
    for loss in parts:
        loss.backward()
    averaging.backward(last)
    watch.remove()
    return [*seen, counted.started]


class Branched(Net):
    """A network that goes through layers of the branches named in ``ways`` alone."""

    ways: tuple[str, ...] = ()

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(image))
        for way in self.ways:
            hidden = hidden + torch.tanh(getattr(self, way)(hidden))
        return self.last(hidden)


NOWHERE: tuple[tuple[str, ...], ...] = ((), ())
EVERYWHERE = (("second", "third", "idle"), ("second", "third", "idle"))
WAYS = {
    "in one process": [(("second",), ("third",)), (("second", "third"), ()), (("third",), ("third",))],
    "in one process later": [NOWHERE, ((), ("second", "third")), NOWHERE, (("third",), ("second",))],
    "in all and then in one": [EVERYWHERE, (("idle",), ()), NOWHERE, EVERYWHERE],
    "in all later": [NOWHERE, EVERYWHERE, NOWHERE, EVERYWHERE],
}
"""The branches of the first and of the second process, pass by pass."""


def check_branches(ours: Processes) -> None:
    """A missing gradient counts as zero where the other process has one; with none anywhere there is none."""
    for limit, (name, passes) in itertools.product((256, 2**20), WAYS.items()):
        buckets.LIMIT = limit
        net = Branched().to(DEVICE)
        alone = copy.deepcopy(net)
        averaging = Buckets(ours, list(net.parameters()))
        for number, ways in enumerate(passes):
            net.ways = alone.ways = ways[ours.rank]
            net.zero_grad(), alone.zero_grad()
            cost(alone(images(ours, number))).backward()
            averaging.backward(cost(net(images(ours, number))))
            assert_means(ours, net, alone, f"{name}, pass {number}, buckets of {limit}")
    buckets.LIMIT = 256


def check_frozen_in_turn(ours: Processes) -> None:
    """Layers that a rule trains in turn, each a bucket of its own."""
    net = Branched().to(DEVICE)
    alone, averaging = copy.deepcopy(net), Buckets(ours, list(net.parameters()))
    turns = [("last",), ("first", "second"), ("second",), ("first", "last")]
    for number, turn in enumerate(turns):
        for one in (net, alone):
            one.zero_grad()
            one.ways = ("second",) if number else ()
            for name, parameter in one.named_parameters():
                parameter.requires_grad_(name.startswith(turn))
        cost(alone(images(ours, number))).backward()
        averaging.backward(cost(net(images(ours, number))))
        assert_means(ours, net, alone, f"{turn}")


def assert_means(ours: Processes, net: nn.Module, alone: nn.Module, message: str) -> None:
    """The gradients of ``net`` are the means of those that ``alone`` has in each process."""
    for parameter, mine in zip(net.parameters(), gradients(alone), strict=True):
        everyone = ours.tell(None if mine is None else mine.cpu())
        known = [one for one in everyone if one is not None]
        assert (parameter.grad is None) == (not known), message
        if known:
            wanted = sum(known) / ours.size
            torch.testing.assert_close(parameter.grad.cpu(), wanted, rtol=0, atol=1e-12, msg=message)


def check_captured_branches(ours: Processes) -> None:
    """Each process records a way of its own."""
    net, image = Branched().to(DEVICE), images(ours)
    net.ways = (("second",), ("third",))[ours.rank]
    alone, averaging = copy.deepcopy(net), Buckets(ours, list(net.parameters()))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net.zero_grad()
            averaging.backward(cost(net(image)))
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        averaging.backward(cost(net(image)))
    for number in range(1, 3):
        image.copy_(images(ours, number))
        graph.replay()
        alone.zero_grad()
        cost(alone(image)).backward()
        assert_means(ours, net, alone, f"replay {number}")


class Sorted(nn.Module):
    """Sends shares of a batch through other layers if their first image is dark in the middle."""

    taken: ClassVar[list[tuple[str, ...]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branched()
        self.inner.first = nn.Linear(36, 8).double()

    def forward(self, image: Tensor) -> Tensor:
        self.inner.ways = ("second",) if float(image[0, 0, 3, 3].detach()) < 0.5 else ("third",)
        self.taken.append(self.inner.ways)
        return self.inner(image.double().flatten(1))


def check_branched_training(ours: Processes) -> None:
    """The processes go other ways, end alike, and both branches have been trained."""
    for names, settings in ((("Hard", "PGDAT", "Plain"), {}), (("SGLR", "TRADES", "AWP+EMA"), {})):
        Sorted.taken.clear()
        end = train(names, net=Sorted, **settings)
        one, other = ours.tell(Sorted.taken)
        assert one != other
        for key, value in end.items():
            for one in ours.tell(value):
                torch.testing.assert_close(one, value, rtol=0, atol=0, equal_nan=True, msg=key)
        start = Sorted().state_dict()
        for way in ("second", "third"):
            assert not torch.equal(end[f"net.inner.{way}.weight"].cpu(), start[f"inner.{way}.weight"]), way


def check_overlap(ours: Processes) -> None:
    """Weights and biases of each layer are a bucket; that of the first layer is the last."""
    counted, net = Counted(ours.rank, ours.size), Net().to(DEVICE)
    assert len(Buckets(counted, list(net.parameters())).buckets) == 5
    image = images(ours)
    assert started(counted, net, once, image) == [4, 5]
    net.zero_grad()
    assert started(counted, net, twice, image) == [4, 5]
    net.zero_grad()
    assert started(counted, net, halves, image) == [0, 4, 5]
    net.zero_grad()
    compiled = torch.compile(net, backend="aot_eager")
    assert started(counted, net, lambda net, image: once(compiled, image), image)[-1] == 5
    mine = copy.deepcopy(net)
    mine.zero_grad()
    once(mine, image)[0].backward()
    torch.testing.assert_close(net.first.weight.grad, ours.mean(mine.first.weight.grad), rtol=0, atol=1e-12)


RECIPES = [
    (("Hard", "TRADES", "Plain"), {}),
    (("SAT", "MART", "AWP"), {}),
    (("SGLR", "DAJAT", "AWP+EMA"), {}),
    (("Smooth", "MLCAT", "Plain"), {"optim": {"accumulate": 2, "clip": 0.1, "decay_all": False}}),
    (("Hard", "PGDAT", "EMA"), {"optim": {"name": "lion", "clip": 0.1, "lr": 0.003}}),
    (("ADR", "PGDAT", "Plain"), {"optim": {"name": "adamw", "accumulate": 2, "lr": 0.003}}),
]


def check_training(ours: Processes, capture: bool = False) -> None:
    """Twenty steps end as with one message after the backward pass."""
    for names, settings in RECIPES:
        ends = {}
        for kind in (Naive, Buckets):
            step.Buckets = kind
            ends[kind] = train(names, capture=capture, **copy.deepcopy(settings))
        for key, value in ends[Naive].items():
            message = f"{names} {key}"
            torch.testing.assert_close(
                ends[Buckets][key], value, rtol=0, atol=1e-12, equal_nan=True, msg=message
            )


def check_captured_training(ours: Processes) -> None:
    check_training(ours, capture=True)


def check_capture(ours: Processes) -> None:
    """A captured pass, replayed on other images."""
    counted, net = Counted(ours.rank, ours.size), normalized().to(DEVICE)
    synchronize(net, ours)
    alone, image = copy.deepcopy(net), images(ours)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net.zero_grad()
            started(counted, net, twice, image)
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        seen = started(counted, net, twice, image)
    assert seen == [4, 5]
    for number in range(1, 4):
        image.copy_(images(ours, number))
        graph.replay()
        alone.zero_grad()
        twice(alone, image)[0].backward()
        for found, mine in zip(gradients(net), gradients(alone), strict=True):
            assert (found is None) == (mine is None)
            if mine is not None:
                torch.testing.assert_close(found, ours.mean(mine.contiguous()), rtol=0, atol=1e-12)


def check_loss(ours: Processes) -> None:
    """The second process dies in the middle of a pass."""
    net = Net()
    if not ours.first:
        net.second.weight.register_hook(lambda slope: os._exit(0))
    with pytest.raises(LostProcessError):
        Buckets(ours, list(net.parameters())).backward(*once(net, images(ours)))


def check_loss_in_normalization(ours: Processes) -> None:
    """The second process dies before normalization's message of a pass."""
    net = normalized()
    synchronize(net, ours)
    if not ours.first:
        net.last.weight.register_hook(lambda slope: os._exit(0))
    buckets.LIMIT = 2**20  # one bucket, which is complete at the end
    with pytest.raises(LostProcessError, match="has ended"):
        Buckets(ours, list(net.parameters())).backward(*once(net, images(ours)))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())


class Reused(nn.Module):
    """Normalizes twice by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.norm(image)))


def check_reused_layer(ours: Processes) -> None:
    """Inductor, which saves copies, adds up the gradients that this process has, not sums over all."""
    image, scale = (torch.randn(2 * ours.size, 3, generator=stream(0, name)) for name in ("x", "scale"))
    whole = Reused()
    net = copy.deepcopy(whole)
    synchronize(net, ours)
    (whole(image) * scale).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (torch.compile(net)(ours.own(image)) * ours.own(scale)).sum().backward()
    for one, other in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.sum(one.grad), other.grad, rtol=1e-4, atol=1e-5)


class Planned(nn.Module):
    """A network for the images of the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = normalized()
        self.inner.first = nn.Linear(36, 8).double()

    def forward(self, image: Tensor) -> Tensor:
        return self.inner(image.double().flatten(1))


def check_loss_in_a_program(ours: Processes) -> None:
    """The second process dies before a compiled network's first message."""
    step._compiled = lambda net: torch.compile(net, backend="aot_eager", dynamic=False)
    body, made = step.TrainStep._body, []

    def run(self: step.TrainStep, *given: object) -> None:
        made.append(given)
        if len(made) == 3 and not ours.first:
            os._exit(0)
        body(self, *given)

    step.TrainStep._body = run
    warnings.filterwarnings("ignore", ".*should not be instantiated")  # torch's compiler does so
    with pytest.raises(LostProcessError, match="has ended"):
        train(("Hard", "PGDAT", "Plain"), net=Planned, compile=True)
    assert len(made) == 3


def main(checks: list[str]) -> None:
    buckets.LIMIT = 256  # a layer of Net
    engine = Engine(RuntimeSettings(device=DEVICE, precision="fp32", deterministic=True))
    with engine.training_numerics():
        for check in checks:
            globals()[f"check_{check}"](engine.processes)
    gc.collect()  # a group of processes that graphs know of cannot be left


if __name__ == "__main__":
    if DEVICE == "cpu":
        warnings.simplefilter("error")
    main(sys.argv[1:])
