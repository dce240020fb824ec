"""TensorBoard events in the run folder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from PIL import Image

from softdefend.training.trackers.base import TRACKERS, MetricsRow, Outcome, Tracker, numbers


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Events in ``tensorboard/`` of the run folder; no server, no network."""

    package = "tensorboard"
    rewrites = True

    def log(self, rows: Sequence[MetricsRow], first: int) -> None:
        """See :meth:`Tracker.log`. Events of later epochs, left by a killed process, are taken back."""
        with self._writer(purge_step=rows[first]["epoch"]) as writer:
            if first == 0:
                settings = yaml.safe_dump(dict(self.run.settings), sort_keys=False)
                writer.add_text("settings", _code(settings), rows[0]["epoch"])
            for row in rows[first:]:
                for name, value in numbers(row).items():
                    writer.add_scalar(name, value, row["epoch"])

    def attach(self, outcome: Outcome) -> None:
        """See :meth:`Tracker.attach`. Of the report its place is named: events hold no pages."""
        with self._writer() as writer:
            for name, value in outcome.numbers.items():
                writer.add_scalar(f"test/{name}", value, outcome.epoch)
            for title, png in outcome.curves.items():
                pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
                writer.add_image(f"curves/{title}", pixels, outcome.epoch, dataformats="HWC")
            writer.add_text("evaluation", _table(outcome), outcome.epoch)
            writer.add_text("report", str(outcome.report.resolve()), outcome.epoch)

    def _writer(self, **options: Any) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # needs an optional package

        return SummaryWriter(str(self.run.folder / "tensorboard"), **options)


def _code(text: str) -> str:
    """As Markdown shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table(outcome: Outcome) -> str:
    """The table in Markdown."""
    lines = [outcome.columns, ["---"] * len(outcome.columns), *outcome.rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
