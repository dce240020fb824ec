"""TRADES (Zhang et al., arXiv 1901.08573)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from softdefend.attacks import AttackLoss, Forward, kl_divergence, kl_from
from softdefend.attacks.pgd import Start
from softdefend.core.errors import SettingError
from softdefend.labels import Predictions, Supervision
from softdefend.objectives.base import OBJECTIVES, Objective

if TYPE_CHECKING:
    from softdefend.data import Batch


@OBJECTIVES.register("TRADES")
class TRADES(Objective):
    """CE(f(x), target) + beta KL(p(x) || p(x')), the attack climbing the same divergence.

    As in the authors' code, gradient flows through p(x) too, and the attack starts from Gaussian noise of
    0.001. The code makes a third forward of the clean images per step, which gives the same logits and
    updates batch-normalization statistics once more. It is left out here. 27 forward units with PGD-10 (code:
    39).

    Args:
        beta: weight of the divergence, >= 0; the code's 6.

    Raises:
        SettingError: ``beta`` is negative or not finite.
    """

    source = "Zhang et al., ICML 2019, arXiv 1901.08573"
    start: ClassVar[Start] = "gaussian"
    forwards = 2
    extra_units = 1.0  # the attack's clean forward

    def __init__(self, beta: float = 6.0) -> None:
        if not (beta >= 0 and math.isfinite(beta)):
            raise SettingError("objective.beta", beta, "a number >= 0")
        self.beta = beta

    def inner_loss(self, forward: Forward, batch: Batch, target: Tensor) -> AttackLoss:
        # Parameters are frozen and the clean logits do not move: one forward serves every step.
        with torch.no_grad():
            return kl_from(forward(batch.image))

    def predict(self, net: Forward, image: Tensor, adversarial: Tensor) -> Predictions:
        clean = net(image)
        return Predictions(net(adversarial), clean)

    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        assert predictions.clean is not None
        clean, adversarial = predictions.clean.float(), predictions.adversarial.float()
        divergence = kl_divergence(F.log_softmax(clean, dim=1), F.log_softmax(adversarial, dim=1))
        return supervision.cross_entropy(clean).mean() + self.beta * divergence.mean()
