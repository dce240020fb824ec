"""Training with Gaussian noise, for certificates by randomized smoothing (Cohen et al., arXiv 1902.02918)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from softdefend.attacks import PGD, Attack
from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.objectives.at import PGDAT
from softdefend.objectives.base import OBJECTIVES


@dataclass(frozen=True)
class _Noise(Attack):
    """Gaussian noise. This is a training perturbation, not an attack: nothing is cut to [0, 1] or to a
    ball."""

    sigma: float

    @property
    def name(self) -> str:
        return "gaussian-noise"

    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        return image + self.sigma * context.random.normal_like(image, None, 0)


@OBJECTIVES.register("GaussianNoise")
class GaussianNoise(PGDAT):
    """Cross-entropy of images with Gaussian noise, no attack: E CE(f(x + n), target), n ~ N(0, sigma^2).

    ``softdefend certify`` makes a certificate of the network. The settings of the training attack have no
    effect; noisy images are not cut to [0, 1]. 3 forward units.

    Args:
        sigma: standard deviation of the noise in pixel units, > 0.

    Raises:
        SettingError: ``sigma`` is not positive or not finite.
    """

    source = "Cohen et al., ICML 2019, arXiv 1902.02918"

    def __init__(self, sigma: float = 0.25) -> None:
        if not 0 < sigma < math.inf:
            raise SettingError("objective.sigma", sigma, "a positive number, in pixel units")
        self.sigma = sigma

    def attack_units(self, steps: int) -> float:
        return 0

    def training_attack(self, configured: PGD, threat: ThreatModel) -> Attack:
        return _Noise(self.sigma)
