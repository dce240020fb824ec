"""Sigma-zero (Cinà et al., arXiv 2402.01879): few changed values, by descent on a smooth count of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softdefend.attacks.losses import check_differentiable, margin
from softdefend.attacks.minimal import Closest, MinimalAttack
from softdefend.attacks.names import ATTACKS
from softdefend.core.errors import check_values
from softdefend.core.goals import fooled
from softdefend.core.threat import Norm
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel, Forward

LAST_STEP = 0.1
"""Length of the last step, as a share of the first."""
MOMENTS = 0.9, 0.999
"""Adam's decay rates."""


@ATTACKS.register("sigma-zero")
@dataclass(frozen=True)
class SigmaZero(MinimalAttack):
    """Adam on how far the network is from wrong plus a smooth count of the changed values, in l0; after every
    step changes below a threshold are dropped. The threshold rises while the point is wrong and falls while
    it is right (algorithm 1).

    Counted are the c h w values of an image: a pixel of three channels counts up to three times.

    Args:
        steps: gradient steps, >= 1.
        step_size: of Adam, in pixel units, > 0; falls to a tenth by a cosine.
        sigma: how smooth the count is, > 0: a change d counts as d^2 / (d^2 + sigma).
        threshold: at the start, in [0, 1], in pixel units.
        threshold_step: share of the step size by which the threshold rises or falls, >= 0.

    Raises:
        SettingError: a value outside these ranges.
    """

    steps: int = 1000
    """Gradient steps, >= 1."""
    step_size: float = 1.0
    """Of Adam, in pixel units, > 0."""
    sigma: float = 0.001
    """How smooth the count of changed values is, > 0."""
    threshold: float = 0.3
    """Below it a change is dropped, at the start, in [0, 1]."""
    threshold_step: float = 0.01
    """Share of the step size by which the threshold moves, >= 0."""
    takes_target: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("l0",)
    pattern: ClassVar[str] = r"sigma-zero(?:-(?P<steps>\d+))?"
    suffix: ClassVar[str | None] = "[-STEPS]"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            ("steps", self.steps >= 1, "a whole number >= 1"),
            ("step_size", 0 < self.step_size < math.inf, "a positive length in pixel units"),
            ("sigma", 0 < self.sigma < math.inf, "a positive number"),
            ("threshold", 0 <= self.threshold <= 1, "a length in [0, 1]"),
            ("threshold_step", 0 <= self.threshold_step < math.inf, "a share >= 0"),
        )
        check_values("attack", self, checks)

    @property
    def name(self) -> str:
        """``sigma-zero``, or ``sigma-zero-100`` where the steps are not 1000."""
        return "sigma-zero" if self.steps == 1000 else f"sigma-zero-{self.steps}"

    def closest(
        self,
        net: CountingModel,
        image: Tensor,
        label: Tensor,
        norm: Norm,
        enough: float,
        context: AttackContext,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`MinimalAttack.closest`. Cost: at most ``steps`` forwards and image gradients of each
        image; an image that is wrong from the start costs one of each."""
        closest, rows = Closest(image, norm), torch.arange(len(image), device=image.device)
        delta, mean, square = (torch.zeros_like(image) for _ in range(3))
        threshold = image.new_full((len(image),), self.threshold)
        for step in range(self.steps):
            wrong, grad = self._slope(net.for_rows(rows), image, delta, label)
            closest.update(rows, image + delta, wrong)
            left = (closest.distance[rows] > enough).nonzero().flatten()
            if not len(left):
                break
            if len(left) < len(rows):
                rows, image, label, delta, mean, square, threshold, wrong, grad = (
                    x[left] for x in (rows, image, label, delta, mean, square, threshold, wrong, grad)
                )
            mean = torch.lerp(grad, mean, MOMENTS[0])
            square = torch.lerp(grad.square(), square, MOMENTS[1])
            scale = (square / (1 - MOMENTS[1] ** (step + 1))).sqrt() + 1e-8
            delta = delta - self._step_size(step) / (1 - MOMENTS[0] ** (step + 1)) * mean / scale
            delta = (image + delta).clamp(0, 1) - image
            change = self.threshold_step * self._step_size(step + 1)
            threshold = (threshold + torch.where(wrong, change, -change)).clamp(0, 1)
            delta = torch.where(delta.abs() < threshold.view(-1, 1, 1, 1), 0, delta)
        return closest.image, closest.distance

    def _slope(self, net: Forward, image: Tensor, delta: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Where the network is wrong [m], and the gradient [m, c, h, w] of what is minimized, its largest
        value one."""
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = net(image + delta)
            check_differentiable(logits)
            right_by = (-margin(logits, label)).clamp_min(0)
            count = (delta.square() / (delta.square() + self.sigma)).mean(dim=(1, 2, 3))
            (grad,) = torch.autograd.grad((right_by + count).sum(), delta)
        grad = grad.nan_to_num(0, 0, 0)
        largest = grad.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
        return fooled(logits, label), grad / largest

    def _step_size(self, step: int) -> float:
        share = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.step_size * (LAST_STEP + (1 - LAST_STEP) * share)
