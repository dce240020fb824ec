"""Robust overfitting (Rice et al., ICML 2020, arXiv 2002.11569), from a run's metrics alone."""

from __future__ import annotations

from typing import Any

from softdefend.report import RunRecord
from softdefend.report.curves import learning_rate_drops, refinement_start
from softdefend.report.details import is_number

COLUMNS = ("train_clean", "train_robust", "val_clean", "val_robust", "test_clean", "test_robust")


def overfitting(run: RunRecord) -> dict[str, Any]:
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
