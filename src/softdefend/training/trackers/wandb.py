"""Weights & Biases."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from PIL import Image

from softdefend.training.trackers.base import TRACKERS, MetricsRow, Outcome, TrackedRun, Tracker, numbers


@TRACKERS.register("wandb")
class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, in ``wandb/`` of the run folder.

    Offline unless ``WANDB_MODE`` says otherwise; ``wandb sync RUN/wandb/offline-run-*`` uploads it then. The
    project is ``WANDB_PROJECT`` or softdefend. Processes that continue the run continue it under the same id.
    """

    package = "wandb"

    def __init__(self, run: TrackedRun, state: dict[str, Any]) -> None:
        super().__init__(run, state)
        self._wandb: Any = import_module("wandb")
        self._wandb_run = self._wandb.init(
            mode=os.environ.get("WANDB_MODE", "offline"),
            project=os.environ.get("WANDB_PROJECT", "softdefend"),
            dir=str(run.folder),
            id=state.setdefault("id", secrets.token_hex(4)),
            resume="allow",
            name=run.name,
            config=dict(run.settings),
            settings=self._wandb.Settings(console="off", silent=True),
        )

    def log(self, rows: Sequence[MetricsRow], first: int) -> None:
        """See :meth:`Tracker.log`."""
        for row in rows[first:]:
            self._wandb_run.log(numbers(row), step=row["epoch"])

    def attach(self, outcome: Outcome) -> None:
        """See :meth:`Tracker.attach`."""
        wandb = self._wandb
        content: dict[str, Any] = {
            "evaluation": wandb.Table(
                columns=list(outcome.columns), data=[list(row) for row in outcome.rows]
            ),
            "report": wandb.Html(outcome.report.read_text(), inject=False),
        }
        for title, png in outcome.curves.items():
            content[f"curves/{title}"] = wandb.Image(Image.open(io.BytesIO(png)))
        self._wandb_run.log(content, step=outcome.epoch + 1)
        self._wandb_run.summary.update({f"test/{name}": value for name, value in outcome.numbers.items()})

    def close(self, *, finished: bool) -> None:
        """See :meth:`Tracker.close`."""
        self._wandb_run.finish(exit_code=0 if finished else 1)
