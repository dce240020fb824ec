"""The arithmetic of the benchmark of runs in parallel."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield runpy.run_path(str(BENCHMARKS / "parallel_runs.py"))
    for name in ("collect", "common"):
        sys.modules.pop(name, None)


def row(at_once, wall, each):
    return {"parallel": at_once, "wall_seconds": wall, "seconds_per_epoch": each}


def test_epochs_that_take_half_again_as_long_two_at_a_time_are_four_thirds_as_many(benchmark):
    found = benchmark["compared"]([row(1, 100.0, 4.0), row(2, 80.0, 6.0), row(4, 100.0, 20.0)])
    assert found["1"] == {"wall": 1.0, "epochs": 1.0}
    assert found["2"] == {"wall": 1.25, "epochs": 1.333}
    assert found["4"] == {"wall": 1.0, "epochs": 0.8}


def test_the_first_epoch_and_a_lonely_last_one_do_not_count(benchmark, tmp_path):
    for run, times in {"a": (50.0, 7.0, 7.0, 7.1), "b": (9.0, 7.0, 7.0, 3.0)}.items():
        folder = tmp_path / run
        folder.mkdir()
        lines = (json.dumps({"epoch": n, "seconds": t}) for n, t in enumerate(times, 1))
        (folder / "timing.jsonl").write_text("\n".join(lines) + "\n")
    found = benchmark["measured"](tmp_path, 2, 120.0, 2, 4)
    assert found["seconds_per_epoch"] == 7.0
    assert found["wall_seconds_per_run"] == 60.0
