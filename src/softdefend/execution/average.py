"""An average of a network over its training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from softdefend.execution.network_mode import frozen_copy

Pair = tuple[Tensor, Tensor]
"""A tensor of the average, and the live one that it follows."""


class NetworkAverage:
    """A frozen copy of a network in eval mode that follows its weights and buffers.

    Averaged are weights, and those saved buffers that are numbers with fractions. All other buffers are
    copied: how many batches BatchNorm has seen, or a mask that is no part of the weights.

    ``torch.optim.swa_utils.AveragedModel`` does much the same, but copies its count to the device at every
    update, which makes the host wait for the whole step on a GPU.

    Args:
        live: the network that is trained.
        buffers: whether to average any; if not, all are copied.
    """

    def __init__(self, live: nn.Module, *, buffers: bool = True) -> None:
        self.net, self._live = frozen_copy(live), live
        saved = set(live.state_dict()) if buffers else set()
        self._averaged = saved | {name for name, _ in live.named_parameters(remove_duplicate=False)}

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Average with weight ``decay``, in [0, 1], of the old values; 0 copies the live ones."""
        averaged, copied = list[Pair](), list[Pair]()
        # Looked up at every step: a network may give a buffer's name to another tensor.
        live = dict(_tensors(self._live))
        for name, own in _distinct(_tensors(self.net)).items():
            fractions = name in self._averaged and own.is_floating_point()
            (averaged if fractions and decay > 0 else copied).append((own, live[name]))
        if averaged:
            torch._foreach_lerp_(*_columns(averaged), 1 - decay)
        if copied:
            torch._foreach_copy_(*_columns(copied))


def _columns(pairs: list[Pair]) -> tuple[list[Tensor], list[Tensor]]:
    return [own for own, _ in pairs], [live for _, live in pairs]


def _tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers by name; one with two names twice."""
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)


def _distinct(named: Iterator[tuple[str, Tensor]]) -> Mapping[str, Tensor]:
    """Each tensor once, by its first name; also where two share their memory, as in a scripted network."""
    found: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in named:
        found.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    return dict(found.values())
