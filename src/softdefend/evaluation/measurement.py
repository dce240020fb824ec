"""A result beside the attacks: measured once, kept in a file of its own, and shown."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from softdefend.core.processes import ALONE
from softdefend.core.store import plain
from softdefend.evaluation.checkpoint import Checkpoint

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One thing that is measured of a checkpoint.

    Args:
        suffix: of the result file, behind the checkpoint's name, such as ``-audit``.
        settings: what the result depends on beside the network, the test data and the threat.
        measure: makes the result, plain values for JSON.
        text: the result as lines for the log.
        together: all processes measure it. Else it is for the first.
    """

    suffix: str
    settings: dict[str, Any]
    measure: Callable[[], dict[str, Any]]
    text: Callable[[dict[str, Any]], str]
    together: bool = False


def measured(checkpoint: Checkpoint, measurement: Measurement) -> dict[str, Any]:
    """The result of a measurement: what lies in its file where that was made from the same, else a new one.
    What it replaces is kept in ``evaluation/earlier``.

    Returns:
        What stands in ``evaluation/NAME{suffix}.json``.
    """
    inputs = checkpoint.inputs(measurement.settings)

    def make() -> dict[str, Any]:
        threat = inputs["threat"]
        return {
            "which": checkpoint.source.which,
            "epoch": checkpoint.metadata.get("epoch"),
            "split": "test",
            "settings": plain({**measurement.settings, **threat}),
            **checkpoint.facts,
            **threat,
            **measurement.measure(),
        }

    name, store = f"{checkpoint.source.name}{measurement.suffix}", checkpoint.store
    processes = checkpoint.source.processes if measurement.together else ALONE
    result = processes.from_first(lambda: store.find(name, inputs))
    if result is None:
        processes.from_first(lambda: checkpoint.set_aside(name, inputs))
        made = make()
        result = processes.from_first(lambda: store.write(name, inputs, made))
    _log.info(measurement.text(result))
    return result
