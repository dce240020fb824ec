"""The optimizer: its settings, and how it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from softdefend.core.errors import SettingError, check_values
from softdefend.core.hints import check_fields
from softdefend.training.lion import Lion
from softdefend.training.schedules import Schedule

Name = Literal["sgd", "adamw", "lion"]

_BETAS = {"adamw": (0.9, 0.999), "lion": (0.9, 0.99)}
"""The papers' defaults."""


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
    name: Name = "sgd"
    """sgd, adamw (Loshchilov and Hutter, arXiv 1711.05101) or lion (Chen et al., arXiv 2302.06675)."""
    lr: float = 0.1
    """Base learning rate, > 0; below 0.1 for adamw and lion, which need one far below sgd's."""
    momentum: float = 0.9
    """sgd: in [0, 1)."""
    nesterov: bool = False
    """sgd: Nesterov's form of momentum."""
    betas: tuple[float, float] | None = None
    """adamw, lion: decay of the averages, each in [0, 1); null: 0.9, 0.999 for adamw and 0.9, 0.99 for
    lion."""
    adam_eps: float = 1e-8
    """adamw: what is added to the denominator, > 0."""
    weight_decay: float = 5e-4
    """>= 0. For sgd part of the gradient, for adamw and lion decoupled: times the learning rate."""
    decay_all: bool = True
    """Weight decay of every parameter, as the reference codes have it; false spares those of one dimension:
    biases, and the weights of normalization layers."""
    accumulate: int = 1
    """Parts in which a batch is computed, >= 1; their gradients are added up to those of the whole batch.
    Batch normalization and the random starts of the attack see one part at a time."""
    clip: float | None = None
    """Largest Euclidean length of the gradient of all parameters, > 0; longer ones are scaled to it. No limit
    when null."""
    drop_last: bool = True
    """Leave the last, smaller batch of an epoch out. The reference codes train on it (false). A last batch of
    one image is refused where batch normalization cannot take it."""
    schedule: Schedule = Schedule()
    """Learning rate over the run."""

    def __post_init__(self) -> None:
        check_fields(self, "optim")
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))
        sgd, inf = self.name == "sgd", float("inf")
        checks = (
            ("epochs", self.epochs >= 1, "a whole number >= 1"),
            ("batch_size", self.batch_size >= 1, "a whole number >= 1"),
            ("name", self.name in get_args(Name), " or ".join(get_args(Name))),
            ("lr", 0 < self.lr < inf, "a positive number"),
            ("lr", sgd or self.lr < 0.1, f"below 0.1 with optim.name {self.name}; 0.001 is usual"),
            ("momentum", 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < inf, "a number >= 0"),
            ("nesterov", not self.nesterov or self.momentum > 0, "true only with momentum > 0"),
            ("nesterov", not self.nesterov or sgd, "true only with optim.name sgd"),
            ("betas", self.betas is None or not sgd, "null with optim.name sgd, which has momentum"),
            ("betas", all(0 <= beta < 1 for beta in self.betas or ()), "two numbers in [0, 1)"),
            ("adam_eps", 0 < self.adam_eps < inf, "a positive number"),
            ("accumulate", 1 <= self.accumulate <= self.batch_size, "1 to optim.batch_size parts"),
            ("clip", self.clip is None or 0 < self.clip < inf, "a positive number, or null"),
        )
        check_values("optim", self, checks)

    def parts(self, size: int) -> int:
        """In how many parts a batch of ``size`` images is computed: a smaller one in fewer, of which none has
        a single image where others have more."""
        return 1 if self.accumulate == 1 else math.ceil(size / self.part)

    @property
    def part(self) -> int:
        """Images of the largest part."""
        return math.ceil(self.batch_size / self.accumulate)


def make_optimizer(net: nn.Module, settings: OptimSettings, device: torch.device) -> Optimizer:
    """Make the optimizer with its state from the start, so that the first step is like every other.

    On a GPU the learning rate is a device tensor, which the host writes and a captured step reads.

    Raises:
        SettingError: nothing to train.
    """
    on_gpu = device.type == "cuda"
    parameters = [p for p in net.parameters() if p.requires_grad]
    if not parameters:
        raise SettingError("net", f"{type(net).__name__} without trainable parameters", "some to train")
    lr = torch.tensor(settings.lr, device=device) if on_gpu else settings.lr
    groups, fused = _groups(parameters, settings), True if on_gpu else None
    if settings.name == "lion":
        return _with_state(Lion(groups, lr, settings.betas or _BETAS["lion"]), ("exp_avg",))
    if settings.name == "adamw":
        betas = settings.betas or _BETAS["adamw"]
        adamw = AdamW(groups, lr, betas, settings.adam_eps, fused=fused, capturable=on_gpu)
        for parameter in parameters:
            place = device if on_gpu else "cpu"
            adamw.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=place)
        return _with_state(adamw, ("exp_avg", "exp_avg_sq"))
    sgd = SGD(groups, lr, settings.momentum, nesterov=settings.nesterov, fused=fused)
    return _with_state(sgd, ("momentum_buffer",) if settings.momentum > 0 else ())


def _groups(parameters: list[nn.Parameter], settings: OptimSettings) -> list[dict[str, Any]]:
    """All parameters in one group, or those that weight decay spares in a second."""
    decayed = [p for p in parameters if settings.decay_all or p.ndim > 1]
    spared = [p for p in parameters if not settings.decay_all and p.ndim <= 1]
    groups = ((decayed, settings.weight_decay), (spared, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def _with_state(optimizer: Optimizer, names: tuple[str, ...]) -> Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name in names:
                optimizer.state[parameter][name] = torch.zeros_like(parameter)
    return optimizer


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Everything that an optimizer of :func:`make_optimizer` remembers, in the order of its parameters."""
    every = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"])
    return [state[name] for state in every for name in sorted(state)]


def memory_name(optimizer: Optimizer) -> str:
    """What messages call that memory."""
    return "momentum" if isinstance(optimizer, SGD) else f"averages of {type(optimizer).__name__}"


def trained(optimizer: Optimizer) -> list[Tensor]:
    """All parameters."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def clip_gradients(optimizer: Optimizer, longest: float | None) -> None:
    """Scale the gradients of all parameters together to a Euclidean length of ``longest`` at most. Nothing is
    read back to the host."""
    if longest is not None:
        nn.utils.clip_grad_norm_(trained(optimizer), longest)
