"""Whether training has diverged: a loss or weights that there is nothing left to learn from."""

from __future__ import annotations

import math

import torch
from torch import nn

TOO_FAR = 20.0
"""A mean loss this many times that of guessing, or of the first step, has diverged."""


def divergence(net: nn.Module, loss: float, first_loss: float | None, k: int) -> str | None:
    """How a run has diverged, in words; None where it has not. Reads the device.

    Args:
        net: what is trained.
        loss: mean of the epoch so far.
        first_loss: of the first step, which knows how much a recipe charges for guessing.
        k: number of classes.
    """
    limit = TOO_FAR * max(first_loss or 0.0, math.log(max(k, 2)))
    if not math.isfinite(loss) or loss > limit:
        return f"the loss is {loss:g}"
    if not torch.stack([p.detach().isfinite().all() for p in net.parameters()]).all():
        return "a weight is not finite"
    return None
