"""The given label, as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from softdefend.labels.base import LABELS, LabelRule, Predictions

if TYPE_CHECKING:
    from softdefend.data import Batch


@LABELS.register("Hard")
class Hard(LabelRule):
    """One-hot targets: adversarial training as Madry et al. (arXiv 1706.06083) have it."""

    def target(self, batch: Batch, predictions: Predictions, phase: str) -> Tensor:
        return self.one_hot(batch.label)
