"""Adversarial training with one gradient step: N-FGSM (de Jorge et al., arXiv 2202.01181) and FGSM from a
random start (Wong et al., arXiv 2001.03994)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softdefend.attacks import PGD, Attack, cross_entropy, value_and_gradient
from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget, ThreatModel
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.objectives.at import PGDAT
from softdefend.objectives.base import OBJECTIVES


@dataclass(frozen=True)
class _NoisyStep(Attack):
    """Noise, then one step from it. This is a training perturbation, not an attack within the threat model:
    the result is up to (noise + alpha) eps away from the image and is cut to [0, 1] only."""

    noise: float
    alpha: float

    @property
    def name(self) -> str:
        return "n-fgsm"

    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        loss = context.loss or (lambda logits: cross_entropy(logits, label))
        # The ball around nothing, scaled: uniform in the ball of radius noise * eps, for either norm.
        noise = self.noise * context.random.in_ball(threat, torch.zeros_like(image), None, 0)
        noisy = (image + noise).clamp(0, 1)
        _, grad = value_and_gradient(net, loss, noisy)
        return threat.ascend(noisy, grad, self.alpha * float(threat.eps)).clamp(0, 1)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise SettingError(f"objective.{name}", value, "a positive number, in units of eps")
    return value


@OBJECTIVES.register("NFGSM")
class NFGSM(PGDAT):
    """PGD-AT whose attack is one step from strong noise: x + eta, eta ~ U(-noise eps, noise eps), then
    alpha eps along the gradient's sign, each cut to [0, 1] and neither to the ball.

    The settings of the training attack have no effect. With an l2 threat, which the paper does not treat,
    the noise is uniform in the l2 ball of radius noise eps and the step the normalized gradient. 5 forward
    units.

    Args:
        noise: the paper's k, radius of the noise in units of eps, >= 0; 0 is FGSM without random start.
        alpha: length of the step in units of eps, > 0.

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "de Jorge et al., NeurIPS 2022, arXiv 2202.01181"

    def __init__(self, noise: float = 2.0, alpha: float = 1.0) -> None:
        if not 0 <= noise < math.inf:
            raise SettingError("objective.noise", noise, "a number >= 0, in units of eps")
        self.noise, self.alpha = noise, _positive("alpha", alpha)

    def attack_units(self, steps: int) -> float:
        return 2

    def training_attack(self, configured: PGD, threat: ThreatModel) -> Attack:
        return _NoisyStep(self.noise, self.alpha)


@OBJECTIVES.register("FGSMRS")
class FGSMRS(PGDAT):
    """PGD-AT whose attack is one long step from a uniform start in the ball, projected back into it.

    Of the training attack's settings only ``attack.start`` has an effect, unless it is ``auto``: with
    ``none`` and alpha 1 this is plain FGSM. In l2 the step is PGD's. 5 forward units.

    Args:
        alpha: length of the step in units of eps, > 0; the code's 10/255 at eps 8/255 is 1.25.

    Raises:
        SettingError: ``alpha`` is not positive or not finite.
    """

    source = "Wong et al., ICLR 2020, arXiv 2001.03994"

    def __init__(self, alpha: float = 1.25) -> None:
        self.alpha = _positive("alpha", alpha)

    def attack_units(self, steps: int) -> float:
        return 2

    def training_attack(self, configured: PGD, threat: ThreatModel) -> Attack:
        start = self.start if configured.start == "auto" else configured.start
        step_size = Budget(self.alpha * float(threat.eps))
        return replace(configured, steps=1, step_size=step_size, restarts=1, start=start, keep="last")
