"""What an objective is: the answer to 'what does the attack climb, and what does the update minimise?'"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from softdefend.attacks import AttackLoss, Forward
from softdefend.attacks.pgd import Start
from softdefend.labels import Predictions


class Objective(ABC):
    """One training objective; stateless."""

    start: ClassVar[Start] = "uniform"
    """Where the reference starts its attack; used where the training attack says ``auto``."""

    @abstractmethod
    def inner_loss(self, forward: Forward, image: Tensor, target: Tensor) -> AttackLoss:
        """What the attack climbs.

        Args:
            forward: the network as the attack sees it (frozen parameters).
            image: clean images [b, c, h, w].
            target: labels [b] or probabilities [b, k], from the label rule.
        """

    @abstractmethod
    def predict(self, net: Forward, image: Tensor, adversarial: Tensor) -> Predictions:
        """The forwards the update needs, with their graph, in the reference's order."""

    @abstractmethod
    def outer_loss(self, predictions: Predictions, target: Tensor) -> Tensor:
        """The scalar to minimise: mean over the batch.

        Args:
            predictions: what :meth:`predict` returned.
            target: [b, k], rows summing to one, without gradient.
        """
