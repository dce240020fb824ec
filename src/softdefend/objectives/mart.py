"""MART: misclassification-aware adversarial training (Wang et al., ICLR 2020)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor

from softdefend.attacks import AttackLoss, Forward, cross_entropy, kl_divergence
from softdefend.attacks.pgd import Start
from softdefend.core.errors import SettingError
from softdefend.labels import Predictions, Supervision
from softdefend.objectives.base import OBJECTIVES, Objective

if TYPE_CHECKING:
    from softdefend.data import Batch


def likeliest_wrong(logits: Tensor, label: Tensor) -> Tensor:
    """-log(1 - p_k) of the likeliest wrong class k, [b]: the margin part of MART's boosted cross-entropy,
    with the offsets of the authors' code, which keep it finite at p_k = 1.

    Args:
        logits: [b, k].
        label: [b] int64, the class that is right.
    """
    probability = F.softmax(logits, dim=1)
    true = F.one_hot(label, logits.shape[1]).bool()
    rival = probability.detach().masked_fill(true, -1).argmax(dim=1, keepdim=True)
    return -(1.0001 - probability.gather(1, rival).squeeze(1) + 1e-12).log()


@OBJECTIVES.register("MART")
class MART(Objective):
    """Boosted cross-entropy of the adversarial images, CE(f(x'), target) - log(1 - max_wrong p(x')), plus
    beta KL(p(x) || p(x')) (1 - p_y(x)): images that the network misclassifies clean are pulled the most.

    Margin and weighting use the given label, also where a label rule believes another target. Gradient
    flows through p(x) in the divergence and in its weight, as in the authors' code; the attack climbs the
    cross-entropy from Gaussian noise of 0.001. 26 forward units with PGD-10.

    Args:
        beta: weight of the divergence, >= 0; the authors' training script has 5.

    Raises:
        SettingError: ``beta`` is negative or not finite.
    """

    mixes = False
    source = "Wang et al., ICLR 2020, openreview rklOg6EFwS"
    start: ClassVar[Start] = "gaussian"
    forwards = 2

    def __init__(self, beta: float = 5.0) -> None:
        if not (beta >= 0 and math.isfinite(beta)):
            raise SettingError("objective.beta", beta, "a number >= 0")
        self.beta = beta

    def inner_loss(self, forward: Forward, batch: Batch, target: Tensor) -> AttackLoss:
        return lambda logits: cross_entropy(logits, target)

    def predict(self, net: Forward, image: Tensor, adversarial: Tensor) -> Predictions:
        clean = net(image)
        return Predictions(net(adversarial), clean)

    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        assert predictions.clean is not None
        clean, adversarial = predictions.clean.float(), predictions.adversarial.float()
        boosted = supervision.cross_entropy(adversarial) + likeliest_wrong(adversarial, batch.label)
        log_clean = F.log_softmax(clean, dim=1)
        divergence = kl_divergence(log_clean, F.log_softmax(adversarial, dim=1))
        missing = 1.0000001 - log_clean.gather(1, batch.label[:, None]).squeeze(1).exp()
        return (boosted + self.beta * divergence * missing).mean()
