"""softdefend: image classifiers that withstand adversarial attack, trained without robust overfitting."""

__version__ = "0.1.0"

from softdefend.api import evaluate, train
from softdefend.attacks import FGSM, PGD
from softdefend.data import DataSettings, from_tensors, load
from softdefend.errors import DivergenceError, SettingError
from softdefend.labels import SGLR, Hard, Smooth
from softdefend.models import normalised
from softdefend.objectives import PGDAT, TRADES
from softdefend.threat import ThreatModel
from softdefend.training import OptimSettings, Schedule
from softdefend.weights import EMA, Plain

__all__ = [
    "EMA",
    "FGSM",
    "PGD",
    "PGDAT",
    "SGLR",
    "TRADES",
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
