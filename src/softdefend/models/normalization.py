"""Per-channel normalization as the first layer of a network, so that attacks work on pixels."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError


class Normalize(nn.Module):
    """``(image - mean) / std`` per channel.

    The statistics are persistent buffers: they are saved with the weights, so that a network read from a
    file cannot be run on pixels of the wrong scale, and they are never trained.

    Args:
        mean, std: one number per channel, in units of pixels in [0, 1].

    Raises:
        SettingError: the two differ in length or are empty, a number is not finite, a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std):
            given = f"{len(mean)} means and {len(std)} standard deviations"
            raise SettingError("normalization", given, "one mean and one standard deviation per channel")
        if not all(math.isfinite(value) for value in mean):
            raise SettingError("normalization mean", list(mean), "finite numbers")
        if not all(math.isfinite(value) and value > 0 for value in std):
            accepted = "positive finite numbers (a channel that never varies has std 0: use 1 for it)"
            raise SettingError("normalization std", list(std), accepted)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b,c,h,w] in [0, 1] -> the same shape, about zero mean and unit variance."""
        return (image - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def normalize(net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """Put :class:`Normalize` before ``net``; the two layers are named ``normalize`` and ``net``.

    Args:
        net: takes normalized images [b, c, h, w].
        mean, std: one number per channel, in units of pixels in [0, 1].

    Returns:
        A network that takes pixels in [0, 1].

    Raises:
        SettingError: statistics that :class:`Normalize` refuses.
    """
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), net=net))
