"""What trackers are given of a finished run: figures, tables and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from softdefend.core.digest import value_digest
from softdefend.report import RunRecord
from softdefend.report.comparison import compare_runs
from softdefend.report.content import Figures
from softdefend.report.embed import png
from softdefend.report.sections import learning_curves
from softdefend.training.trackers import Outcome, Trackers

_COLUMNS = ("checkpoint", "epoch", "attack", "images", "accuracy", "low", "high")


def attach(trackers: Trackers, run: RunRecord, report: Path) -> None:
    """Give trackers the results of a finished run, unless they have them."""
    if trackers.names:
        trackers.attach(value_digest([run.metrics, run.evaluations]), lambda: outcome(run, report))


def outcome(run: RunRecord, report: Path) -> Outcome:
    """Accuracies on the test images, as numbers and as a table, and the learning curves."""
    rows = [row for which, evaluation in run.evaluations.items() for row in _rows(which, evaluation)]
    section = learning_curves(compare_runs([run]))
    blocks = section.blocks if section else ()
    plots = [plot for block in blocks if isinstance(block, Figures) for plot in block.plots]
    return Outcome(
        epoch=run.metrics[-1]["epoch"],
        numbers={f"{row[0]}/{row[2]}": float(row[4]) for row in rows},
        columns=_COLUMNS,
        rows=rows,
        curves={plot.title: png(plot.figure) for plot in plots},
        report=report,
    )


def _rows(which: str, evaluation: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    worst = {"worst": evaluation["worst"]} if evaluation.get("worst") else {}
    for name, one in {"clean": evaluation["clean"], **evaluation["attacks"], **worst}.items():
        interval = one.get("low"), one.get("high")
        yield which, evaluation.get("epoch"), name, evaluation.get("n"), one["rate"], *interval
