"""softdefend: image classifiers that withstand adversarial attack, trained without robust overfitting."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from softdefend.core.errors import DivergenceError, SettingError
from softdefend.core.version import VERSION

if TYPE_CHECKING:
    from softdefend.attacks import FGSM, PGD
    from softdefend.core.threat import ThreatModel
    from softdefend.data import DataSettings, from_tensors, load
    from softdefend.experiments.api import evaluate, train
    from softdefend.labels import ADR, KD, SAT, SGLR, Hard, ReBAT, Smooth
    from softdefend.models import normalize
    from softdefend.objectives import (
        DAJAT,
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
        MultiNorm,
    )
    from softdefend.publish.hub import from_pretrained
    from softdefend.training import OptimSettings, Schedule
    from softdefend.weights import AWP, EMA, SWA, Plain

__version__ = VERSION

_NAMES = {
    "publish.hub": "from_pretrained",
    "attacks": "FGSM PGD",
    "core.threat": "ThreatModel",
    "data": "DataSettings from_tensors load",
    "experiments.api": "evaluate train",
    "labels": "ADR Hard KD ReBAT SAT SGLR Smooth",
    "models": "normalize",
    "objectives": "Consistency DAJAT FGSMRS GaussianNoise MART MLCAT MultiNorm NFGSM PGDAT SCE TE TRADES "
    "TRADESTE",
    "training": "OptimSettings Schedule",
    "weights": "AWP EMA SWA Plain",
}
"""Names of this package's modules, imported at their first use: torch alone takes more than a second."""
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
_FOLDERS = (
    "analysis",
    "attacks",
    "cli",
    "core",
    "data",
    "evaluation",
    "execution",
    "experiments",
    "labels",
    "models",
    "objectives",
    "publish",
    "report",
    "training",
    "weights",
)

__all__ = [
    "ADR",
    "AWP",
    "DAJAT",
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
    "MultiNorm",
    "OptimSettings",
    "Plain",
    "ReBAT",
    "Schedule",
    "SettingError",
    "Smooth",
    "ThreatModel",
    "evaluate",
    "from_pretrained",
    "from_tensors",
    "load",
    "normalize",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f"softdefend.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"softdefend.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})
