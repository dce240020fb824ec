"""softdefend: image classifiers that withstand adversarial attack, trained without robust overfitting."""

__version__ = "0.1.0"

from softdefend.api import evaluate, train
from softdefend.attacks import FGSM, PGD
from softdefend.data import DataSettings, from_tensors, load
from softdefend.errors import DivergenceError, SettingError
from softdefend.labels import ADR, KD, SAT, SGLR, Hard, Smooth
from softdefend.models import normalised
from softdefend.objectives import FGSMRS, MART, MLCAT, NFGSM, PGDAT, SCE, TE, TRADES, TRADESTE, Consistency
from softdefend.threat import ThreatModel
from softdefend.training import OptimSettings, Schedule
from softdefend.weights import AWP, EMA, SWA, Plain

__all__ = [
    "ADR",
    "AWP",
    "EMA",
    "FGSM",
    "FGSMRS",
    "KD",
    "MART",
    "MLCAT",
    "NFGSM",
    "PGD",
    "PGDAT",
    "SAT",
    "SCE",
    "SGLR",
    "SWA",
    "TE",
    "TRADES",
    "TRADESTE",
    "Consistency",
    "DataSettings",
    "DivergenceError",
    "Hard",
    "OptimSettings",
    "Plain",
    "Schedule",
    "SettingError",
    "Smooth",
    "ThreatModel",
    "evaluate",
    "from_tensors",
    "load",
    "normalised",
    "train",
]
