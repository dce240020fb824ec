"""Self-adaptive training (Huang et al., NeurIPS 2020, arXiv 2002.10319)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from softdefend.core.processes import ALONE, Processes
from softdefend.labels.base import LABELS, BNMode, Predictions, Supervision
from softdefend.labels.refined import RefinedRule

if TYPE_CHECKING:
    from softdefend.data import Batch


def certainty(target: Tensor, processes: Processes = ALONE) -> Tensor:
    """Weights [b] of the rows of ``target`` [b, k]: w_i = max_c t_ic, divided by its mean over the batch, of
    which each process has a share."""
    largest = target.amax(dim=1)
    return largest / processes.mean(largest.mean())


@LABELS.register("SAT")
class SAT(RefinedRule):
    """Labels refined by the network's own clean predictions, averaged over time per sample; samples count by
    how sure their label is.

    From the start epoch on, every step moves the sample's memory row, ``t <- alpha t + (1 - alpha) p(x)``,
    and trains towards it with weight ``max_c t_c``, normalized to mean one over the batch. Before it, the
    target is the given label and all weights are equal. The attack climbs away from the given label. Defaults
    are those of the authors' TRADES + SAT on CIFAR-10.

    Args:
        alpha: weight of the old memory row, in [0, 1].
        start: fraction of the run after which refinement begins, in [0, 1]: the first refined epoch, counted
            from one, is the ceiling of ``start * epochs`` (the code's 70 of 100).
        weighted: weigh the samples' label loss by certainty, as the authors do. SCE's reverse cross-entropy
            is a label loss too. Other terms of an objective, such as TRADES' divergence, are not weighed.
        clean_bn: batch normalization of the clean forward where the objective makes none of its own (PGD-AT).
        storage: of the memory: ``float32``, ``float16``, or ``top-M``, which keeps the M largest entries of a
            row; see :mod:`softdefend.labels.memory` for bytes and errors.

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "Huang et al., NeurIPS 2020, arXiv 2002.10319"

    def __init__(
        self,
        alpha: float = 0.9,
        start: float = 0.7,
        weighted: bool = True,
        clean_bn: BNMode = "train",
        storage: str = "float32",
    ) -> None:
        super().__init__(alpha, start, clean_bn, storage)
        self.weighted = weighted

    def target(self, batch: Batch, predictions: Predictions, phase: str) -> Tensor:
        if phase == "hard":
            return self.one_hot(batch.label)
        assert predictions.clean is not None
        return self.memory.update(batch.index, F.softmax(predictions.clean, dim=1))

    def supervise(
        self, batch: Batch, adversarial: Tensor, predictions: Predictions, phase: str
    ) -> Supervision:
        target = self.target(batch, predictions, phase)
        weight = certainty(target, self.memory.processes) if self.weighted and phase == "refined" else None
        return Supervision(batch.label, target, weight)
