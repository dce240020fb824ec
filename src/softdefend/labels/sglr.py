"""Self-Guided Label Refinement (Yu, Li et al., 'Soften to Defend', CVPR 2024, arXiv 2403.09101)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.labels.base import LABELS, BNMode, Predictions
from softdefend.labels.refined import RefinedRule

if TYPE_CHECKING:
    from softdefend.data import Batch


def self_guide(
    clean_logits: Tensor, adversarial_logits: Tensor, clean_weight: float, temperature: float
) -> Tensor:
    """The network's own prediction, lambda * p(x) + (1 - lambda) * p(x'), [b, k].

    Args:
        clean_logits, adversarial_logits: [b, k].
        clean_weight: lambda in [0, 1].
        temperature: > 0; divides both logits.
    """
    clean = F.softmax(clean_logits / temperature, dim=1)
    adversarial = F.softmax(adversarial_logits / temperature, dim=1)
    return clean_weight * clean + (1 - clean_weight) * adversarial


def interpolate(memory: Tensor, one_hot: Tensor, r: float) -> Tensor:
    """The refined label r * t + (1 - r) * onehot(y), [b, k]."""
    return r * memory + (1 - r) * one_hot


@LABELS.register("SGLR")
class SGLR(RefinedRule):
    """Labels refined by the network's own predictions, averaged over time per sample; no teacher.

    From the start epoch on, every step moves the sample's memory row,
    ``t <- alpha t + (1 - alpha) (lambda p(x) + (1 - lambda) p(x'))``, and trains towards
    ``r t + (1 - r) onehot(y)``. Before it, the target is the given label. Defaults are those of the authors'
    published code (SGLS), where r is absent, that is 1.

    Args:
        alpha: weight of the old memory row, in [0, 1].
        clean_weight: lambda, weight of the clean prediction against the adversarial one, in [0, 1].
        r: share of the memory in the target, in [0, 1]: 1 is the code, below 1 the paper's interpolation
            with the hard label, 0 the hard label alone.
        temperature: of the predictions that enter the memory, > 0.
        start: fraction of the run after which refinement begins, in [0, 1]: the first refined epoch,
            counted from one, is the ceiling of ``start * epochs`` (the code's 90 of 200; 17 of 36). At 1
            only the last epoch is refined.
        clean_bn: batch normalization of the extra clean forward. ``train`` (the code) updates running
            statistics with clean images too. It has no effect where the objective makes its own clean
            forward, as TRADES does.
        attack_label: what the attack climbs away from: ``hard`` (the code) or ``refined``, the sample's
            target as the memory stands before this step.
        update: move the row ``before`` its use as a target (the code: this step's prediction is in its own
            target) or ``after``.
        storage: of the memory: ``float32``, ``float16``, or ``top-M``, which keeps the M largest entries of a
            row; see :mod:`softdefend.labels.memory` for bytes and errors.

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "Yu, Li et al., CVPR 2024, arXiv 2403.09101"

    def __init__(
        self,
        alpha: float = 0.9,
        clean_weight: float = 0.2,
        r: float = 1.0,
        temperature: float = 1.0,
        start: float = 0.45,
        clean_bn: BNMode = "train",
        attack_label: Literal["hard", "refined"] = "hard",
        update: Literal["before", "after"] = "before",
        storage: str = "float32",
    ) -> None:
        super().__init__(alpha, start, clean_bn, storage)
        for name, value in (("clean_weight", clean_weight), ("r", r)):
            if not 0 <= value <= 1:
                raise SettingError(f"label.{name}", value, "a number in [0, 1]")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise SettingError("label.temperature", temperature, "a positive number")
        for name, choice, accepted in (
            ("attack_label", attack_label, ("hard", "refined")),
            ("update", update, ("before", "after")),
        ):
            if choice not in accepted:
                raise SettingError(f"label.{name}", repr(choice), " or ".join(accepted))
        self.clean_weight, self.r, self.temperature = clean_weight, r, temperature
        self.attack_label, self.update = attack_label, update

    def attack_target(self, batch: Batch, phase: str) -> Tensor:
        if phase == "hard" or self.attack_label == "hard":
            return batch.label
        return interpolate(self.memory.read(batch.index), self.one_hot(batch.label), self.r)

    def target(self, batch: Batch, predictions: Predictions, phase: str) -> Tensor:
        one_hot = self.one_hot(batch.label)
        if phase == "hard":
            return one_hot
        assert predictions.clean is not None
        guide = self_guide(predictions.clean, predictions.adversarial, self.clean_weight, self.temperature)
        before = self.memory.read(batch.index)
        after = self.memory.update(batch.index, guide)
        return interpolate(after if self.update == "before" else before, one_hot, self.r)
