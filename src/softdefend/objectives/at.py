"""PGD adversarial training (Madry et al., arXiv 1706.06083)."""

from __future__ import annotations

from torch import Tensor

from softdefend.attacks import AttackLoss, Forward, cross_entropy
from softdefend.labels import Predictions
from softdefend.objectives.base import Objective


class PGDAT(Objective):
    """Cross-entropy of the adversarial images: min E max CE(f(x'), target). 23 forward units with PGD-10."""

    def inner_loss(self, forward: Forward, image: Tensor, target: Tensor) -> AttackLoss:
        return lambda logits: cross_entropy(logits, target)

    def predict(self, net: Forward, image: Tensor, adversarial: Tensor) -> Predictions:
        return Predictions(net(adversarial))

    def outer_loss(self, predictions: Predictions, target: Tensor) -> Tensor:
        return cross_entropy(predictions.adversarial.float(), target).mean()
