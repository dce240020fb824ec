"""Learning-rate schedules: pure functions of where the run is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from softdefend.core.errors import SettingError
from softdefend.core.hints import check_fields

_ONE_CYCLE_FIRST, _ONE_CYCLE_LAST = 1 / 25, 1 / 25 / 1e4
"""torch's defaults."""


@dataclass(frozen=True)
class Schedule:
    """Factor on the base learning rate over the run.

    Args:
        kind: ``step`` multiplies by ``gamma`` at each milestone and changes between epochs only;
            ``cosine`` falls from 1 to 0; ``cyclic`` rises linearly from 0 to 1 at ``peak`` and falls
            linearly to 0; ``one-cycle`` rises from 1/25 to 1 at ``peak`` and falls to 1/250,000, both along
            half a cosine, as torch's ``OneCycleLR`` does. The last three change at every step.
        milestones: fractions of the run, increasing, in (0, 1); 0.5 of 200 epochs drops after 100 epochs.
            Rounded to whole epochs, halves to the even one.
        gamma: factor at a milestone, in (0, 1].
        one_based: count epochs from one when comparing with milestones, as the published SGLS code does.
            Every drop then comes one epoch earlier (after 99 epochs of 200).
        peak: fraction of the run at which ``cyclic`` and ``one-cycle`` peak, in (0, 1).
        warmup: fraction of the run, in [0, 1), over which the factor of ``kind`` is multiplied by a number
            that rises linearly from 0 to 1. With 0, as in the published protocols, the run starts at the full
            rate. A network may then stay at the accuracy of guessing for some epochs.

    Raises:
        SettingError: a value outside these ranges.
    """

    kind: Literal["step", "cosine", "cyclic", "one-cycle"] = "step"
    """step, cosine, cyclic or one-cycle."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """step: fractions of the run at which the rate drops."""
    gamma: float = 0.1
    """step: factor at each milestone."""
    one_based: bool = False
    """step: drop one epoch earlier, as the published SGLS code does."""
    peak: float = 0.5
    """cyclic, one-cycle: fraction of the run at which the rate peaks."""
    warmup: float = 0.0
    """Fraction of the run over which the rate rises from 0; none in the published protocols."""

    def __post_init__(self) -> None:
        check_fields(self, "schedule")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.kind not in ("step", "cosine", "cyclic", "one-cycle"):
            raise SettingError("schedule.kind", repr(self.kind), "step, cosine, cyclic or one-cycle")
        increasing = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not (increasing and all(0 < m < 1 for m in self.milestones)):
            raise SettingError("schedule.milestones", list(self.milestones), "increasing fractions in (0, 1)")
        if not 0 < self.gamma <= 1:
            raise SettingError("schedule.gamma", self.gamma, "a number in (0, 1]")
        if not 0 < self.peak < 1:
            raise SettingError("schedule.peak", self.peak, "a number in (0, 1)")
        if not 0 <= self.warmup < 1:
            raise SettingError("schedule.warmup", self.warmup, "a number in [0, 1)")

    def drops(self, epochs: int) -> list[int]:
        """Zero-based epochs at which a step schedule has just dropped."""
        shift = 1 if self.one_based else 0
        return [max(0, round(m * epochs) - shift) for m in self.milestones]

    def factor(self, epoch: int, fraction: float, epochs: int) -> float:
        """The factor at ``fraction`` in [0, 1) of zero-based ``epoch`` in a run of ``epochs``."""
        progress = (epoch + fraction) / epochs
        risen = progress / self.warmup if progress < self.warmup else 1.0
        if self.kind == "step":
            return risen * self.gamma ** sum(epoch >= drop for drop in self.drops(epochs))
        if self.kind == "cosine":
            return risen * 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind == "one-cycle":
            return risen * self._one_cycle(progress)
        return risen * (progress / self.peak if progress < self.peak else (1 - progress) / (1 - self.peak))

    def _one_cycle(self, progress: float) -> float:
        if progress < self.peak:
            return _half_cosine(_ONE_CYCLE_FIRST, 1.0, progress / self.peak)
        return _half_cosine(1.0, _ONE_CYCLE_LAST, (progress - self.peak) / (1 - self.peak))


def _half_cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))
