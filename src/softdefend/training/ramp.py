"""A threat model that grows over the first epochs."""

from __future__ import annotations

import math
from dataclasses import replace

from softdefend.attacks import PGD
from softdefend.core.threat import Budget, ThreatModel
from softdefend.training.config import Recipe


def ramp(share: float, epoch: int, epochs: int) -> float:
    """The factor on eps in a zero-based epoch: 1 / r, 2 / r, ... over the first r epochs, then 1.

    Args:
        share: of the epochs, rounded up to r whole ones; 0 for no ramp.
        epoch, epochs: position and length of the run.
    """
    length = math.ceil(share * epochs - 1e-9)  # a product may round to just above a whole number
    return min(1.0, (epoch + 1) / length) if length else 1.0


def scaled(recipe: Recipe, factor: float) -> tuple[ThreatModel, PGD]:
    """Threat and attack of a recipe with eps, and a step size that is given, ``factor`` times as large."""
    threat, attack = recipe.threat, recipe.attack
    if factor == 1:
        return threat, attack
    if attack.step_size is not None:
        attack = replace(attack, step_size=Budget(factor * float(attack.step_size)))
    return replace(threat, eps=Budget(factor * float(threat.eps))), attack
