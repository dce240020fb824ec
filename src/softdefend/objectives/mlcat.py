"""MLCAT: minimum-loss constrained adversarial training (Yu et al., ICML 2022, arXiv 2206.08675)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.labels import Predictions, Supervision
from softdefend.objectives.at import PGDAT
from softdefend.objectives.base import OBJECTIVES

if TYPE_CHECKING:
    from softdefend.data import Batch

_SMALLEST = 1e-6
"""A smaller loss has hardly an exact digit in float32, and a factor l_min / loss would be noise."""


def scale_up(loss: Tensor, least: float) -> Tensor:
    """Losses [b] with the small ones multiplied up to ``least``. The factor is a constant: where loss < least
    the gradient is that of the loss, times least / loss."""
    constant = loss.detach()
    return loss * (least / constant.clamp_min(_SMALLEST)).clamp_min(1)


def lift(loss: Tensor, least: float) -> Tensor:
    """Losses [b] with the small ones replaced by ``least``, which has no gradient."""
    return torch.where(loss < least, least, loss)


@OBJECTIVES.register("MLCAT")
class MLCAT(PGDAT):
    """PGD-AT that does not let a sample's loss fall below a minimum: small losses are scaled up to it.

    Samples that have become easy drive robust overfitting. Scaled up, they keep their influence. 23 forward
    units with PGD-10.

    Args:
        l_min: the least loss of a sample in nats, > 0; the code's 1.5 (CIFAR-10).
        gradient: ``scaled`` takes the factor l_min / loss as a constant, so that the gradient of a small loss
            is multiplied by it. ``published`` is what the authors' code computes: the factor stays in the
            graph, loss times factor is the constant l_min, and such samples have no gradient at all.

    Raises:
        SettingError: ``l_min`` is not positive or not finite, or an unknown ``gradient``.
    """

    source = "Yu et al., ICML 2022, arXiv 2206.08675"

    def __init__(self, l_min: float = 1.5, gradient: Literal["scaled", "published"] = "scaled") -> None:
        if not 0 < l_min < math.inf:
            raise SettingError("objective.l_min", l_min, "a positive number of nats")
        if gradient not in ("scaled", "published"):
            raise SettingError("objective.gradient", repr(gradient), "scaled or published")
        self.l_min, self.gradient = l_min, gradient

    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        loss = supervision.cross_entropy(predictions.adversarial)
        return (scale_up if self.gradient == "scaled" else lift)(loss, self.l_min).mean()
