"""Attacks, each usable alone on any module: ``PGD(steps=20)(net, image, label, threat)``."""

from softdefend.attacks.base import Attack, Forward, value_and_gradient
from softdefend.attacks.losses import AttackLoss, cross_entropy, kl_divergence, kl_from, margin
from softdefend.attacks.pgd import FGSM, PGD

__all__ = [
    "FGSM",
    "PGD",
    "Attack",
    "AttackLoss",
    "Forward",
    "cross_entropy",
    "kl_divergence",
    "kl_from",
    "margin",
    "value_and_gradient",
]
