"""Label rules: which label do we believe? One file each; see docs/methods for their cards."""

from softdefend.labels.adr import ADR
from softdefend.labels.base import LABELS, BNMode, LabelRule, Predictions, SoftTerm, Supervision
from softdefend.labels.hard import Hard
from softdefend.labels.kd import KD
from softdefend.labels.rebat import ReBAT
from softdefend.labels.sat import SAT
from softdefend.labels.sglr import SGLR
from softdefend.labels.smooth import Smooth

__all__ = [
    "ADR",
    "KD",
    "LABELS",
    "SAT",
    "SGLR",
    "BNMode",
    "Hard",
    "LabelRule",
    "Predictions",
    "ReBAT",
    "Smooth",
    "SoftTerm",
    "Supervision",
]
