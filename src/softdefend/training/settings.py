"""Settings of what surrounds the training steps: validation, and what is saved."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

from softdefend.attacks import PGD
from softdefend.core.errors import SettingError, did_you_mean
from softdefend.core.hints import check_fields
from softdefend.data import SubsetOrder
from softdefend.evaluation.settings import Size, check_size
from softdefend.execution.search_network import Precision, check_precision
from softdefend.training.trackers import TRACKERS


@dataclass(frozen=True)
class ValidateSettings:
    """What is measured after an epoch. The best checkpoint is chosen by robust validation accuracy."""

    attack: PGD = PGD(steps=10)
    """The attack on validation images."""
    every: int = 1
    """Epochs between validations, >= 1; the last epoch is always validated."""
    size: Size | None = None
    """Validation images used, at most; all of them when all or null."""
    test_size: Size = 0
    """Test images measured for the learning curve only, never for selection; 0 for none."""
    subset: SubsetOrder = "stratified"
    """Which they are where they are not all: stratified (each class has its share) or first (the first of
    the data), as evaluate.subset."""
    batch_size: int = 500
    """Images of a batch."""
    precision: Precision = "exact"
    """Precision of the attack: exact, strict or fast, as evaluate.precision."""
    alarm: Literal["warn", "stop", "off"] = "warn"
    """What to do about catastrophic overfitting, which is watched for where training takes one attack step,
    and about a network that still guesses after 5,000 steps: warn (one line), stop (keeping the best
    checkpoint) or off."""

    def __post_init__(self) -> None:
        check_fields(self, "validate")
        if self.size == "all":
            object.__setattr__(self, "size", None)
        if self.subset not in get_args(SubsetOrder):
            raise SettingError("validate.subset", repr(self.subset), " or ".join(get_args(SubsetOrder)))
        check_precision(self.precision, "validate.precision")
        check_size("validate.size", self.size, 1)
        check_size("validate.test_size", self.test_size, 0)
        if self.alarm not in ("warn", "stop", "off"):
            raise SettingError("validate.alarm", repr(self.alarm), "warn, stop or off")
        for name, value, least in (
            ("every", self.every, 1),
            ("batch_size", self.batch_size, 1),
        ):
            if value < least:
                raise SettingError(f"validate.{name}", value, f"a whole number >= {least}")


@dataclass(frozen=True)
class SaveSettings:
    """Checkpoints, and what else is written during training."""

    every_steps: int | None = None
    """Steps between checkpoints within an epoch; only at the end of epochs when null."""
    keep: int = 2
    """Checkpoints to keep, >= 2: a damaged newest one leaves a previous good one."""
    archive: int | None = None
    """Epochs between checkpoints that are kept for good, for analyses by epoch; none when null."""
    trackers: tuple[str, ...] = ()
    """Where metrics and results go besides: tensorboard, csv, wandb, mlflow; docs/trackers.md."""

    def __post_init__(self) -> None:
        check_fields(self, "save")
        if self.every_steps is not None and self.every_steps < 1:
            raise SettingError("save.every_steps", self.every_steps, "a whole number >= 1, or null")
        if self.archive is not None and self.archive < 1:
            raise SettingError("save.archive", self.archive, "a whole number >= 1, or null")
        if self.keep < 2:
            raise SettingError("save.keep", self.keep, "a whole number >= 2")
        self._check_trackers()

    def _check_trackers(self) -> None:
        known = TRACKERS.names()
        for name in self.trackers:
            if name not in TRACKERS or self.trackers.count(name) > 1:
                accepted = f"each at most once: {', '.join(known)}{did_you_mean(name, known)}"
                raise SettingError("save.trackers", repr(name), accepted)
            package = TRACKERS[name].package
            if package is not None and find_spec(package) is None:
                accepted = f"what is installed; pip install 'softdefend[{name}]' first"
                raise SettingError("save.trackers", repr(name), accepted)
