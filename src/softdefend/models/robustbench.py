"""The networks of RobustBench's checkpoints, and the names that their weights have there.

Read from RobustBench/robustbench (commit 78fcc9e): ``model_zoo/architectures/`` and ``utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.models.deepmind import STATISTICS, Activation, DeepMindPreActResNet18, DeepMindWideResNet
from softdefend.models.layers import Activation as ActivationName
from softdefend.models.layers import conv, global_average
from softdefend.models.normalization import Normalize
from softdefend.models.preact_resnet import PreActResNet18
from softdefend.models.resnet import ResNet18
from softdefend.models.wide_resnet import WideResNet

ACCEPTED = (
    "WideResNet-DEPTH-WIDTH such as WideResNet-28-10, ResNet-18 or PreActResNet-18; with -SiLU behind it for "
    "that activation, in DeepMind's layout -SiLU or -ReLU"
)

CALLED = {
    "resnet18": "ResNet-18",
    "preact_resnet18": "PreActResNet-18",
    "wrn28_10": "WideResNet-28-10",
    "wrn34_10": "WideResNet-34-10",
}
"""Built-in networks as RobustBench's tables call them."""

STATISTICS_NAMES = {"mu": "sigma", "mean": "std"}
"""Names of a normalization's mean, and of the standard deviation that belongs to it."""

UNUSED = ("sub_block1",)
"""Parts that some of its networks have and no forward uses (``WideResNet(sub_block1=True)``)."""

_NAMED = re.compile(r"(WideResNet-(\d+)-(\d+)|ResNet-18|PreActResNet-18)(?:-(ReLU|SiLU))?")
_ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "silu": F.silu}
_MOST = 256
"""Depth and width: more is no network that anybody has trained."""


@dataclass(frozen=True)
class Layout:
    """One way in which weights of an architecture are saved.

    Attributes:
        build: makes the network for (classes, channels), which takes normalized images.
        part: of the names that only this layout has.
        statistics: mean and standard deviation that its code normalizes by, by the number of classes; of
            other layouts the file says them, or nothing normalizes.
    """

    build: Callable[[int, int], nn.Module]
    part: str
    statistics: Mapping[int, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)


def choose_layout(architecture: str, names: Iterable[str]) -> Layout:
    """The layout of an architecture that weights by these names have.

    Args:
        architecture: as RobustBench's tables call it; see :data:`ACCEPTED`.
        names: of the weights, with any prefix.

    Raises:
        SettingError: an unknown architecture, or one whose activation neither name nor weights say.
    """
    parts = {part for name in names for part in name.split(".")}
    known = _layouts(architecture)
    theirs = "conv_2d" if architecture.startswith("PreAct") else "init_conv"
    if theirs in parts and all(layout.part != theirs for layout in known):
        given = f"{architecture} for weights in DeepMind's layout, which do not say their activation"
        accepted = f"{architecture}-SiLU (as all on RobustBench) or {architecture}-ReLU"
        raise SettingError("--architecture", given, accepted)
    return next((layout for layout in known if layout.part in parts), known[-1])


def _layouts(architecture: str) -> list[Layout]:
    """Those that an architecture is saved in; without a sign of another, the last."""
    match = _NAMED.fullmatch(architecture)
    if not match:
        raise SettingError("--architecture", repr(architecture), ACCEPTED)
    base, named = match[1], match[4]
    activation: ActivationName = "silu" if named == "SiLU" else "relu"
    theirs = _ACTIVATIONS[activation]
    if base == "ResNet-18":
        return [Layout(partial(ResNet18, activation=activation), "layer4")]
    if base == "PreActResNet-18":
        preact = Layout(partial(DeepMindPreActResNet18, activation=theirs), "conv_2d", STATISTICS)
        own = Layout(partial(PreActResNet18, activation=activation), "bn")
        bare = Layout(BarePreActResNet18, "layer4")
        return [*([preact] if named else []), own, *([] if named == "SiLU" else [bare])]
    depth, widen = int(match[2]), int(match[3])
    if depth % 6 != 4 or not 10 <= depth <= _MOST or not 1 <= widen <= _MOST:
        raise SettingError("--architecture", architecture, "a depth of 6 n + 4, such as 28, 34 or 70")
    wide = partial(DeepMindWideResNet, depth=depth, widen=widen, activation=theirs)
    usual = partial(WideResNet, depth=depth, widen=widen, activation=activation)
    return [*([Layout(wide, "init_conv", STATISTICS)] if named else []), Layout(usual, "block1")]


def names_there(net: nn.Module) -> dict[str, str]:
    """What RobustBench calls the weights of a network, by this package's name; empty where it has no other.

    Args:
        net: a network of this package, bare or behind its normalization.
    """
    if isinstance(net, nn.Sequential) and len(net) == 2 and isinstance(net[0], Normalize):
        own, (first, inner) = names_there(net[1]), dict(net.named_children())
        weights = {f"{inner}.{name}": there for name, there in own.items()}
        return {f"{first}.mean": "mu", f"{first}.std": "sigma", **weights} if own else {}
    rules: dict[type[nn.Module], list[tuple[str, str]]] = {
        WideResNet: [(r"stem\.", "conv1."), (r"bn\.", "bn1."), (r"linear\.", "fc.")],
        ResNet18: [(r"stem\.0\.", "conv1."), (r"stem\.1\.", "bn1.")],
        PreActResNet18: [(r"stem\.", "conv1.")],
    }
    if type(net) not in rules:
        return {}
    renamed = {}
    for name in net.state_dict():
        there = _block_there(net, name)
        for pattern, word in rules[type(net)]:
            there = re.sub(f"^{pattern}", word, there)
        renamed[name] = there
    return renamed


def _block_there(net: nn.Module, name: str) -> str:
    """The name of a weight in a block: blocks are counted anew in each stage there."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if not match:
        return name
    number, rest = int(match[1]), match[2]
    if isinstance(net, WideResNet):
        stage, place = divmod(number, len(net.blocks) // 3)
        return f"block{stage + 1}.layer.{place}.{rest.replace('shortcut.', 'convShortcut.')}"
    stage, place = divmod(number, 2)
    if isinstance(net, PreActResNet18):
        rest = rest.replace("shortcut.", "shortcut.0.")
    return f"layer{stage + 1}.{place}.{rest}"


class _BarePreActBlock(nn.Module):
    """``conv(relu(bn(conv(relu(bn(x)))))) + shortcut(x)``; the shortcut is of x before its BatchNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        added: Tensor = self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)
        return added


class BarePreActResNet18(nn.Module):
    """PreActResNet-18 without a last BatchNorm, as in the weights of Wong et al. (arXiv 2001.03994) and of
    Andriushchenko and Flammarion (arXiv 2007.02617); 11,171,146 parameters for 10 classes.

    Args:
        num_classes: k, the length of the logits.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, 64)
        widths = [64, 64, 128, 256, 512]
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            first = _BarePreActBlock(inputs, outputs, 1 if number == 1 else 2)
            self.add_module(f"layer{number}", nn.Sequential(first, _BarePreActBlock(outputs, outputs, 1)))
        self.linear = nn.Linear(512, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b,c,h,w] -> logits [b,k]."""
        x = self.conv1(image)
        for number in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{number}")(x)
        logits: Tensor = self.linear(global_average(x))
        return logits
