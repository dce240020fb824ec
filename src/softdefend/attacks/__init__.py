"""Attacks, each usable alone on any module: ``PGD(steps=20)(net, image, label, threat)``."""

from softdefend.attacks.adapt import Adapted, adapt
from softdefend.attacks.apgd import APGD, TargetedAPGD
from softdefend.attacks.base import Attack, Forward, value_and_gradient
from softdefend.attacks.cw import CWL2, CWLinf
from softdefend.attacks.decision import DecisionAttack
from softdefend.attacks.deepfool import DeepFool
from softdefend.attacks.fab import FAB
from softdefend.attacks.fmn import FMN
from softdefend.attacks.hop_skip_jump import HopSkipJump
from softdefend.attacks.losses import (
    AttackLoss,
    cross_entropy,
    dlr,
    kl_divergence,
    kl_from,
    margin,
    match_logits,
    targeted_dlr,
)
from softdefend.attacks.minimal import MinimalAttack
from softdefend.attacks.pgd import FGSM, PGD
from softdefend.attacks.sigma_zero import SigmaZero
from softdefend.attacks.square import Square
from softdefend.attacks.surfree import SurFree
from softdefend.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "CWL2",
    "FAB",
    "FGSM",
    "FMN",
    "PGD",
    "Adapted",
    "Attack",
    "AttackLoss",
    "CWLinf",
    "DecisionAttack",
    "DeepFool",
    "Forward",
    "HopSkipJump",
    "MinimalAttack",
    "SigmaZero",
    "Square",
    "SurFree",
    "TargetedAPGD",
    "Transfer",
    "adapt",
    "cross_entropy",
    "dlr",
    "kl_divergence",
    "kl_from",
    "margin",
    "match_logits",
    "targeted_dlr",
    "value_and_gradient",
]
