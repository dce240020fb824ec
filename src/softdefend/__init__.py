"""softdefend: image classifiers that withstand adversarial attack, trained without robust overfitting."""

from softdefend.attacks import FGSM, PGD
from softdefend.core.environment import VERSION
from softdefend.core.errors import DivergenceError, SettingError
from softdefend.core.threat import ThreatModel
from softdefend.data import DataSettings, from_tensors, load
from softdefend.experiments.api import evaluate, train
from softdefend.labels import ADR, KD, SAT, SGLR, Hard, Smooth
from softdefend.models import normalize
from softdefend.objectives import (
    FGSMRS,
    MART,
    MLCAT,
    NFGSM,
    PGDAT,
    SCE,
    TE,
    TRADES,
    TRADESTE,
    Consistency,
    GaussianNoise,
)
from softdefend.training import OptimSettings, Schedule
from softdefend.weights import AWP, EMA, SWA, Plain

__version__ = VERSION

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
    "GaussianNoise",
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
    "normalize",
    "train",
]
