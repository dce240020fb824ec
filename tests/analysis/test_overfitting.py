from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from softdefend.analysis.parts.overfitting import measure_overfitting
from softdefend.report import RunRecord


def record(*rows: dict[str, Any]) -> RunRecord:
    return RunRecord(Path("run"), "run", 0, {}, {}, list(rows), {})


def row(epoch: int, train: float, val: float | None, test: float | None, lr: float = 0.1) -> dict[str, Any]:
    robust = {"train_robust": train, "val_robust": val, "test_robust": test}
    return {"epoch": epoch, "lr": lr, "phase": "hard", "train_clean": None, **robust}


def test_best_is_the_earlier_of_equals_and_the_difference_is_what_was_lost():
    found = measure_overfitting(
        record(
            row(1, 0.3, 0.25, 0.2), row(2, 0.5, 0.45, 0.4), row(3, 0.6, 0.45, 0.35), row(4, 0.9, 0.4, 0.25)
        )
    )
    assert (found["best"]["epoch"], found["last"]["epoch"]) == (2, 4)
    assert found["difference"]["test_robust"] == pytest.approx(0.15)
    assert found["difference"]["train_robust"] == pytest.approx(-0.4)
    assert found["difference"]["train_clean"] is None
    assert found["held_out"] == "test"
    assert found["gap_robust"] == pytest.approx([0.1, 0.1, 0.25, 0.65])
    assert found["best"]["gap_robust"] == pytest.approx(0.1)


def test_without_monitored_test_images_the_gap_is_to_validation_images():
    found = measure_overfitting(record(row(1, 0.3, None, None), row(2, 0.5, 0.2, None)))
    assert found["held_out"] == "val"
    assert found["gap_robust"] == [None, pytest.approx(0.3)]
    assert found["curves"]["test_robust"] == [None, None]


def test_drops_of_the_learning_rate_are_named_by_the_epoch_before():
    rates = [0.1, 0.1, 0.01, 0.01, 0.001]
    found = measure_overfitting(record(*(row(i, 0.1, 0.1, 0.1, lr) for i, lr in enumerate(rates, start=1))))
    assert found["learning_rate_drops"] == [2, 4]


def test_a_run_that_has_finished_no_epoch_has_nothing():
    found = measure_overfitting(record())
    assert (found["best"], found["last"], found["difference"], found["epochs"]) == (None, None, None, [])
