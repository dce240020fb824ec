"""PGD adversarial training (Madry et al., arXiv 1706.06083)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from softdefend.attacks import AttackLoss, Forward, cross_entropy
from softdefend.labels import Predictions, Supervision
from softdefend.objectives.base import OBJECTIVES, Objective

if TYPE_CHECKING:
    from softdefend.data import Batch


@OBJECTIVES.register("PGDAT")
class PGDAT(Objective):
    """Cross-entropy of the adversarial images: min E max CE(f(x'), target). 23 forward units with PGD-10."""

    source = "Madry et al., ICLR 2018, arXiv 1706.06083"

    def inner_loss(self, forward: Forward, batch: Batch, target: Tensor) -> AttackLoss:
        return lambda logits: cross_entropy(logits, target)

    def predict(self, net: Forward, image: Tensor, adversarial: Tensor) -> Predictions:
        return Predictions(net(adversarial))

    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        return supervision.cross_entropy(predictions.adversarial).mean()
