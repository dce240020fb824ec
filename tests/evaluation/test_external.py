"""Networks from outside: made by a factory, and told from others of the same weights by what they do."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.evaluation.external import behavior, identity, load_network
from softdefend.models import NetSettings, build
from softdefend.models.small_cnn import SmallCNN

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
    of_data = {"num_classes": 5, "mean": [0.5, 0.5], "std": [0.2, 0.2]}
    net, notes = load_network(NetSettings("nets_from_outside:make"), tmp_path / "w.pt", **of_data)
    assert notes == []
    assert all(torch.equal(net.state_dict()[k], v) for k, v in theirs.state_dict().items())
    assert not net.training
    for wrong in ("nets_from_outside:text", "nets_from_outside:none", "no_such_module:make", "make"):
        with pytest.raises(SettingError, match=r"^--model: got"):
            load_network(NetSettings(wrong), tmp_path / "w.pt", **of_data)
    with pytest.raises(SettingError, match=r"^--net\.width: got 3 with net.name resnet18"):
        load_network(NetSettings("resnet18", width=3), tmp_path / "w.pt", **of_data)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "timm:something"])
def test_names_make_the_network_that_training_makes(name, tmp_path, monkeypatch):
    """With normalization by the file's statistics, or by the data's where the file holds the bare network."""
    asked = []

    def create_model(name: str, **settings: object) -> nn.Module:
        asked.append(name)
        return SmallCNN(settings["num_classes"], settings["in_chans"], 4)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    settings, of_data = NetSettings(name), {"num_classes": 3, "mean": [0.4], "std": [0.2]}
    trained = build(settings, in_channels=1, num_classes=3, mean=[0.1], std=[0.3]).eval()
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    torch.save({"state_dict": trained.get_submodule("net").state_dict()}, tmp_path / "bare.pt")
    image = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        net, _ = load_network(settings, tmp_path / "trained.pt", **of_data)
        assert torch.equal(net(image), trained(image))
        net, notes = load_network(settings, tmp_path / "bare.pt", **of_data)
        torch.testing.assert_close(net(image), trained.get_submodule("net")((image - 0.4) / 0.2))
    assert notes[-1] == "kept the network's own normalize.mean, normalize.std"
    assert set(asked) == ({"something"} if name.startswith("timm") else set())
