"""Networks from outside the package: timm's, and the user's own ``module:function``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.functions import describe_raised, find_function
from softdefend.models.logits import describe_error


def has_pretrained_weights(name: str) -> bool:
    """Whether a name of timm's asks for weights: ``resnet18.a1_in1k`` and ``hf-hub:OWNER/MODEL`` do."""
    return ":" in name or name.partition(".")[2] != ""


def from_timm(
    name: str,
    num_classes: int,
    in_channels: int,
    *,
    image_size: Sequence[int] | None = None,
    pretrained: bool | None = None,
) -> nn.Module:
    """Make a network by ``timm.create_model``, with logits of length ``num_classes``.

    Args:
        name: perhaps with a tag behind it (``resnet18.a1_in1k``), or from a hub.
        num_classes: the length of the logits.
        in_channels: channels of the images.
        image_size: height and width of the images. A network that is made for one size, such as a vision
            transformer, is made for this one.
        pretrained: whether to get the weights that timm has for the name; else the network has fresh ones.
            None: where the name has a tag or is from a hub.

    Raises:
        SettingError: timm is not installed, knows no such model, or cannot get its weights.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        accepted = "a built-in network, or install timm: pip install 'softdefend[timm]'"
        raise SettingError("net.name", f"timm:{name} without timm", accepted) from error
    except Exception as error:  # it imports torchvision, which fails in any way where it does not fit torch
        given = f"timm:{name}, while timm cannot be imported ({error})"
        raise SettingError("net.name", given, "a timm and a torchvision that fit this torch") from error
    wanted = has_pretrained_weights(name) if pretrained is None else pretrained
    size: dict[str, Any] = {}
    try:
        known = timm.get_pretrained_cfg(name) if hasattr(timm, "get_pretrained_cfg") else None
        if image_size is not None and getattr(known, "fixed_input_size", False):
            size = {"img_size": tuple(image_size)}
        net: nn.Module = timm.create_model(
            name, pretrained=wanted, num_classes=num_classes, in_chans=in_channels, **size
        )
    except (Exception, SystemExit) as error:  # of somebody else's code, and of the network
        accepted = "timm:NAME with a NAME timm can build"
        if wanted:
            accepted += " and whose weights it can get; NAME without .TAG has fresh weights"
        raise SettingError("net.name", f"timm:{name} ({describe_error(error)})", accepted) from error
    return net


def statistics_of_weights(net: nn.Module, channels: int) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and standard deviation that a pretrained network of timm's was normalized by; None if it says none
    for so many channels."""
    known = getattr(net, "pretrained_cfg", None)
    mean, std = (known.get(name) for name in ("mean", "std")) if isinstance(known, Mapping) else (None, None)
    return (mean, std) if mean and std and len(mean) == len(std) == channels else None


def is_own(name: str) -> bool:
    """Whether a network's name is that of a user's factory."""
    return ":" in name and not name.startswith("timm:")


def from_user(path: str, num_classes: int, in_channels: int) -> nn.Module:
    """Make a network by the user's factory, written ``package.module:function``.

    The module is looked for in the working directory too. ``num_classes`` and ``in_channels`` are passed as
    keywords as far as the function accepts them.

    Raises:
        SettingError: no such module or function, a function that asks for other arguments, or a result that
            is not an ``nn.Module``; an error inside the user's code, with its file and line.
    """
    factory = find_function("net.name", path)
    offered = {"num_classes": num_classes, "in_channels": in_channels}
    keywords = _keywords(path, factory, offered)
    try:
        net = factory(**keywords)
    except (Exception, SystemExit) as error:
        raise SettingError(
            "net.name", f"{path}, which raised {describe_raised(error)}", "a function that runs"
        ) from error
    if not isinstance(net, nn.Module):
        given = f"{path}, which returned {type(net).__name__}"
        raise SettingError("net.name", given, "a function that returns a torch.nn.Module")
    return net


def _keywords(path: str, factory: Callable[..., Any], offered: dict[str, int]) -> dict[str, int]:
    """Those of the offered keywords that the factory takes."""
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some functions written in C have no signature to read
        return {}
    parameters = signature.parameters.values()
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    arguments = {name: value for name, value in offered.items() if everything or name in by_keyword}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        accepted = "a function whose only required arguments are num_classes and in_channels"
        raise SettingError("net.name", f"{path}{signature} ({error})", accepted) from error
    return arguments
