"""TensorBoard events in the run folder."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from softdefend.training.trackers.base import TRACKERS, MetricsRow, Outcome, TrackedRun, Tracker, numbers


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Events in ``tensorboard/`` of the run folder; no server, no network."""

    package = "tensorboard"
    rewrites = True

    def __init__(self, run: TrackedRun, state: dict[str, Any]) -> None:
        super().__init__(run, state)
        self._open: Any = None

    def log(self, rows: Sequence[MetricsRow], first: int) -> None:
        """See :meth:`Tracker.log`. Events of later epochs, left by a killed process, are taken back."""
        writer = self._writer(purge_step=rows[first]["epoch"])
        if first == 0:
            settings = yaml.safe_dump(dict(self.run.settings), sort_keys=False)
            writer.add_text("settings", _code(settings), rows[0]["epoch"])
        for row in rows[first:]:
            for name, value in numbers(row).items():
                writer.add_scalar(name, value, row["epoch"])
        writer.flush()

    def attach(self, outcome: Outcome) -> None:
        """See :meth:`Tracker.attach`. Of the report its place is named: events hold no pages."""
        writer = self._writer()
        for name, value in outcome.numbers.items():
            writer.add_scalar(f"test/{name}", value, outcome.epoch)
        for title, png in outcome.curves.items():
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            writer.add_image(f"curves/{title}", pixels, outcome.epoch, dataformats="HWC")
        writer.add_text("evaluation", _table(outcome), outcome.epoch)
        writer.add_text("report", str(outcome.report.resolve()), outcome.epoch)
        writer.flush()

    def close(self, *, finished: bool) -> None:
        """See :meth:`Tracker.close`."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _writer(self, **options: Any) -> Any:
        """This process's file of events; ``options`` count when it is opened."""
        from torch.utils.tensorboard import SummaryWriter  # needs an optional package

        if self._open is None:
            folder = self.run.folder / "tensorboard"
            _wait_for_new_second(folder)
            self._open = SummaryWriter(str(folder), **options)
        return self._open


def _wait_for_new_second(folder: Path) -> None:
    """Wait until a file made now comes after those that are there.

    Events are read file by file in the order of their names, which hold the second of their making and then
    numbers that are no order of time.
    """
    if any(_second(path) == int(time.time()) for path in folder.glob("events.out.tfevents.*")):
        time.sleep(1 - time.time() % 1)


def _second(path: Path) -> int | None:
    """When a file of events was made, in seconds since 1970."""
    word = path.name.split(".")[3]
    return int(word) if word.isdecimal() else None


def _code(text: str) -> str:
    """As Markdown shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table(outcome: Outcome) -> str:
    """The table in Markdown."""
    lines = [outcome.columns, ["---"] * len(outcome.columns), *outcome.rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
