"""The trackers of a run in one process."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from softdefend.core.errors import SettingError
from softdefend.core.files import parse_json, write_atomic
from softdefend.training.trackers.base import TRACKERS, MetricsRow, Outcome, TrackedRun, Tracker

log = logging.getLogger(__name__)


class Trackers:
    """Opens trackers when there is something to log, and continues what an earlier process has logged.

    ``trackers.json`` in the run folder holds the last logged epoch of each, and what it needs to continue.
    What a tracker fails at is a warning: the run goes on without it.

    Args:
        names: of the trackers.
        run: the run.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        self.names, self.run = list(names), run
        self._open: dict[str, Tracker] = {}
        self._path = run.folder / "trackers.json"
        self._states: dict[str, dict[str, Any]] | None = None

    def log(self, rows: Sequence[MetricsRow]) -> None:
        """Log the epochs that have not been logged.

        Args:
            rows: of the whole run so far; the last one is new.
        """
        for name in tuple(self.names):
            self._try(name, lambda tracker: _log(tracker, rows))

    def attach(self, digest: str, outcome: Callable[[], Outcome]) -> None:
        """Add the results of the finished run, unless the same ones are there already.

        Args:
            digest: of what the results are made from.
            outcome: makes them.
        """
        todo = [name for name in self.names if self._state(name).get("attached") != digest]
        made = outcome() if todo else None

        def attach(tracker: Tracker) -> None:
            assert made is not None
            tracker.attach(made)
            tracker.state["attached"] = digest

        for name in todo:
            self._try(name, attach)

    def close(self, *, finished: bool) -> None:
        """Close those that are open. ``finished``: the run is trained to its end."""
        for name in tuple(self._open):
            self._try(name, lambda tracker: tracker.close(finished=finished))
        self._open.clear()

    def _try(self, name: str, use: Callable[[Tracker], None]) -> None:
        """Use a tracker, opened if need be; one that fails is not used again."""
        try:
            if name not in self._open:
                self._open[name] = TRACKERS[name](self.run, self._state(name))
            use(self._open[name])
            write_atomic(self._path, json.dumps(self._states, indent=1).encode())
        except Exception as error:  # of somebody else's package, disk or server
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("tracker %s is left out from here on (%s); metrics.jsonl has all", name, reason)
            self.names.remove(name)
            self._open.pop(name, None)

    def _state(self, name: str) -> dict[str, Any]:
        if self._states is None:
            self._states = self._read()
        return self._states.setdefault(name, {})

    def _read(self) -> dict[str, dict[str, Any]]:
        """What earlier processes have left; nothing where it is damaged."""
        try:
            content = parse_json(self._path.read_bytes())
        except (OSError, ValueError, SettingError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {name: state for name, state in content.items() if isinstance(state, dict)}


def _log(tracker: Tracker, rows: Sequence[MetricsRow]) -> None:
    logged = tracker.state.get("epoch")
    logged = logged if isinstance(logged, int) else 0
    if tracker.rewrites:
        logged = min(logged, rows[-1]["epoch"] - 1)
    first = sum(row["epoch"] <= logged for row in rows)
    if first < len(rows):
        tracker.log(rows, first)
        tracker.state["epoch"] = rows[-1]["epoch"]
