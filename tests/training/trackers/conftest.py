from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from softdefend.labels import Hard
from softdefend.objectives import PGDAT
from softdefend.training import OptimSettings, SaveSettings, Trainer
from tiny import Killed


@pytest.fixture
def tracked(make_trainer) -> Callable[..., Trainer]:
    """A function that trains three epochs with trackers, kills the process after some epochs and continues in
    another; with ``lost`` the last epoch before the kill got no checkpoint and is trained again."""

    def train(trackers, killed_after=None, lost=False, folder="run", first=None) -> Trainer:
        def part(names) -> Trainer:
            optim, save = OptimSettings(epochs=3, batch_size=16), SaveSettings(trackers=names)
            return make_trainer(Hard(), PGDAT(), folder=folder, optim=optim, save=save)

        def stop(row: dict[str, Any]) -> None:
            if row["epoch"] == killed_after:
                raise Killed

        if killed_after:
            started = part(trackers if first is None else first)
            with pytest.raises(Killed):
                started.fit(on_epoch=stop)
            started.close()
            if lost:
                max((started.folder.path / "checkpoints").iterdir()).unlink()
        trainer = part(trackers)
        trainer.fit()
        trainer.close()
        return trainer

    return train


@pytest.fixture
def rows() -> Callable[[Trainer], list[dict[str, Any]]]:
    """A function that reads a run's metrics."""

    def read(trainer: Trainer) -> list[dict[str, Any]]:
        lines = (trainer.folder.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return read
