"""Consistency regularisation in adversarial training (Tack et al., AAAI 2022, arXiv 2103.04623)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from softdefend.attacks import kl_divergence
from softdefend.core.errors import SettingError
from softdefend.labels import Predictions, Supervision
from softdefend.objectives.at import PGDAT
from softdefend.objectives.base import OBJECTIVES

if TYPE_CHECKING:
    from softdefend.data import Batch


def jensen_shannon(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Jensen-Shannon divergence of softmax(logits / temperature) of each sample, [b], in [0, log 2].

    Args:
        first, second: logits [b, k].
        temperature: > 0.
    """
    log_p, log_q = F.log_softmax(first / temperature, dim=1), F.log_softmax(second / temperature, dim=1)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (kl_divergence(log_p, log_mean) + kl_divergence(log_q, log_mean))


@OBJECTIVES.register("Consistency")
class Consistency(PGDAT):
    """PGD-AT on two augmentations of each image, whose attacked predictions are pulled together:
    CE over both views + weight JSD(p_T(x1'), p_T(x2')).

    Both views are one batch in the attack and in the forward, so batch normalization sees 2b images. 46
    forward units with PGD-10.

    Args:
        weight: lambda, >= 0.
        temperature: T of the predictions compared, > 0; below one it sharpens them.

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "Tack et al., AAAI 2022, arXiv 2103.04623"
    views = 2

    def __init__(self, weight: float = 1.0, temperature: float = 0.5) -> None:
        if not (weight >= 0 and math.isfinite(weight)):
            raise SettingError("objective.weight", weight, "a number >= 0")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise SettingError("objective.temperature", temperature, "a positive number")
        self.weight, self.temperature = weight, temperature

    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        base = super().outer_loss(predictions, batch, supervision.repeat(self.views))
        first, second = predictions.adversarial.float().chunk(self.views)
        return base + self.weight * jensen_shannon(first, second, self.temperature).mean()
