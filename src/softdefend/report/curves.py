"""From runs to the lines of a figure: points by epoch or by eps, one line for each recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from softdefend.report.details import is_number
from softdefend.report.runs import Group, RunRecord, setting


@dataclass(frozen=True)
class Line:
    """A mean line with a band; all of the same length.

    Attributes:
        x: where.
        y: the mean over runs.
        low, high: the band: smallest and largest run, or the interval of a single run's evaluation. Equal
            to y where there is neither.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def by_epoch(runs: Sequence[RunRecord], name: str, scale: float = 1.0) -> Line | None:
    """A column of the metrics by epoch: mean, smallest and largest over runs.

    Only epochs that every run with this column has count, so that a mean is always over the same runs.
    None where there is no such epoch.
    """
    columns = [
        {row["epoch"]: scale * row[name] for row in run.metrics if is_number(row.get(name))} for run in runs
    ]
    columns = [column for column in columns if column]
    return _line([{float(epoch): (y, y, y) for epoch, y in column.items()} for column in columns])


def by_eps(runs: Sequence[RunRecord], which: str, per: float) -> Line | None:
    """Robust accuracy in per cent against eps in units of ``1 / per``, for one checkpoint.

    The band is the evaluation's interval for a single run, smallest and largest over several runs.
    """
    curves = [run.evaluations.get(which, {}).get("eps_curve") or [] for run in runs]
    return _line([{_eps(row, per): _interval(row) for row in curve} for curve in curves if curve])


def _eps(row: dict[str, Any], per: float) -> float:
    return round(per * float(row["value"]), 9)


def _interval(row: dict[str, Any]) -> tuple[float, float, float]:
    rate, low, high = row["rate"], row.get("low"), row.get("high")
    return 100 * rate, 100 * (low if is_number(low) else rate), 100 * (high if is_number(high) else rate)


def _line(columns: list[dict[float, tuple[float, float, float]]]) -> Line | None:
    if not columns:
        return None
    shared = sorted(set.intersection(*(set(column) for column in columns)))
    if not shared:
        return None
    single = len(columns) == 1
    values = [[column[x][0] for column in columns] for x in shared]
    return Line(
        x=tuple(shared),
        y=tuple(sum(row) / len(row) for row in values),
        low=tuple(columns[0][x][1] if single else min(v) for x, v in zip(shared, values, strict=True)),
        high=tuple(columns[0][x][2] if single else max(v) for x, v in zip(shared, values, strict=True)),
    )


def learning_rate_drops(run: RunRecord) -> list[int]:
    """Epochs after which the learning rate fell to half or less: the steps of a step schedule.

    A smooth schedule has none, but for the very end, where it falls by half many times; these are left out
    by asking that the rate was level before the drop.
    """
    return drops(run.metrics)


def drops(metrics: Sequence[Mapping[str, Any]]) -> list[int]:
    """The same from the rows of a run's metrics."""
    rates = [(row["epoch"], row["lr"]) for row in metrics if is_number(row.get("lr"))]
    triples = zip(rates, rates[1:], rates[2:], strict=False)
    return [epoch for (_, a), (epoch, b), (_, c) in triples if a == b and 2 * c <= b]


def refinement_start(run: RunRecord) -> int | None:
    """The epoch after which the phase of the label rule first changed, or None."""
    pairs = zip(run.metrics, run.metrics[1:], strict=False)
    return next((a["epoch"] for a, b in pairs if a.get("phase") != b.get("phase")), None)


def all_drops(groups: Sequence[Group]) -> list[int]:
    """Learning-rate drops of all runs together, in ascending order."""
    return sorted({epoch for group in groups for run in group.runs for epoch in learning_rate_drops(run)})


def eps_unit(runs: Sequence[RunRecord]) -> float:
    """255 where every eps of the curves is written in 1/255, else 1."""
    curves = [e.get("eps_curve") or [] for run in runs for e in run.evaluations.values()]
    written = [str(row.get("eps", "")) for curve in curves for row in curve]
    return 255.0 if written and all(text == "0" or text.endswith("/255") for text in written) else 1.0


def trained_eps(run: RunRecord) -> float | None:
    """The eps of the training threat as a number, or None where it is not written as one."""
    try:
        return float(Fraction(str(setting(run, "threat.eps"))))
    except (ValueError, ZeroDivisionError):
        return None


def first_with(groups: Sequence[Group], names: Sequence[str]) -> str | None:
    """The first of these metrics columns that any run has numbers in."""
    rows = [row for group in groups for run in group.runs for row in run.metrics]
    return next((name for name in names if any(is_number(row.get(name)) for row in rows)), None)
