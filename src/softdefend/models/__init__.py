"""Networks for small images. They take pixels in [0, 1] and normalize in their first layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.hints import check_fields
from softdefend.models.factory import (
    from_timm,
    from_user,
    has_pretrained_weights,
    is_own,
    statistics_of_weights,
)
from softdefend.models.layers import Activation, init_kaiming
from softdefend.models.logits import check_logits
from softdefend.models.normalization import Normalize, normalize
from softdefend.models.preact_resnet import PreActResNet18
from softdefend.models.pretrained import load_pretrained
from softdefend.models.resnet import ResNet18
from softdefend.models.small_cnn import SmallCNN
from softdefend.models.wide_resnet import WideResNet

__all__ = ["NAMES", "NetSettings", "Normalize", "build", "check_logits", "normalize"]

_RESIDUAL: dict[str, Callable[..., nn.Module]] = {
    "resnet18": ResNet18,
    "preact_resnet18": PreActResNet18,
    "wrn28_10": partial(WideResNet, depth=28, widen=10),
    "wrn34_10": partial(WideResNet, depth=34, widen=10),
}

NAMES: tuple[str, ...] = ("small_cnn", *_RESIDUAL)
"""The built-in networks; ``timm:NAME`` and ``module:function`` are accepted beside them."""

Init = Literal["own", "kaiming"]


@dataclass(frozen=True)
class NetSettings:
    """The network to train."""

    name: str = "resnet18"
    """small_cnn, resnet18, preact_resnet18, wrn28_10, wrn34_10, timm:NAME (where timm is installed; with .TAG
    behind it pretrained weights), or your own factory as package.module:function."""

    pretrained: str | None = None
    """Weights to begin with, for fine-tuning: timm (those that timm has for timm:NAME), or a file of weights
    (safetensors, or a state dict written by torch.save). A last layer for another number of classes is drawn
    anew. Fresh weights when null."""

    width: int | None = None
    """Channels of the first layer; for small_cnn only (default 32)."""

    init: Init = "own"
    """How convolutions of a built-in network start: own (as the code that each is known from has it: torch's
    uniform draw in the ResNets, kaiming in the others) or kaiming (normal, fan-out)."""

    activation: Activation = "relu"
    """What stands between the layers of a built-in network: relu or silu (x times its sigmoid, also called
    swish)."""

    normalize: bool | None = None
    """Put a layer in front that subtracts the training images' mean and divides by their standard deviation
    (of pretrained weights: by their own). null: true for built-in networks and timm's, false for your own
    factory, which takes pixels in [0, 1] here as in softdefend evaluate --model."""

    def __post_init__(self) -> None:
        check_fields(self, "net")

        if self.pretrained == "timm" and not self.name.startswith("timm:"):
            accepted = "timm with net.name timm:NAME, the path of a file of weights, or null"
            raise SettingError("net.pretrained", f"timm with net.name {self.name}", accepted)

    @property
    def asks_timm(self) -> bool:
        """Whether the network begins with weights of timm's."""
        timm = self.name.removeprefix("timm:")
        return timm != self.name and (self.pretrained == "timm" or has_pretrained_weights(timm))

    @property
    def normalizes(self) -> bool:
        """What ``normalize`` comes to."""
        return not is_own(self.name) if self.normalize is None else self.normalize


def build(
    settings: NetSettings,
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: Sequence[int] | None = None,
    pretrained: bool = True,
) -> nn.Module:
    """Make a network that takes pixels; its weights are drawn from torch's global generator.

    Args:
        settings: which network, and whether its first layer normalizes.
        num_classes: k, the length of the logits.
        in_channels: channels c of the images.
        mean, std: of each channel, in units of pixels in [0, 1].
        image_size: height and width of the images, for networks that are made for one size.
        pretrained: whether to get the weights that ``net.pretrained`` or a name of timm's asks for.

    Returns:
        A module that maps images [b,c,h,w], float32 in [0, 1], to logits [b,k]; any h and w of 8 or more
        for the built-in networks.

    Raises:
        SettingError: an unknown name, a setting the network does not have, or statistics that do not fit.
    """
    if num_classes < 2:
        raise SettingError("num_classes", num_classes, "2 or more")
    if in_channels < 1:
        raise SettingError("in_channels", in_channels, "1 or more")
    if len(mean) != in_channels:
        given = f"{len(mean)} means for images with {in_channels} channels"
        raise SettingError("normalization", given, "one mean and one standard deviation per channel")
    net = _build_bare(settings, num_classes, in_channels, image_size, pretrained)
    if settings.init == "kaiming":
        init_kaiming(net)
    if settings.normalizes:
        if settings.asks_timm:
            mean, std = statistics_of_weights(net, in_channels) or (mean, std)
        net = normalize(net, mean, std)
    if pretrained and settings.pretrained not in (None, "timm"):
        load_pretrained(net, Path(settings.pretrained).expanduser(), num_classes)
    return net


def _build_bare(
    settings: NetSettings,
    num_classes: int,
    in_channels: int,
    image_size: Sequence[int] | None,
    pretrained: bool,
) -> nn.Module:
    name, width = settings.name, settings.width
    if name not in NAMES and ":" not in name:
        raise SettingError("net.name", name, f"{', '.join(NAMES)}, timm:NAME or module:function")
    for setting, kind, reason in (
        ("init", Init, "own; only built-in networks start otherwise"),
        ("activation", Activation, "relu; only built-in networks have another"),
    ):
        value, accepted = getattr(settings, setting), get_args(kind)
        if value not in accepted:
            raise SettingError(f"net.{setting}", repr(value), " or ".join(accepted))
        if value != accepted[0] and name not in NAMES:
            raise SettingError(f"net.{setting}", f"{value} with net.name {name}", reason)
    if name == "small_cnn":
        if width is not None and width < 1:
            raise SettingError("net.width", width, "1 or more")
        return SmallCNN(num_classes, in_channels, 32 if width is None else width, settings.activation)
    if width is not None:
        raise SettingError("net.width", f"{width} with net.name {name}", "null; only small_cnn has a width")
    if name in _RESIDUAL:
        return _RESIDUAL[name](num_classes, in_channels, activation=settings.activation)
    if name.startswith("timm:"):
        timm = name.removeprefix("timm:")
        wanted = pretrained and settings.asks_timm
        return from_timm(timm, num_classes, in_channels, image_size=image_size, pretrained=wanted)
    return from_user(name, num_classes, in_channels)
