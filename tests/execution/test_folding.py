"""Folded copies against the networks that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from softdefend.core.processes import Processes
from softdefend.execution import batch_norm
from softdefend.execution.folding import FoldedCopy
from softdefend.models import NetSettings, build


def network(name: str, **more) -> nn.Module:
    """In double precision, with weights and statistics as after training."""
    torch.manual_seed(0)
    net = build(NetSettings(name=name, **more), num_classes=5, in_channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    disturb(net)
    return net.double().eval()


@torch.no_grad()
def disturb(net: nn.Module) -> None:
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor))


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize(
    ("name", "left"),
    [("resnet18", 0), ("preact_resnet18", 9), ("small_cnn", 0)],
)
def test_a_copy_computes_the_same_with_fewer_layers(name, left):
    net, image = network(name), torch.rand(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    made = FoldedCopy(net)
    assert norms(made.net) == left
    assert len(made.pairs) == norms(net) - left
    for turn in range(2):
        wanted, found = net(image), made.net(image)
        assert (found - wanted).abs().max() < 1e-9 * wanted.abs().max()
        slopes = [torch.autograd.grad(logits[:, turn].sum(), image)[0] for logits in (wanted, found)]
        assert (slopes[1] - slopes[0]).abs().max() < 1e-9 * slopes[0].abs().max()
        disturb(net)
        assert not torch.allclose(made.net(image), net(image))
        places = [tensor.data_ptr() for tensor in made.net.parameters()]
        made.refresh()
        assert [tensor.data_ptr() for tensor in made.net.parameters()] == places


def test_layers_that_several_processes_train_together_are_folded_as_well(monkeypatch):
    monkeypatch.setattr(batch_norm, "_group", lambda: "0")
    net, image = network("small_cnn"), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    wanted = net(image)
    batch_norm.synchronize(net, Processes(0, 2))
    made = FoldedCopy(net)
    assert len(made.pairs) == norms(net) > 0
    torch.testing.assert_close(made.net(image), wanted)


class Noisy(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + torch.randn(1)


def shared() -> nn.Module:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    return nn.Sequential(conv, norm, conv, nn.ReLU())


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net[1].register_forward_hook(lambda module, given, out: out + 1)
    return net


def two_readers() -> nn.Module:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, image):
            out = self.conv(image)
            return self.norm(out) + out

    Net.__module__ = "torch.nn.test"
    return Net()


def branching() -> nn.Module:
    class Net(nn.Sequential):
        def forward(self, image):
            return super().forward(image if image.sum() > 0 else -image)

    Net.__module__ = "torch.nn.test"
    return Net(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    "net",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Noisy()),
        shared,
        hooked,
        two_readers,
        branching,
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)),
    ],
    ids=["random", "shared", "hooked", "two readers", "branching", "no statistics", "computed weight"],
)
def test_what_cannot_be_folded_is_copied(net):
    torch.manual_seed(0)
    net = net().eval()
    made = FoldedCopy(net)
    assert made.pairs == []
    image = torch.rand(2, 3, 4, 4)
    torch.manual_seed(1)
    wanted = net(image)
    torch.manual_seed(1)
    assert torch.equal(made.net(image), wanted)
