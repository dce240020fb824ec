"""Objectives: what do we minimise? One file each; see docs/methods for their cards."""

from softdefend.objectives.at import PGDAT
from softdefend.objectives.base import Objective
from softdefend.objectives.trades import TRADES

__all__ = ["PGDAT", "TRADES", "Objective"]
