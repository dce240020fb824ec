"""Annealing self-distillation rectification (Wu et al., ICLR 2024, arXiv 2305.12118)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.rule import RunInfo
from softdefend.labels.base import LABELS, Predictions
from softdefend.labels.own_teacher import OwnTeacher

if TYPE_CHECKING:
    from softdefend.data import Batch


def rectify(
    logits: Tensor, label: Tensor, temperature: float | Tensor, interpolation: float | Tensor
) -> Tensor:
    """Mix the label with a teacher's prediction, the less the lower the teacher ranks the label's class.

    With p = softmax(logits / temperature), the target is share * p + (1 - share) * onehot(y). Each sample's
    share is the interpolation minus the gap between the largest probability and that of the label,
    max_c p_c - p_y, cut to [0, 1]. The label's class thus stays the most probable.

    Args:
        logits: the teacher's, [b, k].
        label: [b] int64.
        temperature: tau > 0.
        interpolation: lambda in [0, 1].

    Returns:
        [b, k], rows summing to one.
    """
    p = F.softmax(logits / temperature, dim=1)
    gap = p.amax(dim=1, keepdim=True) - p.gather(1, label[:, None])
    share = (interpolation - gap).clamp(0, 1)
    return share * p + (1 - share) * F.one_hot(label, p.shape[1])


def cosine(first: float, last: float, progress: float) -> float:
    """From ``first`` to ``last`` along half a cosine, for ``progress`` in [0, 1]."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


@LABELS.register("ADR")
class ADR(OwnTeacher):
    """Labels rectified by an exponential moving average of the network itself.

    The average (weights and buffers, in eval mode) predicts the clean image once a step. :func:`rectify`
    turns that prediction into the target, which is also what the attack climbs away from. Over the run the
    temperature falls and the interpolation rises along half a cosine, at every step. Defaults are those of
    the authors' code for CIFAR-10 and ResNet-18 without AWP.

    Args:
        decay: weight of the teacher's old weights per step, in [0, 1].
        temperature_high, temperature_low: tau at the start and at the end of the run, > 0.
        interpolation_low, interpolation_high: lambda at the start and at the end of the run, in [0, 1].
        attack_label: what the attack climbs away from: ``rectified`` (the code) or ``hard``.

    Raises:
        SettingError: a value outside these ranges, or a low above its high.
    """

    source = "Wu et al., ICLR 2024, arXiv 2305.12118"
    softens_all = True

    def __init__(
        self,
        decay: float = 0.995,
        temperature_high: float = 2.5,
        temperature_low: float = 2.0,
        interpolation_low: float = 0.7,
        interpolation_high: float = 0.95,
        attack_label: Literal["rectified", "hard"] = "rectified",
    ) -> None:
        if not 0 <= decay <= 1:
            raise SettingError("label.decay", decay, "a number in [0, 1]")
        if not (temperature_low > 0 and math.isfinite(temperature_low)):
            raise SettingError("label.temperature_low", temperature_low, "a positive number")
        if not (temperature_high >= temperature_low and math.isfinite(temperature_high)):
            accepted = f"a number of at least temperature_low, {temperature_low}"
            raise SettingError("label.temperature_high", temperature_high, accepted)
        if not 0 <= interpolation_low <= 1:
            raise SettingError("label.interpolation_low", interpolation_low, "a number in [0, 1]")
        if not interpolation_low <= interpolation_high <= 1:
            accepted = f"a number from interpolation_low, {interpolation_low}, to 1"
            raise SettingError("label.interpolation_high", interpolation_high, accepted)
        if attack_label not in ("rectified", "hard"):
            raise SettingError("label.attack_label", repr(attack_label), "rectified or hard")
        self.decay, self.attack_label = decay, attack_label
        self.temperature_high, self.temperature_low = temperature_high, temperature_low
        self.interpolation_low, self.interpolation_high = interpolation_low, interpolation_high

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        self.epochs = run.epochs
        # On the device: a captured step reads what the host writes between steps.
        self.temperature, self.interpolation = torch.zeros(2, device=run.labels.device).unbind()
        self.advance(0.0)

    def advance(self, epoch: float) -> None:
        progress = epoch / self.epochs
        self.temperature.fill_(cosine(self.temperature_high, self.temperature_low, progress))
        self.interpolation.fill_(cosine(self.interpolation_low, self.interpolation_high, progress))

    def attack_target(self, batch: Batch, phase: str) -> Tensor:
        return self._rectified(batch) if self.attack_label == "rectified" else batch.label

    def target(self, batch: Batch, predictions: Predictions, phase: str) -> Tensor:
        return self._rectified(batch)

    @torch.no_grad()
    def _rectified(self, batch: Batch) -> Tensor:
        return rectify(self.logits(batch.image), batch.label, self.temperature, self.interpolation)

    def after_step(self) -> None:
        self.follow(self.decay)
