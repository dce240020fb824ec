"""MLflow."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from softdefend.training.trackers.base import TRACKERS, MetricsRow, Outcome, TrackedRun, Tracker, numbers

_EXPERIMENT = "softdefend"
_LONGEST = 6000
"""Characters of a parameter that MLflow stores."""
_MOST = 100
"""Parameters that it takes at once."""


@TRACKERS.register("mlflow")
class MLflow(Tracker):
    """A run of MLflow, in ``mlflow.db`` of the run folder, its files in ``mlflow/``.

    ``MLFLOW_TRACKING_URI`` names a server or a database of several runs in their place, and
    ``MLFLOW_EXPERIMENT_NAME`` the experiment. Processes that continue the run continue it under the same id.
    """

    package = "mlflow"

    def __init__(self, run: TrackedRun, state: dict[str, Any]) -> None:
        super().__init__(run, state)
        place = run.folder.resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client: Any = import_module("mlflow.tracking").MlflowClient(
            tracking_uri=uri or f"sqlite:///{quote(str(place / 'mlflow.db'))}"
        )
        if "id" in state:
            self._id = state["id"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = state["id"] = self._new(None if uri else (place / "mlflow").as_uri())

    def _new(self, artifacts: str | None) -> str:
        """A new run with the settings as parameters; its id."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifacts)
        made = self._client.create_run(experiment, run_name=self.run.name)
        identifier: str = made.info.run_id
        param = import_module("mlflow.entities").Param
        params = [param(name, str(value)[:_LONGEST]) for name, value in self.run.settings.items()]
        for start in range(0, len(params), _MOST):
            self._client.log_batch(identifier, params=params[start : start + _MOST])
        return identifier

    def log(self, rows: Sequence[MetricsRow], first: int) -> None:
        """See :meth:`Tracker.log`."""
        for row in rows[first:]:
            for name, value in numbers(row).items():
                self._client.log_metric(self._id, name, value, step=row["epoch"])

    def attach(self, outcome: Outcome) -> None:
        """See :meth:`Tracker.attach`."""
        for name, value in outcome.numbers.items():
            self._client.log_metric(self._id, f"test/{name}", value, step=outcome.epoch)
        for title, png in outcome.curves.items():
            self._client.log_image(self._id, Image.open(io.BytesIO(png)), f"curves/{title}.png")
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerows([outcome.columns, *outcome.rows])
        self._client.log_text(self._id, buffer.getvalue(), "evaluation.csv")
        self._client.log_artifact(self._id, str(Path(outcome.report)))

    def close(self, *, finished: bool) -> None:
        """See :meth:`Tracker.close`."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")
