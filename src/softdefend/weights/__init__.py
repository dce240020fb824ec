"""Weight rules: at which weights? See docs/methods for their cards."""

from softdefend.weights.averaging import EMA, SWA
from softdefend.weights.awp import AWP
from softdefend.weights.base import WEIGHTS, Plain, WeightRule

__all__ = [
    "AWP",
    "EMA",
    "SWA",
    "WEIGHTS",
    "Plain",
    "WeightRule",
]
