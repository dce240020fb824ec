"""Random numbers of a forward on a share of a batch: those that the whole batch would have drawn there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from softdefend.core.processes import Processes
from softdefend.core.threat import ThreatModel
from softdefend.execution.randomness import CallerRandomness

_NOISE = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
"""Functions that multiply their first argument by noise."""
_IN_PLACE = (Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, nn.init.trunc_normal_)
"""Functions that fill their first argument, as implementations of stochastic depth do."""
_LIKE = (torch.rand_like, torch.randn_like, F.alpha_dropout, F.feature_alpha_dropout)
"""Other functions whose result has the shape of their first argument."""


class WholeBatchDraws(TorchFunctionMode):
    """Dropout and its like take this process's rows of the whole batch's numbers.

    Each process has to have the same state of torch's global generator. Draws of other shapes than
    [share, ...] are not touched, and so are the same in every process.

    Args:
        processes: who have the other shares.
        share: images of a batch that this process has; a forward's m * share images are those of m views.
    """

    def __init__(self, processes: Processes, share: int) -> None:
        super().__init__()
        self.processes, self.share = processes, share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = args[0] if args else kwargs.get("input")
        if not (isinstance(given, Tensor) and given.ndim and len(given) and len(given) % self.share == 0):
            return func(*args, **kwargs)
        if func in _NOISE:
            rest = {**dict(zip(("p", "training", "inplace"), args[1:], strict=False)), **kwargs}
            rest = {**rest, "inplace": False}
            rest.pop("input", None)
            return given * self._own(func(self._whole(given).fill_(1), **rest), given)
        if func in _IN_PLACE:
            return given.copy_(self._own(func(self._whole(given), *args[1:], **kwargs), given))
        if func in _LIKE:
            whole = self._whole(given)
            for place, content in zip(self._views(whole, given), self._views(given, None), strict=True):
                place.copy_(content)
            kwargs.pop("input", None)
            return self._own(func(whole, *args[1:], **kwargs), given)
        return func(*args, **kwargs)

    def _whole(self, given: Tensor) -> Tensor:
        """Zeros for the whole batch, in the memory order of ``given``."""
        order = torch.contiguous_format
        if given.ndim == 4 and given.is_contiguous(memory_format=torch.channels_last):
            order = torch.contiguous_format if given.is_contiguous() else torch.channels_last
        size = (len(given) * self.processes.size, *given.shape[1:])
        return torch.zeros(size, dtype=given.dtype, device=given.device).contiguous(memory_format=order)

    def _own(self, whole: Tensor, given: Tensor) -> Tensor:
        return own_of_views(self.processes, whole, len(given) // self.share)

    def _views(self, rows: Tensor, given: Tensor | None) -> list[Tensor]:
        """Where the shares of each view lie in ``rows``: of the whole batch, or all of them."""
        views = list(rows.chunk(len(rows if given is None else given) // self.share))
        return views if given is None else list(map(self.processes.own, views))


def own_of_views(processes: Processes, rows: Tensor, views: int) -> Tensor:
    """This process's share of ``rows`` [v b, ...], which are those of v views one after the other."""
    if processes.size == 1 or views == 1:
        return processes.own(rows)
    return torch.cat([processes.own(view) for view in rows.chunk(views)])


class ShareRandomness(CallerRandomness):
    """This process's rows of the numbers that one generator gives for a whole batch of images.

    Args:
        generator: in the same state in every process.
        n: images of this process, those of all views.
        views: of each image.
        processes: who have the other images.
    """

    def __init__(self, generator: torch.Generator, n: int, views: int, processes: Processes) -> None:
        super().__init__(generator, n)
        self.views, self.processes = views, processes

    def normal_like(self, image: Tensor, rows: Tensor | None, number: int) -> Tensor:
        """See :meth:`AttackRandomness.normal_like`; for all images only."""
        return self._own(super().normal_like(self._whole(image), rows, number))

    def in_ball(self, threat: ThreatModel, image: Tensor, rows: Tensor | None, number: int) -> Tensor:
        """See :meth:`AttackRandomness.in_ball`; for all images only."""
        return image + self._own(super().in_ball(threat, self._whole(image), rows, number))

    def places(self, n: int, device: torch.device) -> Tensor:
        """See :meth:`AttackRandomness.places`."""
        return self._own(torch.arange(n * self.processes.size, device=device))

    def _whole(self, image: Tensor) -> Tensor:
        return image.new_zeros(len(image) * self.processes.size, *image.shape[1:])

    def _own(self, rows: Tensor) -> Tensor:
        return own_of_views(self.processes, rows, self.views)
