"""The training loop."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from softdefend.core import rng
from softdefend.core.errors import DivergenceError, SettingError
from softdefend.core.identity import RunIdentity, settings_digest
from softdefend.core.rule import RunInfo
from softdefend.core.yaml_files import flatten
from softdefend.data import Augmented, DataBundle, fingerprint
from softdefend.evaluation.preflight import check_eps
from softdefend.execution.batch_norm import synchronize
from softdefend.execution.engine import Engine
from softdefend.execution.network_mode import keep_frozen
from softdefend.models.recompute import recompute_blocks
from softdefend.training.alarm import Alarms, Failure
from softdefend.training.config import TrainConfig
from softdefend.training.divergence import divergence
from softdefend.training.extra import check_extra, steps_with_extra
from softdefend.training.folder import RunFolder, SilentFolder
from softdefend.training.network_checks import check_script, check_smallest_batch
from softdefend.training.optim import make_optimizer
from softdefend.training.plain import plain_config
from softdefend.training.ramp import ramp
from softdefend.training.saves import RunSaves
from softdefend.training.shares import check_agreement, check_shares
from softdefend.training.start import has_checkpoints, load_start, record_start
from softdefend.training.state import RunState
from softdefend.training.step import METERS, Phase, TrainStep
from softdefend.training.trackers import TrackedRun, Trackers
from softdefend.training.validation import Validator

log = logging.getLogger(__name__)

_CHECK_EVERY = 50
"""Steps between two looks at the loss, which make the host wait for the device."""


class Trainer:
    """Trains one network with one recipe in one run folder.

    A run that is killed at any moment and started again with the same settings ends in the same bits on the
    same machine: network, optimizer, averages, label memory and metrics.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k].
        bundle: training, validation and test data.
        config: all settings of the run.
        folder: the run folder; created where absent, continued where it holds a checkpoint.
        progress: show progress bars.

    Raises:
        SettingError: settings that do not fit the data, the device or the run in the folder.
    """

    def __init__(
        self,
        net: nn.Module,
        bundle: DataBundle,
        config: TrainConfig,
        folder: Path | str,
        *,
        progress: bool = True,
    ) -> None:
        config = record_start(config, Path(folder))
        recorded = plain_config(config)
        recorded.setdefault("data", {"source": bundle.name})
        self.config, self.recipe, self.optim = config, config.recipe, config.optim
        self.engine = Engine(config.runtime)
        self.processes = processes = self.engine.processes
        self.progress = progress and processes.first
        self.k = len(bundle.classes)
        check_eps(self.recipe.threat, bundle.train.images[0].numel())
        self.net = _prepare(net, self.engine)
        device, channels_last = self.engine.device, bool(self.engine.settings.channels_last)
        self.train_data = Augmented(
            bundle.train, device, config.augment, channels_last=channels_last, extra=bundle.extra
        )
        check_extra(self.train_data, self.recipe, self.optim)
        self.validator = Validator(bundle, config, self.engine)
        test_data = fingerprint(bundle.test)
        self.batch_size = self.optim.batch_size
        self.steps_per_epoch = self._steps_per_epoch()
        check_shares(self.train_data, self.recipe, self.optim, processes)
        if config.runtime.batch_norm == "synchronized":
            synchronize(self.net, processes)
        self.rules = self.recipe.rules
        started = None if has_checkpoints(Path(folder)) else load_start(self.net, config)
        run = RunInfo(
            self.train_data.labels, self.k, self.optim.epochs, self.net, self.engine.autocast, processes
        )
        for rule in self.rules:
            rule.setup(run)
        self.optimizer = make_optimizer(self.recipe.trained(self.net), self.optim, device)
        check_smallest_batch(self.net, self.train_data, self.recipe, self.optim, self.engine)
        check_script(self.net, self.train_data, self.recipe, self.optim.epochs)
        self.step = TrainStep(self.net, self.train_data, self.recipe, self.optimizer, self.engine, self.optim)
        self.alarms = Alarms(
            config.validate, self.steps_per_epoch, self.k, soft=self.recipe.label.softens_all
        )
        self.identity = RunIdentity(settings_digest(recorded), bundle.fingerprint)
        self.state = RunState(
            self.net,
            self.optimizer,
            self.recipe,
            self.step.meters,
            identity={
                "fingerprint": self.identity.data,
                "seed": config.seed,
                "settings": self.identity.settings,
            },
            place=Path(folder),
        )
        if started is not None:
            what = self.state.start_from(started)
            log.info(f"starts from {config.init_from}, after epoch {self.state.epoch}; {what}")
        check_agreement(processes, self.identity)
        self._open_folder(Path(folder), recorded)
        self.saves = RunSaves(
            config=config,
            engine=self.engine,
            state=self.state,
            folder=self.folder,
            run=self.identity,
            test_data=test_data,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _open_folder(self, path: Path, recorded: dict[str, Any]) -> None:
        """The run folder and the trackers; what was asked for is written there."""
        config, device = self.config, self.engine.device
        kind = RunFolder if self.processes.first else SilentFolder
        self.folder = kind(path, config.save.keep, background=device.type == "cuda")
        if config.save.archive is not None:
            self.folder.checkpoints.stride = config.save.archive * self.steps_per_epoch
        tracked = TrackedRun(self.folder.path, f"{config.name}-seed{config.seed}", flatten(recorded))
        self.trackers = Trackers(config.save.trackers if self.processes.first else (), tracked)
        try:
            self.folder.write_config(recorded)
            self.folder.write_environment(device, config.seed)
        except BaseException:
            self.folder.close()
            raise

    def close(self) -> None:
        """Let other processes into the run folder, and end the trackers' part in it."""
        self.trackers.close(finished=self.state.epoch >= self.optim.epochs)
        self.folder.close()

    def fit(
        self, resume: Path | None = None, on_epoch: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """Train to the end, from the newest checkpoint where there is one.

        Args:
            resume: a checkpoint of this run to continue from, in place of the newest.
            on_epoch: called with each metrics row.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another run.
            DivergenceError: the loss or a weight is no longer finite, the loss far above that of guessing and
                of the first step, or ``validate.alarm`` is ``stop`` and rings; the last good checkpoint is
                kept.
        """
        self.saves.restore(resume)
        try:
            with self.engine.training_numerics():
                while self.state.epoch < self.optim.epochs:
                    started = time.perf_counter()
                    row = self._train_epoch()
                    self.folder.append("timing.jsonl", self._timing(time.perf_counter() - started))
                    if on_epoch is not None:
                        on_epoch(row)
            self.saves.release("last", {"epoch": self.state.epoch})
        except BaseException as error:
            # What ended training is raised; what could not be written besides is a warning.
            try:
                self.folder.writer.wait()
            except SettingError as unwritten:
                if unwritten is not error:
                    log.warning(unwritten)
            raise
        self.folder.writer.wait()
        self.processes.wait()

    def _steps_per_epoch(self) -> int:
        n = self.train_data.n
        if self.batch_size > n:
            raise SettingError("optim.batch_size", self.batch_size, f"at most the {n} training images")
        if self.train_data.extra is not None:
            return steps_with_extra(self.train_data, self.optim)
        return n // self.batch_size if self.optim.drop_last else math.ceil(n / self.batch_size)

    def _train_epoch(self) -> dict[str, Any]:
        """One epoch with its validation and checkpoint; its metrics row."""
        phase = Phase(*(rule.phase(self.state.epoch) for rule in self.rules))
        self.step.set_eps(ramp(self.recipe.eps_ramp, self.state.epoch, self.optim.epochs))
        self._make_steps(phase)
        self.recipe.weight.end_epoch(self.state.epoch, self._training_images)
        row, failure = self._end_epoch(phase.label)
        if failure is not None:
            self.alarms.raise_or_warn(failure, self.state.best)
        self.saves.save()
        self.folder.settle("best")
        return row

    def _make_steps(self, phase: Phase) -> None:
        """The steps that are left of the current epoch."""
        state, views = self.state, self.recipe.objective.views
        strong = self.config.augment.is_strong(state.epoch, self.optim.epochs)
        plan = self.train_data.plan(
            seed=self.config.seed,
            epoch=state.epoch,
            views=views,
            strong=strong,
            batches=(self.steps_per_epoch, self.batch_size),
        )
        coming = torch.split(plan[state.done * self.batch_size :], self.batch_size)
        self.train_data.expect([self.step.own_rows(it) for it in coming[: self.steps_per_epoch - state.done]])
        with tqdm(
            total=self.steps_per_epoch,
            initial=state.done,
            desc=f"epoch {state.epoch + 1}/{self.optim.epochs}",
            unit="img",
            unit_scale=self.batch_size,
            leave=False,
            disable=None if self.progress else True,  # None: only on a terminal
        ) as bar:
            while state.done < self.steps_per_epoch:
                rows = plan[state.done * self.batch_size : (state.done + 1) * self.batch_size]
                self._make_step(rows, phase)
                bar.update()
                if state.first_loss is None:
                    self._check()
                if state.done % _CHECK_EVERY == 0:
                    bar.set_postfix(loss=f"{self._check()['loss']:.3f}", refresh=False)
                if self.config.save.every_steps and state.done % self.config.save.every_steps == 0:
                    self._check()
                    self.saves.save()

    def _make_step(self, rows: Tensor, phase: Phase) -> None:
        state = self.state
        self.step.set_lr(self._lr(state.done))
        for rule in self.rules:
            rule.advance(state.epoch + state.done / self.steps_per_epoch)
        self.step(rows, phase, rng.key(self.config.seed, "step", state.epoch, state.done))
        for rule in self.rules:
            rule.after_step()
        state.done += 1

    def _lr(self, step: int) -> float:
        """The learning rate of a step of the current epoch."""
        fraction = step / self.steps_per_epoch
        return self.optim.lr * self.optim.schedule.factor(self.state.epoch, fraction, self.optim.epochs)

    def _timing(self, seconds: float) -> dict[str, Any]:
        """What an epoch took, its validation included."""
        images = min(self.steps_per_epoch * self.batch_size, self.train_data.n)
        row = {"epoch": self.state.epoch, "seconds": seconds, "images_per_second": images / seconds}
        return row if self.train_data.waited is None else {**row, "waited": self.train_data.waited}

    def _training_images(self) -> Iterator[Tensor]:
        """One pass over the training images as they are. Sizes of batches differ by one image at most: a
        single one left over would have no statistics."""
        everything = torch.arange(self.train_data.n, device=self.engine.device)
        batches = math.ceil(self.train_data.n / max(self.batch_size, 2))
        for index in torch.tensor_split(everything, batches):
            yield self.train_data.take(self.processes.own(index)).image

    def _end_epoch(self, phase: str) -> tuple[dict[str, Any], Failure | None]:
        """The epoch's row, written, and what makes further training useless."""
        state = self.state
        means, lr = self._check(), self._lr(state.done - 1)
        self.step.meters.zero_()
        state.epoch, state.done = state.epoch + 1, 0
        row: dict[str, Any] = {
            "epoch": state.epoch,
            "step": self.saves.steps,
            "phase": phase,
            "lr": lr,
            **({"eps": self.step.eps} if self.recipe.eps_ramp else {}),
            "loss": means["loss"],
            "train_robust": means["adversarial_correct"],
            "train_clean": means["clean_correct"],
            "target_entropy": means["target_entropy"],
            **self.validator.measure(self.recipe.weight.prediction, state.epoch),
        }
        row = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        failure = self.alarms.inspect(row)
        if not self.alarms.stops(failure):  # otherwise no checkpoint will know of this epoch
            self.saves.keep_if_best(row["val_robust"])
        state.metrics += self.folder.append("metrics.jsonl", row)
        self.trackers.log([json.loads(line) for line in state.metrics.splitlines()])
        return row, failure

    def _check(self) -> dict[str, float]:
        """Means of the epoch so far, by name.

        Raises:
            DivergenceError: there is nothing left to learn from.
        """
        sums = dict(zip(METERS, self.step.meters.tolist(), strict=True))
        means = {name: value / max(sums["samples"], 1) for name, value in sums.items()}
        if self.state.first_loss is None and math.isfinite(means["loss"]):
            self.state.first_loss = means["loss"]
        if how := divergence(self.net, means["loss"], self.state.first_loss, self.k):
            raise DivergenceError(
                f"training diverged in epoch {self.state.epoch + 1}, step {self.state.done}: {how}; "
                f"{self.saves.newest()}; a lower optim.lr or fp32 precision may help"
            )
        return means


def _prepare(net: nn.Module, engine: Engine) -> nn.Module:
    """The network on the device, the same in all processes, in the form that the settings ask for."""
    net = net.to(engine.device)
    keep_frozen(net)
    engine.processes.copy_first_([*net.parameters(), *net.buffers()])
    if engine.settings.recompute:
        recompute_blocks(net)
    if engine.settings.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net
