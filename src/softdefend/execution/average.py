"""An average of a network over its training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from softdefend.execution.network_mode import frozen_copy

Pair = tuple[Tensor, Tensor]
"""A tensor of the average, and the live one that it follows."""


class NetworkAverage:
    """A frozen copy of a network in eval mode that follows its weights and buffers.

    ``torch.optim.swa_utils.AveragedModel`` does the same, but copies its count to the device at every update,
    which makes the host wait for the whole step on a GPU.

    Args:
        live: the network that is trained. It changes in place.
        buffers: average buffers that are numbers with fractions too; if not, copy all.
    """

    def __init__(self, live: nn.Module, *, buffers: bool = True) -> None:
        self.net = frozen_copy(live)
        # Everything in a network changes in place, so its tensors can be looked up once.
        weights = zip(self.net.parameters(), live.parameters(), strict=True)
        others = zip(self.net.buffers(), live.buffers(), strict=True)
        averaged, copied = ((weights, others), ()) if buffers else ((weights,), others)
        found = _distinct(itertools.chain(*averaged))
        self._averaged = [pair for pair in found if pair[0].is_floating_point()]
        # Else how many batches BatchNorm has seen.
        whole = [pair for pair in found if not pair[0].is_floating_point()]
        self._copied = _distinct([*whole, *copied])

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Average with weight ``decay``, in [0, 1], of the old values; 0 copies the live ones."""
        for pairs, copies in ((self._averaged, decay == 0), (self._copied, True)):
            if not pairs:
                continue
            averages, live = map(list, zip(*pairs, strict=True))
            if copies:
                torch._foreach_copy_(averages, live)
            else:
                torch._foreach_lerp_(averages, live, 1 - decay)


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Each tensor once, also one that stands under two names."""
    return list({(ours.data_ptr(), ours.shape): (ours, live) for ours, live in pairs}.values())
