"""What an objective is: the answer to 'what does the attack climb, and what does the update minimise?'"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from softdefend.attacks import PGD, Attack, AttackLoss, Forward
from softdefend.attacks.pgd import Start
from softdefend.core.registry import Registry
from softdefend.core.rule import Rule
from softdefend.core.threat import ThreatModel
from softdefend.labels import Predictions, Supervision

if TYPE_CHECKING:
    from softdefend.data import Batch


class Objective(Rule, ABC):
    """One training objective."""

    setting: ClassVar[str] = "objective"
    start: ClassVar[Start] = "uniform"
    """Where the reference code starts its attack; used where ``attack.start`` is ``auto``."""
    views: int = 1
    """Differently augmented views of each image in a batch. With v views ``image`` and logits have v b rows,
    view after view; labels and targets keep b rows."""
    joins_views: ClassVar[bool] = True
    """Whether all views are in one forward of the update, or each in one of its own."""
    forwards: ClassVar[int] = 1
    """Forwards of the update, each with its gradient: three units."""
    extra_units: ClassVar[float] = 0.0
    """Further forward units a step and view, outside attack and update."""

    @property
    def layers(self) -> nn.Module | None:
        """Layers that the objective adds, whose weights are trained with the network's."""
        return None

    def view_forward(self, net: Forward) -> Forward:
        """The network as the attack sees it, for all views at once, [v b, c, h, w]."""
        return net

    def attack_units(self, steps: int) -> float:
        """Forward units of the training attack where ``steps`` are configured."""
        return 2 * steps

    def units(self, steps: int) -> float:
        """Forward units of a step with all views, for the hard label and the plain weight rule."""
        return self.views * (self.attack_units(steps) + 3 * self.forwards + self.extra_units)

    def training_attack(self, configured: PGD, threat: ThreatModel) -> Attack:
        """The attack inside training, made from the configured one."""
        return replace(configured, start=self.start) if configured.start == "auto" else configured

    @abstractmethod
    def inner_loss(self, forward: Forward, batch: Batch, target: Tensor) -> AttackLoss:
        """The loss that the attack climbs. Called once a step, before the attack.

        Args:
            forward: the network as the attack sees it (frozen parameters).
            batch: index [b], clean images [v b, c, h, w], labels [b].
            target: labels [v b] or probabilities [v b, k], from the label rule.
        """

    @abstractmethod
    def predict(self, net: Forward, image: Tensor, adversarial: Tensor) -> Predictions:
        """The forwards that the update needs, with their graph, in the order of the reference code. Called
        twice where the weight rule perturbs the weights."""

    @abstractmethod
    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        """The scalar to minimise: mean over the batch.

        Args:
            predictions: what :meth:`predict` returned, logits [v b, k].
            batch: as for :meth:`inner_loss`.
            supervision: targets of the b samples, from the label rule.
        """


OBJECTIVES: Registry[type[Objective]] = Registry("objectives")
"""Every objective by the name of its class."""
