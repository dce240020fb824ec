"""Networks from outside: made by a factory, and told from others of the same weights by what they do."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.evaluation.external import behavior, identity, load_network

IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3


class _Through(torch.autograd.Function):
    """The same image, another gradient."""

    sign = 1.0

    @staticmethod
    def forward(ctx, image: Tensor) -> Tensor:
        return image.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Through.sign * grad


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.last = nn.Linear(16, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(_Through.apply(image).flatten(1))


def test_the_same_network_says_the_same_and_a_repaired_gradient_another_thing(monkeypatch):
    assert behavior(Net(), IMAGES, LABELS) == behavior(Net(), IMAGES, LABELS)
    right = behavior(Net(), IMAGES, LABELS)
    monkeypatch.setattr(_Through, "sign", -1.0)
    assert behavior(Net(), IMAGES, LABELS) != right


def test_logits_that_changed_places_are_others():
    class Turned(Net):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image)[:, [1, 2, 0]]

    assert behavior(Turned(), IMAGES, LABELS) != behavior(Net(), IMAGES, LABELS)


def test_classes_beyond_a_byte_are_told_apart():
    """In a byte, class 257 would be class 1."""

    class Constant(Net):
        def __init__(self, named: int) -> None:
            super().__init__(300)
            self.named = named

        def forward(self, image: Tensor) -> Tensor:
            logits = 0 * super().forward(image)
            logits[:, self.named] += 1
            return logits

    first, other = (behavior(Constant(named), IMAGES, LABELS).split("classes ")[1] for named in (1, 257))
    assert first != other


def test_code_and_origin_tell_networks_apart_and_addresses_do_not():
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.activation = object()

        def extra_repr(self) -> str:
            return f"activation={self.activation!r}"

    one, other = Named(), Named()
    assert repr(one) != repr(other)
    assert re.search("at 0x", repr(one))
    known = identity(one, "nets:make", IMAGES, LABELS)
    assert identity(other, "nets:make", IMAGES, LABELS) == known
    assert known.keys() == {"origin", "structure", "behavior"}
    for changed in (
        identity(one, "nets:other", IMAGES, LABELS),
        identity(Net(), "nets:make", IMAGES, LABELS),
    ):
        assert changed != known
        assert changed["behavior"] == known["behavior"]


def test_the_factory_is_called_and_its_faults_are_the_flags(tmp_path, monkeypatch):
    (tmp_path / "nets_from_outside.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(4 * in_channels, num_classes))\n"
        "text = 'no network'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_from_outside", raising=False)
    theirs = nn.Sequential(nn.Flatten(), nn.Linear(8, 5))
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    net, notes = load_network("nets_from_outside:make", tmp_path / "w.pt", num_classes=5, in_channels=2)
    assert notes == []
    assert all(torch.equal(net.state_dict()[k], v) for k, v in theirs.state_dict().items())
    assert not net.training
    for wrong in ("nets_from_outside:text", "nets_from_outside:none", "no_such_module:make", "make"):
        with pytest.raises(SettingError, match=r"^--model: got"):
            load_network(wrong, tmp_path / "w.pt", num_classes=5, in_channels=2)
