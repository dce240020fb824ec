"""What a tracker is, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from softdefend.core.registry import Registry

MetricsRow = Mapping[str, Any]
"""A line of ``metrics.jsonl``."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that is tracked.

    Attributes:
        folder: the run folder.
        name: what tables and figures call the recipe.
        settings: plain values by dotted name.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a finished run has come to.

    Attributes:
        epoch: the last.
        numbers: accuracies in [0, 1] on the test images by name, such as ``last/pgd-20``.
        columns, rows: the same as a table, with counts and intervals.
        curves: learning curves as PNG, by title.
        report: the HTML page.
    """

    epoch: int
    numbers: Mapping[str, float]
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    curves: Mapping[str, bytes]
    report: Path


class Tracker(ABC):
    """One tracker of one run, open from its construction on.

    Args:
        run: the run.
        state: what the tracker keeps in the run folder, such as the id of its own run; empty at first. A
            later process that continues the run gets it back.
    """

    package: ClassVar[str | None] = None
    """What has to be installed, which is also the name of the extra."""
    rewrites: ClassVar[bool] = False
    """Whether an epoch that is trained again, after a kill, replaces what was logged of it."""

    def __init__(self, run: TrackedRun, state: dict[str, Any]) -> None:
        self.run, self.state = run, state

    @abstractmethod
    def log(self, rows: Sequence[MetricsRow], first: int) -> None:
        """Log epochs.

        Args:
            rows: of the whole run so far.
            first: those from this position on are new.
        """

    @abstractmethod
    def attach(self, outcome: Outcome) -> None:
        """Add the results of the finished run."""

    def close(self, *, finished: bool) -> None:  # noqa: B027 (files need no end)
        """End, for this process. ``finished``: the run is trained to its end."""


TRACKERS: Registry[type[Tracker]] = Registry("trackers")


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The measured values of a row; counters, words and what was not measured are left out."""
    return {name: value for name, value in row.items() if isinstance(value, float)}
