"""Symmetric cross-entropy (Wang et al., ICCV 2019, arXiv 1908.06112) of adversarial images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.labels import Predictions, Supervision
from softdefend.objectives.at import PGDAT
from softdefend.objectives.base import OBJECTIVES

if TYPE_CHECKING:
    from softdefend.data import Batch


def reverse_cross_entropy(logits: Tensor, target: Tensor, floor: float) -> Tensor:
    """-sum_k p_k log target_k of each sample, [b], with log target_k no lower than ``floor``; for a hard
    label y that is -floor (1 - p_y).

    Args:
        logits: [b, k].
        target: [b, k] probabilities.
        floor: the value taken for log 0, < 0.
    """
    return -(F.softmax(logits, dim=1) * target.log().clamp_min(floor)).sum(dim=1)


@OBJECTIVES.register("SCE")
class SCE(PGDAT):
    """PGD-AT with alpha CE(f(x'), target) + beta RCE: the reverse cross-entropy -sum p log target is bounded,
    so that wrong labels do little harm. The attack climbs the plain cross-entropy. 23 forward units with
    PGD-10.

    Args:
        alpha: weight of the cross-entropy, >= 0; the authors' 0.1 for CIFAR-10 (6 for CIFAR-100).
        beta: weight of the reverse cross-entropy, >= 0; the authors' 1 for CIFAR-10 (0.1 for CIFAR-100).
        log_zero: A, the value taken for log 0, < 0; the authors' code clips targets at 1e-4, which is -9.21.

    Raises:
        SettingError: a value outside these ranges, or both weights zero.
    """

    source = "Wang et al., ICCV 2019, arXiv 1908.06112"

    def __init__(self, alpha: float = 0.1, beta: float = 1.0, log_zero: float = math.log(1e-4)) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (value >= 0 and math.isfinite(value)):
                raise SettingError(f"objective.{name}", value, "a number >= 0")
        if alpha == beta == 0:
            raise SettingError("objective.beta", beta, "a positive number where alpha is 0")
        if not -math.inf < log_zero < 0:
            raise SettingError("objective.log_zero", log_zero, "a negative number, such as -9.21")
        self.alpha, self.beta, self.log_zero = alpha, beta, log_zero

    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        logits = predictions.adversarial.float()
        reverse = reverse_cross_entropy(logits, supervision.target, self.log_zero)
        if supervision.weight is not None:
            reverse = supervision.weight * reverse
        return (self.alpha * supervision.cross_entropy(logits) + self.beta * reverse).mean()
