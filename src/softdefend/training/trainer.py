"""The training loop."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from softdefend.attacks import FGSM, PGD
from softdefend.core import rng
from softdefend.core.errors import DivergenceError, SettingError
from softdefend.core.rule import Rule, RunInfo
from softdefend.data import Augmented, AugmentSettings, DataBundle, Resident, fingerprint
from softdefend.evaluation.autoattack import Ensemble
from softdefend.evaluation.evaluate import Evaluator
from softdefend.evaluation.preflight import check_eps
from softdefend.execution.engine import Engine, RuntimeSettings
from softdefend.execution.search_network import Precision, check_precision
from softdefend.training.alarm import collapsed, describe, trains_on_one_step
from softdefend.training.checkpoint import CheckpointError
from softdefend.training.folder import RunFolder
from softdefend.training.hints import hints
from softdefend.training.step import METERS, OptimSettings, Phase, Recipe, TrainStep, make_optimizer
from softdefend.weights import Plain, WeightRule


@dataclass(frozen=True)
class ValidateSettings:
    """What is measured after an epoch. The best checkpoint is chosen by robust validation accuracy."""

    attack: PGD = PGD(steps=10)
    """The attack on validation images."""
    every: int = 1
    """Epochs between validations, >= 1; the last epoch is always validated."""
    size: int | None = None
    """Validation images used, at most; all when null."""
    test_size: int = 0
    """Test images measured for the learning curve only, never for selection; 0 for none."""
    batch_size: int = 500
    """Images at once."""
    precision: Precision = "exact"
    """In which the attack searches: exact, strict or fast, as evaluate.precision."""
    alarm: Literal["warn", "stop", "off"] = "warn"
    """What to do about catastrophic overfitting, which is looked for where training takes one attack step,
    and about a network that still guesses after 5,000 steps: warn (one line), stop (keeping the best
    checkpoint) or off."""

    def __post_init__(self) -> None:
        check_precision(self.precision, "validate.precision")
        if self.alarm not in ("warn", "stop", "off"):
            raise SettingError("validate.alarm", repr(self.alarm), "warn, stop or off")
        for name, value, least in (
            ("every", self.every, 1),
            ("size", 1 if self.size is None else self.size, 1),
            ("test_size", self.test_size, 0),
            ("batch_size", self.batch_size, 1),
        ):
            if value < least:
                raise SettingError(f"validate.{name}", value, f"a whole number >= {least}")


@dataclass(frozen=True)
class SaveSettings:
    """How often the run can be picked up again."""

    every_steps: int | None = None
    """Steps between checkpoints within an epoch; only at the end of epochs when null."""
    keep: int = 2
    """Checkpoints to keep, >= 2: a damaged newest one leaves a previous good one."""
    archive: int | None = None
    """Epochs between checkpoints that are kept for good, for analyses by epoch; none when null."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the tensorboard extra)."""

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise SettingError("save.every_steps", self.every_steps, "a whole number >= 1, or null")
        if self.archive is not None and self.archive < 1:
            raise SettingError("save.archive", self.archive, "a whole number >= 1, or null")
        if self.keep < 2:
            raise SettingError("save.keep", self.keep, "a whole number >= 2")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise SettingError(
                "save.tensorboard", "true", "false, or pip install 'softdefend[tensorboard]' first"
            )


# A mean loss this many times that of guessing, or of the first step, has nothing left to learn from.
_DIVERGED = 20.0
_CHECK_EVERY = 50


class Trainer:
    """Trains one network with one recipe in one run folder.

    A run that is killed at any moment and started again with the same settings ends in the same bits on the
    same machine: network, optimizer, averages, label memory and metrics.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k].
        bundle: training, validation and test data.
        recipe: label rule, objective, threat and training attack.
        folder: the run folder; created where absent, continued where it holds a checkpoint.
        optim, augment, validate, runtime, save: settings, see each class.
        weight: the weight rule.
        seed: of every random draw.
        config: the resolved configuration, for the folder and for the check on resume.
        progress: show progress bars.

    Raises:
        SettingError: settings that do not fit the data, the device or the run in the folder.
    """

    def __init__(
        self,
        net: nn.Module,
        bundle: DataBundle,
        recipe: Recipe,
        folder: Path | str,
        *,
        optim: OptimSettings | None = None,
        augment: AugmentSettings | None = None,
        validate: ValidateSettings | None = None,
        runtime: RuntimeSettings | None = None,
        save: SaveSettings | None = None,
        weight: WeightRule | None = None,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.optim, self.augment = optim or OptimSettings(), augment or AugmentSettings()
        self.validate, self.save = validate or ValidateSettings(), save or SaveSettings()
        self.engine = Engine(runtime or RuntimeSettings())
        self.bundle, self.recipe, self.weight = bundle, recipe, weight or Plain()
        self.seed, self.progress = seed, progress
        self.k = len(bundle.classes)
        check_eps(recipe.threat, bundle.train.images[0].numel())
        device, channels_last = self.engine.device, bool(self.engine.settings.channels_last)
        self.net = net.to(device)
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train_data = Augmented(bundle.train, device, self.augment, channels_last=channels_last)
        self.validation_data = Resident(bundle.validation, device, channels_last=channels_last)
        self.test_data = Resident(bundle.test, device, channels_last=channels_last)
        self.test_fingerprint = fingerprint(bundle.test)
        self.batch_size = self.optim.batch_size
        if self.batch_size > self.train_data.n:
            raise SettingError(
                "optim.batch_size", self.batch_size, f"at most the {self.train_data.n} training images"
            )
        self.steps_per_epoch = (
            self.train_data.n // self.batch_size
            if self.optim.drop_last
            else math.ceil(self.train_data.n / self.batch_size)
        )
        self.optimizer = make_optimizer(self.net, self.optim, device)
        run = RunInfo(self.train_data.labels, self.k, self.optim.epochs, self.net, self.engine.autocast)
        self.rules: tuple[Rule, ...] = (recipe.label, recipe.objective, self.weight)
        for rule in self.rules:
            rule.setup(run)
        self.step = TrainStep(self.net, self.train_data, recipe, self.optimizer, self.engine, self.weight)
        self.watched = self.validate.alarm != "off" and trains_on_one_step(recipe)
        self.warned: set[str] = set()
        self.epoch = self.done = 0  # epochs finished; steps finished in the current one
        self.best: dict[str, Any] = {}
        self.first_loss: float | None = None
        self.metrics_bytes = 0
        self._evaluators: dict[str, Evaluator] = {}
        self.folder = RunFolder(folder, self.save.keep, background=device.type == "cuda")
        if self.save.archive is not None:
            self.folder.checkpoints.stride = self.save.archive * self.steps_per_epoch
        try:
            self.folder.write_config(config or {})
            self.folder.write_environment(device, seed)
        except BaseException:
            self.folder.close()
            raise

    def fit(
        self, resume: Path | None = None, on_epoch: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """Train to the end, from the newest checkpoint where there is one.

        Args:
            resume: a checkpoint to continue from, in place of the newest.
            on_epoch: called with each metrics row.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another run.
            DivergenceError: the loss or a weight is no longer finite, the loss far above that of guessing and
                of the first step, or ``validate.alarm`` is ``stop`` and rings; the last good checkpoint is
                kept.
        """
        self._restore(resume)
        try:
            with self.engine.training_numerics():
                while self.epoch < self.optim.epochs:
                    started = time.perf_counter()
                    row = self._train_epoch()
                    self.folder.append(
                        "timing.jsonl", {"epoch": self.epoch, "seconds": time.perf_counter() - started}
                    )
                    if on_epoch is not None:
                        on_epoch(row)
            self._release("last", {"epoch": self.epoch})
        except BaseException as error:
            # Whatever ended training comes through; what could not be written besides is said.
            try:
                self.folder.writer.wait()
            except SettingError as unwritten:
                if unwritten is not error:
                    tqdm.write(f"warning: {unwritten}", file=sys.stderr)
            raise
        self.folder.writer.wait()

    def _release(self, which: str, metadata: Mapping[str, Any], *, pending: bool = False) -> None:
        """Weights that predict, with the test images they are to be measured on."""
        metadata = {**metadata, "test_data": self.test_fingerprint}
        self.folder.save_model(which, self.weight.prediction, metadata, pending=pending)

    def _train_epoch(self) -> dict[str, Any]:
        phase = Phase(*(rule.phase(self.epoch) for rule in self.rules))
        views = self.recipe.objective.views
        begun = self.augment.begun(self.epoch, self.optim.epochs)
        plan = self.train_data.plan(seed=self.seed, epoch=self.epoch, views=views, begun=begun)
        with tqdm(
            total=self.steps_per_epoch,
            initial=self.done,
            desc=f"epoch {self.epoch + 1}/{self.optim.epochs}",
            leave=False,
            disable=None if self.progress else True,  # None: only on a terminal
        ) as bar:
            while self.done < self.steps_per_epoch:
                self.step.set_lr(self._lr())
                for rule in self.rules:
                    rule.advance(self.epoch + self.done / self.steps_per_epoch)
                rows = plan[self.done * self.batch_size : (self.done + 1) * self.batch_size]
                self.step(rows, phase, rng.key(self.seed, "step", self.epoch, self.done))
                for rule in self.rules:
                    rule.after_step()
                self.done += 1
                bar.update()
                if self.first_loss is None:
                    self._check()
                if self.done % _CHECK_EVERY == 0:
                    bar.set_postfix(loss=f"{self._check()['loss']:.3f}", refresh=False)
                if self.save.every_steps and self.done % self.save.every_steps == 0:
                    self._check()
                    self._save()
        self.weight.end_epoch(self.epoch, self._training_images)
        row, failure = self._end_epoch(phase.label)
        if failure is not None:
            self._alarm(*failure)
        self._save()
        self.folder.settle("best")
        return row

    def _training_images(self) -> Iterator[Tensor]:
        """One pass over the training images as they are. Sizes of batches differ by one image at most: a
        single one left over would have no statistics."""
        everything = torch.arange(self.train_data.n, device=self.engine.device)
        batches = math.ceil(self.train_data.n / max(self.batch_size, 2))
        for index in torch.tensor_split(everything, batches):
            yield self.train_data.take(index).image

    def _lr(self) -> float:
        fraction = self.done / self.steps_per_epoch
        return self.optim.lr * self.optim.schedule.factor(self.epoch, fraction, self.optim.epochs)

    def _check(self) -> dict[str, float]:
        """Means of the epoch so far.

        Raises:
            DivergenceError: the loss or a weight is not finite, or the loss far above that of guessing and of
                the first step, which knows how much a recipe charges for it.
        """
        sums = dict(zip(METERS, self.step.meters.tolist(), strict=True))
        means = {name: value / max(sums["samples"], 1) for name, value in sums.items()}
        loss = means["loss"]
        if self.first_loss is None and math.isfinite(loss):
            self.first_loss = loss
        limit = _DIVERGED * max(self.first_loss or 0.0, math.log(max(self.k, 2)))
        if not math.isfinite(loss) or loss > limit:
            self._diverged(f"the loss is {loss:g}")
        if not torch.stack([p.detach().isfinite().all() for p in self.net.parameters()]).all():
            self._diverged("a weight is not finite")
        return means

    def _diverged(self, what: str) -> None:
        try:
            paths = self.folder.checkpoints.paths()
            last = f"the last good checkpoint is {paths[-1]}" if paths else "no checkpoint had been written"
        except SettingError as error:
            last = f"the last checkpoint could not be written ({error.setting}: {error.given})"
        raise DivergenceError(
            f"training diverged in epoch {self.epoch + 1}, step {self.done}: {what}; {last}; "
            "a lower optim.lr or fp32 precision may help"
        )

    def _failure(self, row: dict[str, Any], found: Mapping[str, str]) -> tuple[str, str] | None:
        """Name and text of what makes further training useless, unless ``validate.alarm`` is ``off``."""
        if row.get("catastrophic_overfitting"):
            figures = row["epoch"], row["val_fgsm"], row["val_robust"]
            return "catastrophic overfitting", describe(*figures, self.validate.attack.name)
        if "stuck" in found and self.validate.alarm != "off":
            return "stuck", found["stuck"]
        return None

    def _alarm(self, name: str, what: str) -> None:
        if self.validate.alarm == "stop":
            kept = "no epoch before it was validated"
            if self.best:
                share = 100 * self.best["val_robust"]
                kept = f"the best checkpoint is of epoch {self.best['epoch']}, {share:.1f}%"
            raise DivergenceError(f"{what}; {kept}")
        self._warn(name, what)

    def _warn(self, name: str, what: str) -> None:
        """Say something on stderr, each thing once."""
        if name not in self.warned:
            tqdm.write(f"warning: {what}", file=sys.stderr)
        self.warned.add(name)

    def _end_epoch(self, phase: str) -> tuple[dict[str, Any], tuple[str, str] | None]:
        """The epoch's row, written, and what makes further training useless."""
        means, lr = self._check(), self._lr_of_last_step()
        self.step.meters.zero_()
        self.epoch, self.done = self.epoch + 1, 0
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.epoch * self.steps_per_epoch,
            "phase": phase,
            "lr": lr,
            "loss": means["loss"],
            "train_robust": means["adversarial_correct"],
            "train_clean": means["clean_correct"],
            "target_entropy": means["target_entropy"],
            **self._validate(),
        }
        row = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        if row.get("val_fgsm") is not None:
            row["catastrophic_overfitting"] = collapsed(row["val_fgsm"], row["val_robust"])
        soft = self.recipe.label.softens_all
        if found := dict(hints(row, self.steps_per_epoch, self.k, soft=soft)):
            row["hints"] = list(found)
        failure = self._failure(row, found)
        for name, what in found.items():
            if name != "stuck":  # an alarm
                self._warn(name, what)
        stops = self.validate.alarm == "stop" and failure is not None
        robust = None if stops else row["val_robust"]  # no checkpoint will know of this epoch
        if robust is not None and robust > self.best.get("val_robust", -1.0):
            self.best = {"epoch": self.epoch, "val_robust": row["val_robust"]}
            self._release("best", self.best, pending=True)
        self.metrics_bytes = self.folder.append("metrics.jsonl", row)
        self._tensorboard(row)
        return row, failure

    def _lr_of_last_step(self) -> float:
        fraction = (self.done - 1) / self.steps_per_epoch
        return self.optim.lr * self.optim.schedule.factor(self.epoch, fraction, self.optim.epochs)

    def _validate(self) -> dict[str, float | None]:
        """Clean and robust accuracy after this epoch on validation (and, for the curve, test) images."""
        figures: dict[str, float | None] = dict.fromkeys(
            ("val_clean", "val_robust", "test_clean", "test_robust") + ("val_fgsm",) * self.watched
        )
        if self.epoch % self.validate.every and self.epoch < self.optim.epochs:
            return figures
        for name, data, size in (
            ("val", self.validation_data, self.validate.size),
            ("test", self.test_data, self.validate.test_size),
        ):
            if size != 0:
                evaluator = self._evaluator(name, data)
                also = [FGSM()] if self.watched and name == "val" else []
                # As ensembles of one: an image that is wrong as it is counts as lost and is not attacked.
                attacks = [Ensemble(attack.name, (attack,)) for attack in (self.validate.attack, *also)]
                result = evaluator(attacks, limit=size)
                figures[f"{name}_clean"] = result.clean.rate
                figures[f"{name}_robust"] = result.robust(self.validate.attack.name).rate
                if also:
                    figures["val_fgsm"] = result.robust("fgsm").rate
        return figures

    def _evaluator(self, name: str, data: Resident) -> Evaluator:
        """The one that measures a split, made anew only where another network predicts than before."""
        net, known = self.weight.prediction, self._evaluators.get(name)
        if known is None or known.search_network.net is not net:
            known = self._evaluators[name] = Evaluator(
                net,
                data,
                self.recipe.threat,
                batch_size=self.validate.batch_size,
                seed=self.seed,
                precision=self.validate.precision,
            )
        return known

    def _tensorboard(self, row: dict[str, Any]) -> None:
        if not self.save.tensorboard:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = str(self.folder.path / "tensorboard")
        # purge_step: what an earlier, killed process wrote beyond its last checkpoint is taken back.
        with SummaryWriter(folder, purge_step=row["epoch"]) as writer:
            for name, value in row.items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, row["epoch"])

    def _save(self) -> None:
        params = self.optimizer.param_groups[0]["params"]
        state = {
            "epoch": self.epoch,
            "done": self.done,
            "fingerprint": self.bundle.fingerprint,
            "seed": self.seed,
            "net": self.net.state_dict(),
            "momentum": [self.optimizer.state[p]["momentum_buffer"] for p in params]
            if self.optim.momentum
            else [],
            "weight": self.weight.state_dict(),
            "label": self.recipe.label.state_dict(),
            "objective": self.recipe.objective.state_dict(),
            "meters": self.step.meters,
            "best": json.dumps(self.best),
            "first_loss": self.first_loss,
            "metrics_bytes": self.metrics_bytes,
        }
        self.folder.checkpoints.save(self.epoch * self.steps_per_epoch + self.done, state)

    def _refuse_without_checkpoints(self) -> None:
        """Weights are in place only once a checkpoint knows of them, so the checkpoints have been removed."""
        for name in ("last", "best"):
            if (path := self.folder.path / f"{name}.safetensors").exists():
                raise CheckpointError(
                    str(self.folder.path / "checkpoints"),
                    f"no checkpoint beside {path.name}",
                    "the run's checkpoints, or another --folder; softdefend evaluate needs none",
                )

    def _restore_rule(self, rule: Rule, values: dict[str, Any]) -> None:
        try:
            rule.load_state_dict(values)
        except SettingError:
            raise
        except Exception as error:  # a rule of the user's own fails in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise CheckpointError(
                str(self.folder.path),
                f"a checkpoint whose state {type(rule).__name__} does not take ({reason})",
                "the settings it was written with, and a load_state_dict that takes what state_dict gave",
            ) from error

    def _restore(self, resume: Path | None) -> None:
        state = self.folder.checkpoints.load(resume, self.engine.device)
        if state is None:
            self._refuse_without_checkpoints()
            self.folder.truncate("metrics.jsonl", 0)
            return
        if (state.get("fingerprint"), state.get("seed")) != (self.bundle.fingerprint, self.seed):
            raise CheckpointError(
                str(self.folder.path),
                "a checkpoint of other data or another seed",
                "the data and seed it began with",
            )
        try:
            self.net.load_state_dict(state["net"])
            with torch.no_grad():
                params = self.optimizer.param_groups[0]["params"]
                for parameter, momentum in zip(params, state["momentum"], strict=bool(self.optim.momentum)):
                    self.optimizer.state[parameter]["momentum_buffer"].copy_(momentum)
                self.step.meters.copy_(state["meters"])
            kept = [state[name] for name in ("label", "objective", "weight")]
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                str(self.folder.path),
                "a checkpoint of another network or recipe",
                "the settings it was written with",
            ) from error
        for rule, values in zip(self.rules, kept, strict=True):
            self._restore_rule(rule, values)
        self.epoch, self.done, self.metrics_bytes = state["epoch"], state["done"], state["metrics_bytes"]
        self.best, self.first_loss = json.loads(state["best"]), state.get("first_loss")
        self.folder.truncate("metrics.jsonl", self.metrics_bytes)
        if resume is not None:
            self.folder.checkpoints.abandon(self.epoch * self.steps_per_epoch + self.done)
        if not self.folder.recall("best", self.best.get("epoch")) and self.best:
            rest = "it is chosen anew from the epochs to come"
            if self.epoch >= self.optim.epochs:
                rest = "no epoch is left to choose it from; evaluate --which last needs none"
            tqdm.write(
                f"warning: best.safetensors is not of epoch {self.best['epoch']}, the best so far; {rest}",
                file=sys.stderr,
            )
            self.best = {}
