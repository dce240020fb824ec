"""Objectives: what do we minimise? One file each; see docs/methods for their cards."""

from softdefend.objectives.at import PGDAT
from softdefend.objectives.base import OBJECTIVES, Objective
from softdefend.objectives.consistency import Consistency
from softdefend.objectives.dajat import DAJAT
from softdefend.objectives.gaussian_noise import GaussianNoise
from softdefend.objectives.mart import MART
from softdefend.objectives.mlcat import MLCAT
from softdefend.objectives.multi_norm import MultiNorm
from softdefend.objectives.sce import SCE
from softdefend.objectives.single_step import FGSMRS, NFGSM
from softdefend.objectives.te import TE, TRADESTE
from softdefend.objectives.trades import TRADES

__all__ = [
    "DAJAT",
    "FGSMRS",
    "MART",
    "MLCAT",
    "NFGSM",
    "OBJECTIVES",
    "PGDAT",
    "SCE",
    "TE",
    "TRADES",
    "TRADESTE",
    "Consistency",
    "GaussianNoise",
    "MultiNorm",
    "Objective",
]
