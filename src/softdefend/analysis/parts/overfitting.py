"""Robust overfitting (Rice et al., ICML 2020, arXiv 2002.11569), from a run's metrics alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from softdefend.analysis.part import PARTS, RunPart
from softdefend.analysis.results import PartResults, percent
from softdefend.analysis.runs import AnalyzedRun
from softdefend.report.content import Paragraph, Section, Table, figures
from softdefend.report.curves import learning_rate_drops, refinement_start
from softdefend.report.details import is_number
from softdefend.report.figures import Series, epoch_plot
from softdefend.report.runs import Group, RunRecord
from softdefend.report.tables import ABSENT

COLUMNS = ("train_clean", "train_robust", "val_clean", "val_robust", "test_clean", "test_robust")


_HELD_OUT = {"test": "test images", "val": "validation images"}
_ENDS = ("best", "last", "difference")


@PARTS.register("overfitting")
class Overfitting(RunPart):
    """What robust accuracy was lost between the best and the last epoch."""

    order = 10

    def measure(self, run: AnalyzedRun) -> dict[str, Any]:
        return measure_overfitting(run.record)

    def section(self, results: PartResults) -> Section:
        """Curves by epoch, and a table of best, last and difference."""
        by_run = {one.run: one.result for one in results.measurements}
        groups = [_with_gap(name, results.records[name], by_run[name]["gap_robust"]) for name in by_run]
        kinds = list(dict.fromkeys(result["held_out"] for result in by_run.values()))
        side = kinds[0] if len(kinds) == 1 else "val"
        plots = [
            epoch_plot(
                f"{title} accuracy",
                groups,
                results.color,
                [Series(f"{side}_{kind}", _HELD_OUT[side]), Series(f"train_{kind}", "training images")],
                "%",
            )
            for kind, title in (("robust", "Robust"), ("clean", "Clean"))
        ]
        gap = epoch_plot("Robust generalisation gap", groups, results.color, [Series("gap", "")], "%")
        head = ["run", "best epoch", *(f"{side} robust, {at}" for side in ("val", "test") for at in _ENDS)]
        head += ["robust gap, best", "robust gap, last", "gap to"]
        table = Table("Best and last epoch", head, [_table_row(name, one) for name, one in by_run.items()])
        note = (
            "Accuracy in per cent. Best: the epoch of highest robust validation accuracy. Difference: best "
            "minus last. Gap: training accuracy minus that on the images named. Accuracies on training and "
            "validation images are against the labels as given."
        )
        return Section("Robust overfitting", [*figures(*plots, gap), table, Paragraph(note)])


def _with_gap(name: str, record: RunRecord, gaps: list[float | None]) -> Group:
    """A run as a group of its own, whose metrics have the gap as one more column."""
    rows = [{**row, "gap": gap} for row, gap in zip(record.metrics, gaps, strict=True)]
    return Group(name, (replace(record, metrics=rows),))


def _table_row(name: str, result: Mapping[str, Any]) -> list[str]:
    best, last, lost = (result[key] or {} for key in _ENDS)
    return [
        name,
        str(best.get("epoch", ABSENT)),
        *(percent(one.get("val_robust")) for one in (best, last, lost)),
        *(percent(one.get("test_robust")) for one in (best, last, lost)),
        *(percent(one.get("gap_robust")) for one in (best, last)),
        _HELD_OUT[result["held_out"]],
    ]


def measure_overfitting(run: RunRecord) -> dict[str, Any]:
    """Accuracies by epoch, the best epoch, the last one, and what lies between them.

    ``best`` is the epoch of the highest robust validation accuracy, the earlier one on a tie, as training
    selects it. ``difference`` is best minus last, so that positive numbers are accuracy that was lost. The
    generalisation ``gap`` is training minus held-out accuracy, on test images where the run monitored some
    and on validation images otherwise (``held_out`` says which). Accuracies are in [0, 1], None where the
    run did not measure them.

    Training accuracy is counted in train mode against the labels as given: with label noise the gap has
    the noise in it.
    """
    rows = run.metrics
    held_out = "test" if any(is_number(row.get("test_robust")) for row in rows) else "val"
    measured = [row for row in rows if is_number(row.get("val_robust"))]
    best = max(measured, key=lambda row: (row["val_robust"], -row["epoch"]), default=None)
    last = rows[-1] if rows else None
    return {
        "epochs": [row["epoch"] for row in rows],
        "lr": [row.get("lr") for row in rows],
        "curves": {name: [row.get(name) for row in rows] for name in COLUMNS},
        "gap_robust": [_gap(row, held_out, "robust") for row in rows],
        "gap_clean": [_gap(row, held_out, "clean") for row in rows],
        "target_entropy": [row.get("target_entropy") for row in rows],
        "learning_rate_drops": learning_rate_drops(run),
        "refinement_start": refinement_start(run),
        "held_out": held_out,
        "best": _row(best, held_out),
        "last": _row(last, held_out),
        "difference": {name: _minus(best, last, name) for name in COLUMNS} if best and last else None,
    }


def _row(row: dict[str, Any] | None, held_out: str) -> dict[str, Any] | None:
    if row is None:
        return None
    gaps = {f"gap_{kind}": _gap(row, held_out, kind) for kind in ("clean", "robust")}
    return {"epoch": row["epoch"], **{name: row.get(name) for name in COLUMNS}, **gaps}


def _gap(row: dict[str, Any], held_out: str, kind: str) -> float | None:
    ours, theirs = row.get(f"train_{kind}"), row.get(f"{held_out}_{kind}")
    return ours - theirs if is_number(ours) and is_number(theirs) else None


def _minus(best: dict[str, Any], last: dict[str, Any], name: str) -> float | None:
    a, b = best.get(name), last.get(name)
    return a - b if is_number(a) and is_number(b) else None
