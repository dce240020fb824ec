"""Label rules: which label do we believe? One file each; see docs/methods for their cards."""

from softdefend.labels.base import BNMode, LabelRule, Predictions, SoftTerm, Supervision
from softdefend.labels.hard import Hard
from softdefend.labels.sglr import SGLR
from softdefend.labels.smooth import Smooth

__all__ = ["SGLR", "BNMode", "Hard", "LabelRule", "Predictions", "Smooth", "SoftTerm", "Supervision"]
