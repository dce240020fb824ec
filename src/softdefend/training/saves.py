"""What a run leaves in its folder as it goes, and how it continues from that."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softdefend.core.errors import SettingError
from softdefend.core.identity import RunIdentity
from softdefend.execution.engine import Engine
from softdefend.training.checkpoint import CheckpointError
from softdefend.training.config import TrainConfig
from softdefend.training.folder import RunFolder
from softdefend.training.state import RunState

log = logging.getLogger(__name__)


@dataclass
class RunSaves:
    """The checkpoints of a run, and its best and last weights."""

    config: TrainConfig
    engine: Engine
    state: RunState
    """What a checkpoint holds."""
    folder: RunFolder
    run: RunIdentity
    """What tells whose the weights are."""
    test_data: str
    """The digest of the test images that the weights are to be measured on."""
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Made so far."""
        return self.state.epoch * self.steps_per_epoch + self.state.done

    def save(self) -> None:
        """Write a checkpoint."""
        content = {"step": self.steps, "processes": self.engine.processes.size, **self.state.state_dict()}
        self.folder.checkpoints.save(self.steps, content)

    def keep_if_best(self, robust: float | None) -> None:
        """Write the weights of the epoch as the best ones where no earlier epoch has been as robust."""
        if robust is not None and robust > self.state.best.get("val_robust", -1.0):
            self.state.best = {"epoch": self.state.epoch, "val_robust": robust}
            self.release("best", self.state.best, pending=True)

    def release(self, which: str, metadata: Mapping[str, Any], *, pending: bool = False) -> None:
        """Write the weights that predict, with what tells whose they are. ``pending``: see
        :meth:`RunFolder.save_model`."""
        metadata = {
            **metadata,
            "step": self.steps,
            "checkpoint": which,
            "run": self.run._asdict(),
            "test_data": self.test_data,
        }
        self.folder.save_model(which, self.state.recipe.weight.prediction, metadata, pending=pending)

    def newest(self) -> str:
        """Where one can go on, in words."""
        try:
            paths = self.folder.checkpoints.paths()
        except SettingError as error:
            return f"the last checkpoint could not be written ({error.setting}: {error.given})"
        return f"the last good checkpoint is {paths[-1]}" if paths else "no checkpoint had been written"

    def restore(self, resume: Path | None) -> None:
        """Continue from a checkpoint, if there is one.

        Args:
            resume: the one to continue from, in place of the newest.

        Raises:
            CheckpointError: it is damaged or of another run, or was removed from beside weights.
        """
        processes = self.engine.processes
        content = processes.from_first(lambda: self._load(resume))
        if content is None:
            return
        before, now = content.get("processes", 1), processes.size
        if before != now and self.config.runtime.batch_norm == "per_process":
            given = f"{now} with batch normalization per process"
            raise SettingError("runtime.devices", given, f"{before} processes, with which the run began")
        self.state.load_state_dict(content)
        processes.from_first(lambda: self._restore_files(resume))
        if before != now:
            why = "sums are added in another order, which changes rounding"
            log.info(f"continues on {now} process(es), before on {before}: {why}")
        self._recall_best()

    def _load(self, resume: Path | None) -> dict[str, Any] | None:
        """The content of the checkpoint to continue from; None where a run begins."""
        place = self.engine.device if self.engine.processes.size == 1 else "cpu"
        content = self.folder.checkpoints.load(resume, place)
        if content is None:
            self._refuse_without_checkpoints()
            self.folder.restore("metrics.jsonl", self.state.metrics)
        return content

    def _restore_files(self, resume: Path | None) -> None:
        """Make the other files what the checkpoint knows of them."""
        self.folder.check_weights(self.run)
        self.folder.restore("metrics.jsonl", self.state.metrics)
        if resume is not None:
            self.folder.checkpoints.abandon(self.steps)

    def _refuse_without_checkpoints(self) -> None:
        """Weights are in place only once a checkpoint knows of them, so the checkpoints have been removed."""
        for name in ("last", "best"):
            if (path := self.folder.path / f"{name}.safetensors").exists():
                raise CheckpointError(
                    str(self.folder.path / "checkpoints"),
                    f"no checkpoint beside {path.name}",
                    "the run's checkpoints, or another --folder; softdefend evaluate needs none",
                )

    def _recall_best(self) -> None:
        """Make ``best.safetensors`` and the checkpoint agree on which epoch is the best."""
        best, from_first = self.state.best, self.engine.processes.from_first
        if from_first(lambda: self.folder.recall("best", best.get("epoch"))) or not best:
            return
        rest = "it is chosen anew from the epochs to come"
        if self.state.epoch >= self.config.optim.epochs:
            rest = "no epoch is left to choose it from; evaluate --which last needs none"
        log.warning("best.safetensors is not of epoch %d, the best so far; %s", best["epoch"], rest)
        self.state.best = {}
