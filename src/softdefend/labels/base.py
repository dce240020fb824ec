"""What a label rule is: the answer to 'which label do we believe?'"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from softdefend.data import Batch

BNMode = Literal["train", "batch", "eval"]
"""How batch normalisation behaves in a forward: ``train`` uses the batch's statistics and updates the
running ones, ``batch`` uses the batch's and leaves the running ones, ``eval`` uses the running ones."""


@dataclass(frozen=True)
class RunInfo:
    """What a rule may know about the run before it starts."""

    labels: Tensor
    """[n] int64 on the device: the training labels as given, by index."""
    k: int
    """Number of classes."""
    epochs: int
    """Length of the run."""


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


class LabelRule(ABC):
    """Turns a batch and the network's predictions into targets [b, k].

    Everything that changes over epochs is a ``phase``: within a phase the rule does the same tensor
    operations at every step, reads nothing back to the host and has no data-dependent branch, so that a
    step can be captured once per phase.
    """

    clean_bn: BNMode = "train"
    """How a clean forward that only this rule asks for treats batch normalisation."""

    k: int

    def setup(self, run: RunInfo) -> None:
        """Called once before training, and before :meth:`load_state_dict` on a resume."""
        self.k = run.k

    def phase(self, epoch: int) -> str:
        """Name of what the rule does in ``epoch`` (zero-based)."""
        return "fixed"

    def needs_clean(self, phase: str) -> bool:
        """Whether :meth:`target` wants clean predictions in this phase."""
        return False

    def attack_target(self, batch: Batch, phase: str) -> Tensor:
        """What the attack climbs away from: labels [b] or probabilities [b, k]. The given label, unless
        a rule says otherwise."""
        return batch.label

    @abstractmethod
    def target(self, batch: Batch, predictions: Predictions, phase: str) -> Tensor:
        """Targets [b, k], rows summing to one, without gradient.

        Args:
            batch: the step's samples.
            predictions: detached logits [b, k] of this step.
            phase: as returned by :meth:`phase`.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that must survive a crash."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027 (most rules keep nothing)
        """Take back what :meth:`state_dict` gave, in place."""

    def one_hot(self, label: Tensor) -> Tensor:
        """Labels [b] as probabilities [b, k] float32."""
        return F.one_hot(label, self.k).to(torch.float32)
