"""Temporal ensembling in adversarial training (Dong et al., ICLR 2022, arXiv 2106.01606)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from softdefend.attacks import AttackLoss, Forward, kl_from
from softdefend.core.errors import SettingError
from softdefend.core.processes import Processes
from softdefend.core.rule import RunInfo
from softdefend.labels import Predictions, Supervision
from softdefend.objectives.at import PGDAT
from softdefend.objectives.base import OBJECTIVES, Objective
from softdefend.objectives.trades import TRADES

if TYPE_CHECKING:
    from softdefend.data import Batch


def weight_from_reference(k: int, published: float = 300.0) -> float:
    """The weight of a squared distance that equals a weight in the authors' code, which averages over classes
    as well as samples: its 300 is 30 with 10 classes and 3 with 100.

    Args:
        k: number of classes.
        published: the code's ``--reg-weight``.
    """
    return published / k


def squared_distance(logits: Tensor, ensemble: Tensor) -> Tensor:
    """||p - z||^2 of each sample, [b], from logits [b, k] and probabilities [b, k]."""
    return (F.softmax(logits.float(), dim=1) - ensemble).square().sum(dim=1)


def ramp(epoch: float, start: float, end: float) -> float:
    """Share of the full weight in ``epoch``: 0 before ``start``, exp(-5 (1 - progress)^2) up to ``end``, 1
    after (Laine & Aila, arXiv 1610.02242). It jumps to exp(-5) = 0.0067 at ``start``."""
    if epoch < start - 1e-9:  # 0.45 * 200 may round to just above 90, which must not skip epoch 90
        return 0.0
    progress = min(max((epoch - start) / (end - start), 0.0), 1.0)
    return math.exp(-5 * (1 - progress) ** 2)


class _Ensembling(Objective):
    """The memory of clean predictions and the ramp of its weight, to be mixed with a base objective."""

    mixes = False
    remembers = True
    processes: Processes
    memory: Tensor
    scale: Tensor
    active: bool

    def __init__(self, weight: float, alpha: float, ramp_start: float, ramp_end: float) -> None:
        if not (weight >= 0 and math.isfinite(weight)):
            raise SettingError("objective.weight", weight, "a number >= 0")
        if not 0 <= alpha < 1:
            raise SettingError("objective.alpha", alpha, "a number in [0, 1)")
        if not 0 <= ramp_start <= 1:
            raise SettingError("objective.ramp_start", ramp_start, "a number in [0, 1]")
        if not ramp_start < ramp_end < math.inf:
            raise SettingError("objective.ramp_end", ramp_end, "a number above ramp_start")
        self.weight, self.alpha, self.ramp_start, self.ramp_end = weight, alpha, ramp_start, ramp_end

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        self.processes = run.processes
        # Rows [n, k] that start at zero, 4 n k bytes. After m updates a row sums to 1 - alpha^m; dividing by
        # that sum corrects for the start.
        self.memory = torch.zeros(len(run.labels), run.k, device=run.labels.device)
        self.scale = torch.zeros((), device=run.labels.device)
        self.ends = self.ramp_start * run.epochs, self.ramp_end * run.epochs
        self.active = False

    def share(self, epoch: float) -> float:
        """Share of the full weight at zero-based ``epoch``, constant within an epoch."""
        return ramp(math.floor(epoch) + 1, *self.ends)

    def phase(self, epoch: int) -> str:
        return "ensemble" if self.share(epoch) > 0 else "base"

    def advance(self, epoch: float) -> None:
        self.active = self.share(epoch) > 0
        self.scale.fill_(self.weight * self.share(epoch))

    def remember(self, batch: Batch, logits: Tensor) -> Tensor:
        """Move the rows of the batch towards its clean prediction, and return their ensemble, [b, k]."""
        prediction = F.softmax(logits.float(), dim=1)
        rows = self.alpha * self.memory[batch.index] + (1 - self.alpha) * prediction
        self.memory.index_copy_(0, *self.processes.gather(batch.index, rows))
        return self.ensemble(batch.index)

    def ensemble(self, index: Tensor) -> Tensor:
        """The mean prediction for the samples ``index`` [b] over the epochs, [b, k]."""
        rows = self.memory[index]
        return rows / rows.sum(dim=1, keepdim=True)

    def pull(self, logits: Tensor, batch: Batch) -> Tensor:
        """w ||p - z||^2, mean over the batch; the step's clean forward has updated z."""
        return self.scale * squared_distance(logits, self.ensemble(batch.index)).mean()

    def state_dict(self) -> dict[str, Tensor]:
        return {"memory": self.memory}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.memory.copy_(state["memory"])


@OBJECTIVES.register("TE")
class TE(_Ensembling, PGDAT):
    """PGD-AT + w ||p(x') - z||^2, in the attack as in the update, where z is a moving average over epochs of
    the network's predictions on the clean image: ``t <- alpha t + (1 - alpha) p(x)`` from zero, ``z = t /
    sum t``.

    The prediction is made before the attack, in the mode in which the network is attacked (``attack_bn``,
    by default eval mode). Before the ramp starts this is plain PGD-AT. 23 forward units with PGD-10, then 24.

    Args:
        weight: w at the end of the ramp, >= 0, of the squared distance itself: the code's 300 with 10
            classes; see :func:`weight_from_reference` for other numbers of classes.
        alpha: weight of the old memory row, in [0, 1).
        ramp_start, ramp_end: fractions of the run; w is 0 before the first and full after the second: the
            code's epochs 90 and 150 of 200, counted from one.

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "Dong et al., ICLR 2022, arXiv 2106.01606"
    start = "uniform-unclipped"
    extra_units = 1.0  # the clean forward, once the ramp has started

    def __init__(
        self, weight: float = 30.0, alpha: float = 0.9, ramp_start: float = 0.45, ramp_end: float = 0.75
    ) -> None:
        super().__init__(weight, alpha, ramp_start, ramp_end)

    def inner_loss(self, forward: Forward, batch: Batch, target: Tensor) -> AttackLoss:
        base = super().inner_loss(forward, batch, target)
        if not self.active:
            return base
        with torch.no_grad():
            ensemble = self.remember(batch, forward(batch.image))
        return lambda logits: base(logits) + self.scale * squared_distance(logits, ensemble)

    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        base = super().outer_loss(predictions, batch, supervision)
        return base + self.pull(predictions.adversarial, batch) if self.active else base


@OBJECTIVES.register("TRADESTE")
class TRADESTE(_Ensembling, TRADES):
    """TRADES + w ||p(x) - z||^2 with the memory of :class:`TE`; the attack climbs
    beta KL(p(x) || p(x')) + w ||p(x') - z||^2.

    The memory takes the clean forward of TRADES's attack. 27 forward units with PGD-10.

    Args:
        beta: weight of the divergence, >= 0; the code's 6.
        branch: whose prediction the loss pulls towards z: ``clean`` (the code) or ``adversarial``.
        weight, alpha, ramp_start, ramp_end: as for :class:`TE`.

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "Dong et al., ICLR 2022, arXiv 2106.01606"

    def __init__(
        self,
        beta: float = 6.0,
        branch: Literal["clean", "adversarial"] = "clean",
        weight: float = 30.0,
        alpha: float = 0.9,
        ramp_start: float = 0.45,
        ramp_end: float = 0.75,
    ) -> None:
        TRADES.__init__(self, beta)
        _Ensembling.__init__(self, weight, alpha, ramp_start, ramp_end)
        if branch not in ("clean", "adversarial"):
            raise SettingError("objective.branch", repr(branch), "clean or adversarial")
        self.branch = branch

    def inner_loss(self, forward: Forward, batch: Batch, target: Tensor) -> AttackLoss:
        if not self.active:
            return super().inner_loss(forward, batch, target)
        with torch.no_grad():
            clean = forward(batch.image)
            ensemble, divergence = self.remember(batch, clean), kl_from(clean)
        return lambda logits: self.beta * divergence(logits) + self.scale * squared_distance(logits, ensemble)

    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        base = super().outer_loss(predictions, batch, supervision)
        pulled = predictions.clean if self.branch == "clean" else predictions.adversarial
        assert pulled is not None
        return base + self.pull(pulled, batch) if self.active else base
