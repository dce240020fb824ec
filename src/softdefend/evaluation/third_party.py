"""Networks that were not trained here: a factory of the user's, and weights in a file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.weight_files import load_weights_file
from softdefend.models.factory import from_user


def load_network(
    factory: str, weights: Path, *, num_classes: int, in_channels: int
) -> tuple[nn.Module, list[str]]:
    """The network that ``factory`` makes, with the weights of a file, in eval mode on the CPU.

    Args:
        factory: ``package.module:function``; it returns an ``nn.Module`` that maps images in [0, 1] to
            logits, and is passed ``num_classes`` and ``in_channels`` as far as it accepts them.
        weights: safetensors, or a torch file.
        num_classes, in_channels: of the data.

    Returns:
        The network, and what had to be done to the weights' names, in words.

    Raises:
        SettingError: no such factory, or weights that cannot be read or do not fit.
    """
    try:
        net = from_user(factory, num_classes, in_channels)
    except SettingError as error:
        raise SettingError("--model", error.given, error.accepted) from error
    return net.eval(), load_weights_file(net, weights)
