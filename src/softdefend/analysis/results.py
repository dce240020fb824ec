"""What parts have measured, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from softdefend.report.content import Folded, Table
from softdefend.report.figures import shades
from softdefend.report.runs import RunRecord
from softdefend.report.tables import ABSENT


@dataclass(frozen=True)
class Measurement:
    """The result of one part for one network, or for a run as a whole.

    Attributes:
        run: the run's name.
        weights: ``best``, ``last`` or a checkpoint; empty for a run as a whole.
        epoch: of these weights; None where it is not known.
        result: plain values.
    """

    run: str
    weights: str
    epoch: int | None
    result: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The weights in words, with their epoch."""
        known = self.epoch is not None and not self.is_checkpoint
        return f"{self.weights} (epoch {self.epoch})" if known else self.short_label

    @property
    def short_label(self) -> str:
        """The weights in a word: best, last, or a checkpoint's epoch."""
        return f"epoch {self.epoch}" if self.is_checkpoint and self.epoch is not None else self.weights

    @property
    def is_checkpoint(self) -> bool:
        """Whether the weights are those of a checkpoint, not ``best`` or ``last``."""
        return self.weights not in ("best", "last")


@dataclass(frozen=True)
class PartResults:
    """Everything that one part measured in an analysis.

    Attributes:
        records: all runs of the analysis by name.
        measurements: run by run, in the order in which the weights were asked for.
    """

    records: Mapping[str, RunRecord]
    measurements: Sequence[Measurement]

    @cached_property
    def color(self) -> dict[str, str]:
        """One color for each run, the same in all parts."""
        return dict(zip(self.records, shades(len(self.records)), strict=True))

    @property
    def first(self) -> Mapping[str, Any]:
        """The first result, for what all results have in common."""
        return self.measurements[0].result

    def final(self) -> Iterator[Measurement]:
        """One measurement for each run, which is what a figure can hold: of ``last``, else the last one."""
        for _, group in groupby(self.measurements, key=lambda one: one.run):
            members = list(group)
            yield next((one for one in members if one.weights == "last"), members[-1])


def finite(value: Any) -> Any:
    """The same plain values with None for every number that JSON cannot write."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: Any, digits: int = 3) -> str:
    """A number as text, a dash for None."""
    if value is None:
        return ABSENT
    return f"{value:.{digits}f}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share as per cent, a dash for None."""
    return number(None if value is None else 100 * value, 1)


def folded_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Folded:
    """A long table, behind its figures."""
    return Folded(f"{caption}: all numbers", [Table(caption, head, rows)])
