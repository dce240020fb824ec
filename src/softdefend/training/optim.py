"""The optimizer: its settings, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.hints import check_fields
from softdefend.training.schedules import Schedule


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and the length of the run: SGD with momentum, as the field's protocols have it.

    Raises:
        SettingError: a value outside its range.
    """

    epochs: int = 200
    """Passes over the training data, >= 1."""
    batch_size: int = 128
    """Images per step, >= 1."""
    lr: float = 0.1
    """Base learning rate, > 0."""
    momentum: float = 0.9
    """In [0, 1)."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float = 5e-4
    """>= 0, on every parameter, as the reference codes do."""
    drop_last: bool = True
    """Leave the last, smaller batch of an epoch out. The reference codes train on it (false). A last batch of
    one image is refused where batch normalization cannot take it."""
    schedule: Schedule = Schedule()
    """Learning rate over the run."""

    def __post_init__(self) -> None:
        check_fields(self, "optim")
        checks = (
            ("epochs", self.epochs, self.epochs >= 1, "a whole number >= 1"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "a whole number >= 1"),
            ("lr", self.lr, 0 < self.lr < float("inf"), "a positive number"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < float("inf"), "a number >= 0"),
            (
                "nesterov",
                self.nesterov,
                not self.nesterov or self.momentum > 0,
                "true only with momentum > 0",
            ),
        )
        for name, value, good, accepted in checks:
            if not good:
                raise SettingError(f"optim.{name}", value, accepted)


def make_optimizer(net: nn.Module, settings: OptimSettings, device: torch.device) -> torch.optim.SGD:
    """Make SGD with momentum buffers from the start, so that the first step is like every other.

    On a GPU the learning rate is a device tensor, which the host writes and a captured step reads.

    Raises:
        SettingError: nothing to train.
    """
    on_gpu = device.type == "cuda"
    parameters = [p for p in net.parameters() if p.requires_grad]
    if not parameters:
        raise SettingError("net", f"{type(net).__name__} without trainable parameters", "some to train")
    optimizer = torch.optim.SGD(
        parameters,
        lr=torch.tensor(settings.lr, device=device) if on_gpu else settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        fused=True if on_gpu else None,
    )
    if settings.momentum > 0:
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
