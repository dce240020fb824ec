"""What a label rule is: the answer to 'which label do we believe?'"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor

from softdefend.attacks.losses import cross_entropy
from softdefend.core.registry import Registry
from softdefend.core.rule import Rule, RunInfo
from softdefend.execution.network_mode import BNMode as BNMode

if TYPE_CHECKING:
    from softdefend.data import Batch


@dataclass(frozen=True)
class Predictions:
    """Logits [b, k] of one step's forwards; ``clean`` is None where no clean forward was made."""

    adversarial: Tensor
    clean: Tensor | None = None

    def detach(self) -> Predictions:
        """The same numbers, cut from the graph, in float32."""
        return Predictions(
            self.adversarial.detach().float(), None if self.clean is None else self.clean.detach().float()
        )

    def at(self, rows: Tensor) -> Predictions:
        """Those of the images at ``rows`` [m] int64."""
        return Predictions(self.adversarial[rows], None if self.clean is None else self.clean[rows])

    def first(self, size: int) -> Predictions:
        """Those of the first ``size`` images."""
        return Predictions(self.adversarial[:size], None if self.clean is None else self.clean[:size])


@dataclass(frozen=True)
class SoftTerm:
    """One part of a label loss that softens the logits too, as distillation does."""

    target: Tensor
    """[b, k], rows summing to one."""
    coefficient: float
    """Weight of the part."""
    temperature: float = 1.0
    """Divides the logits; the part is multiplied by its square, which keeps its gradient's scale."""

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """c T^2 CE(f / T, target), [b]."""
        value = cross_entropy(logits / self.temperature, self.target)
        return self.coefficient * self.temperature**2 * value


@dataclass(frozen=True)
class Supervision:
    """Targets of a batch, and the label loss that objectives take of logits."""

    label: Tensor
    """[b] int64: the labels as given."""
    target: Tensor
    """[b, k], rows summing to one, without gradient: the labels that the rule believes."""
    weight: Tensor | None = None
    """[b], mean one: how much each sample counts in the label loss. All count the same when None."""
    terms: tuple[SoftTerm, ...] = ()
    """Parts of the label loss, in place of the cross-entropy with ``target``; none for that alone."""

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """The label loss of each sample, [b], for logits [b, k]: where an objective's paper has CE(f, y)."""
        logits = logits.float()
        if self.terms:
            value = sum(
                (term.cross_entropy(logits) for term in self.terms[1:]), self.terms[0].cross_entropy(logits)
            )
        else:
            value = cross_entropy(logits, self.target)
        return value if self.weight is None else self.weight * value

    def repeat(self, times: int) -> Supervision:
        """The same for ``times`` views of the batch, one after the other."""
        if times == 1:
            return self
        return Supervision(
            self.label.repeat(times),
            self.target.repeat(times, 1),
            None if self.weight is None else self.weight.repeat(times),
            tuple(replace(term, target=term.target.repeat(times, 1)) for term in self.terms),
        )


class LabelRule(Rule, ABC):
    """Turns a batch and the network's predictions into targets [b, k].

    Where an objective trains on several views of each image, a rule sees the first.
    """

    setting: ClassVar[str] = "label"

    clean_bn: BNMode = "train"
    """Batch normalization in a clean forward that only this rule needs."""

    extra_units: ClassVar[float] = 0.0
    """Forward units that the rule adds to a step; a clean forward that :meth:`needs_clean` is not counted. A
    unit is one forward of a batch. A gradient with respect to images, or to weights, is one more."""

    asks_clean: ClassVar[bool] = False
    """Whether :meth:`needs_clean` returns True in some phase."""

    softens_all: ClassVar[bool] = False
    """Whether the published rule arrives at nearly uniform labels. Training then does not warn of them."""

    k: int

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        self.k = run.k

    def needs_clean(self, phase: str) -> bool:
        """Whether :meth:`target` wants clean predictions in this phase."""
        return False

    def attack_target(self, batch: Batch, phase: str) -> Tensor:
        """What the attack climbs away from: labels [b] or probabilities [b, k]. This base returns the given
        label."""
        return batch.label

    @abstractmethod
    def target(self, batch: Batch, predictions: Predictions, phase: str) -> Tensor:
        """Targets [b, k], rows summing to one, without gradient. Called once a step.

        Args:
            batch: the step's samples.
            predictions: detached logits [b, k] of this step.
            phase: as returned by :meth:`phase`.
        """

    def supervise(
        self, batch: Batch, adversarial: Tensor, predictions: Predictions, phase: str
    ) -> Supervision:
        """Targets and label loss for the objective. This base returns :meth:`target` alone.

        Args:
            batch, predictions, phase: as for :meth:`target`.
            adversarial: adversarial images [b, c, h, w].
        """
        return Supervision(batch.label, self.target(batch, predictions, phase))

    def one_hot(self, label: Tensor) -> Tensor:
        """Labels [b] as probabilities [b, k] float32."""
        return F.one_hot(label, self.k).float()


LABELS: Registry[type[LabelRule]] = Registry("labels")
"""Every label rule by the name of its class."""
