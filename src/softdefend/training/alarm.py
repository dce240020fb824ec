"""Alarms about a run that goes wrong quietly.

The one for catastrophic overfitting: training on one gradient step may end in a network that withstands
exactly that step, and nothing else (Wong et al., arXiv 2001.03994). The one for a network that still guesses,
and what else an epoch shows, are in :mod:`softdefend.training.hints`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from softdefend.core.errors import DivergenceError
from softdefend.training.config import Recipe
from softdefend.training.hints import hints
from softdefend.training.settings import ValidateSettings

log = logging.getLogger(__name__)

GAP = 0.2
"""FGSM must leave at least this much more accuracy than the validation attack; Wong et al. stop a run whose
PGD accuracy falls by as much."""
SHARE = 0.25
"""The validation attack must leave less than this share of what FGSM leaves."""


def trains_on_one_step(recipe: Recipe) -> bool:
    """Whether the training attack takes a single gradient step, whatever objective it belongs to."""
    return 0 < recipe.objective.attack_units(recipe.attack.steps) <= 2


def collapsed(fgsm: float, robust: float) -> bool:
    """Whether the network withstands one step and not several, on the same images.

    Both thresholds must be crossed: the gap alone would alarm at large eps, where FGSM is far weaker than
    PGD on sound networks too; the share alone at accuracies near zero, where it is a matter of a few images.
    The two figures are of one moment, so an alarm needs no history: not when it collapses in the first
    epoch, not after a resume.

    Args:
        fgsm: accuracy in [0, 1] under FGSM.
        robust: accuracy in [0, 1] under an attack of several steps, such as PGD-10.
    """
    return fgsm - robust >= GAP and robust < SHARE * fgsm


def describe(epoch: int, fgsm: float, robust: float, attack: str) -> str:
    """One line for people."""
    return (
        f"catastrophic overfitting in epoch {epoch}: validation accuracy is {100 * fgsm:.1f}% under FGSM "
        f"and {100 * robust:.1f}% under {attack}; a smaller eps, NFGSM with more noise or more attack steps "
        "may help"
    )


class Failure(NamedTuple):
    """What makes further training useless."""

    name: str
    text: str


class Alarms:
    """Looks at the row of every epoch and warns once of each thing that goes wrong.

    Args:
        settings: say what to do about a failure: warn, stop or nothing.
        steps_per_epoch: of training.
        k: number of classes.
        soft: whether nearly uniform labels are as they should be.
    """

    def __init__(self, settings: ValidateSettings, steps_per_epoch: int, k: int, *, soft: bool) -> None:
        self.settings, self.steps_per_epoch, self.k, self.soft = settings, steps_per_epoch, k, soft
        self._warned: set[str] = set()

    def inspect(self, row: dict[str, Any]) -> Failure | None:
        """Mark an epoch's row with what was found, and warn of what need not end the run.

        Returns:
            The failure to :meth:`raise_or_warn` of once the row is written; None where training may go on.
        """
        if row.get("val_fgsm") is not None:
            row["catastrophic_overfitting"] = collapsed(row["val_fgsm"], row["val_robust"])
        found = dict(hints(row, self.steps_per_epoch, self.k, soft=self.soft))
        if found:
            row["hints"] = list(found)
        for name, text in found.items():
            if name != "stuck":  # that one is a failure
                self._warn(name, text)
        return self._failure(row, found)

    def stops(self, failure: Failure | None) -> bool:
        """Whether a failure ends the run."""
        return failure is not None and self.settings.alarm == "stop"

    def raise_or_warn(self, failure: Failure, best: Mapping[str, Any]) -> None:
        """Do about a failure what the settings say.

        Args:
            failure: what was found.
            best: ``epoch`` and ``val_robust`` of the best checkpoint; empty where there is none.

        Raises:
            DivergenceError: the run is to stop.
        """
        if not self.stops(failure):
            self._warn(*failure)
            return
        kept = "no epoch before it was validated"
        if best:
            share = 100 * best["val_robust"]
            kept = f"the best checkpoint is of epoch {best['epoch']}, {share:.1f}%"
        raise DivergenceError(f"{failure.text}; {kept}")

    def _failure(self, row: Mapping[str, Any], found: Mapping[str, str]) -> Failure | None:
        if row.get("catastrophic_overfitting"):
            figures = row["epoch"], row["val_fgsm"], row["val_robust"]
            return Failure("catastrophic overfitting", describe(*figures, self.settings.attack.name))
        if "stuck" in found and self.settings.alarm != "off":
            return Failure("stuck", found["stuck"])
        return None

    def _warn(self, name: str, text: str) -> None:
        if name not in self._warned:
            log.warning(text)
        self._warned.add(name)
