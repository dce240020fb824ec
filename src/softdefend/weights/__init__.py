"""Weight rules: at which weights? See docs/methods for their cards."""

from softdefend.weights.averaging import EMA
from softdefend.weights.base import Plain, WeightRule

__all__ = ["EMA", "Plain", "WeightRule"]
