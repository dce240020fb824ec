"""How much a network's own arithmetic moves its logits: checks of slopes and jumps allow for that much."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softdefend.evaluation.masking.probe import Probe

DRAWS = 4
MOST = 1.5
"""Most rounding that is allowed for, in units in the last place of the largest logit: what moves more is no
rounding. Honest networks in 16 bits stay below 1.2 (those of the audit's zoo, ResNet-18, WRN-28-4).
In float32, where they reach 2.6, other allowances are larger than this one."""


@torch.no_grad()
def measure_rounding(probe: Probe, images: Tensor) -> Tensor:
    """How far rounding moves the logits of ``images``, relative to the largest, [n]: the root mean square
    over the classes.

    It is what is left of the logits' change over moves of each pixel by up to two last places, once changes
    in proportion cancel (the second difference). Smaller moves leave most roundings as they were. Last places
    are those of the least precise numbers that the network computes with. Cost: nine forwards of each image.
    """
    unit = least_precision(probe)
    here = probe.logits(images)
    squares = []
    for number in range(DRAWS):
        generator = probe.generator("rounding", number)
        step = 4 * unit * (torch.rand(images.shape, generator=generator, device=images.device) - 0.5) * images
        moved = probe.logits(images + step) + probe.logits(images - step) - 2 * here
        squares.append(moved.square().mean(1) / 6)  # of the variance of one forward
    size = here.abs().amax(1)
    relative = (torch.stack(squares).mean(0).sqrt() / size).nan_to_num(0, 0, 0)
    return relative.clamp_max(MOST * unit)


def least_precision(probe: Probe) -> float:
    """The unit in the last place of 1 in the least precise floating point numbers that a forward makes."""
    seen = _Seen()
    with seen:
        probe.forward(probe.images[:2])
    return max(torch.finfo(dtype).eps for dtype in seen.dtypes)


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the kinds of floating point numbers that operations return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes = {torch.float32}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.dtypes.add(value.dtype)
        return result
