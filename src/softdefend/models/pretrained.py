"""Weights to begin with, from a file that may be of a network for other classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError
from softdefend.core.weight_files import load_weights_file, read_weights

_log = logging.getLogger(__name__)


def load_pretrained(net: nn.Module, path: Path, num_classes: int) -> None:
    """Put the weights of a file into a network, all but a last layer for another number of classes.

    Args:
        net: has the last layer that is kept then.
        path: safetensors, or a state dict written by ``torch.save``, of the same network.
        num_classes: of ``net``.

    Raises:
        SettingError: a file that cannot be read, or of another network.
    """
    try:
        content = read_weights(path)
        head = _last_layer(net, num_classes)
        replaced: dict[str, int] = {}
        notes = load_weights_file(net, path, _with_own(content, head, replaced))
    except SettingError as error:
        raise SettingError("net.pretrained", f"{error.setting} ({error.given})", error.accepted) from error
    if replaced:
        others = ", ".join(sorted({str(count) for count in replaced.values()}))
        notes = [*notes, f"{' and '.join(sorted(replaced))} of {others} classes drawn anew for {num_classes}"]
    _log.info("; ".join([f"begins with the weights in {path} (sha256 {file_digest(path)})", *notes]))


def _last_layer(net: nn.Module, num_classes: int) -> dict[str, Tensor]:
    """Weight and bias of the last layer whose output has one number per class, by their names without those
    of wrappers."""
    fitting = [
        name
        for name, module in net.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and len(module.weight) == num_classes
    ]
    if not fitting:
        return {}
    layer = net.get_submodule(fitting[-1])
    short = fitting[-1].removeprefix("net.")
    return {f"{short}.{name}": value.detach() for name, value in layer.named_parameters(recurse=False)}


def _with_own(
    content: Mapping[str, Any], head: Mapping[str, Tensor], replaced: dict[str, int]
) -> dict[str, Any]:
    """The content of a file with a network's own values where only the number of classes differs."""
    result: dict[str, Any] = {}
    for name, value in content.items():
        result[name] = value
        if isinstance(value, Mapping):
            result[name] = _with_own(value, head, replaced)
        own = next((part for part in head if f".{name}".endswith(f".{part}")), None)
        if own is not None and isinstance(value, Tensor) and _differs_in_classes(value, head[own]):
            result[name] = head[own].clone()
            replaced[own] = len(value)
    return result


def _differs_in_classes(value: Tensor, own: Tensor) -> bool:
    return value.ndim == own.ndim and value.shape[1:] == own.shape[1:] and len(value) != len(own)
