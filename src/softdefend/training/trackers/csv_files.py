"""``metrics.csv`` and ``evaluation.csv`` in the run folder, for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from softdefend.core.files import write_atomic
from softdefend.training.trackers.base import TRACKERS, MetricsRow, Outcome, Tracker


@TRACKERS.register("csv")
class CSVFiles(Tracker):
    """One line an epoch and one line an attack. The files are always written whole, so that they are never
    ahead of the run or behind it."""

    rewrites = True

    def log(self, rows: Sequence[MetricsRow], first: int) -> None:
        """See :meth:`Tracker.log`."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines = ([_text(row.get(name)) for name in columns] for row in rows)
        _write(self.run.folder / "metrics.csv", columns, lines)

    def attach(self, outcome: Outcome) -> None:
        """See :meth:`Tracker.attach`."""
        _write(self.run.folder / "evaluation.csv", outcome.columns, outcome.rows)


def _text(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([columns, *rows])
    write_atomic(path, buffer.getvalue().encode())
