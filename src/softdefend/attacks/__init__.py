"""Attacks, each usable alone on any module: ``PGD(steps=20)(net, image, label, threat)``."""

from softdefend.attacks.apgd import APGD, TargetedAPGD
from softdefend.attacks.base import Attack, Forward, value_and_gradient
from softdefend.attacks.fab import FAB
from softdefend.attacks.losses import (
    AttackLoss,
    cross_entropy,
    dlr,
    kl_divergence,
    kl_from,
    margin,
    targeted_dlr,
)
from softdefend.attacks.pgd import FGSM, PGD
from softdefend.attacks.square import Square

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "PGD",
    "Attack",
    "AttackLoss",
    "Forward",
    "Square",
    "TargetedAPGD",
    "cross_entropy",
    "dlr",
    "kl_divergence",
    "kl_from",
    "margin",
    "targeted_dlr",
    "value_and_gradient",
]
