"""Fast minimum-norm attack (Pintor et al., arXiv 2102.12827): a ball that follows the boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softdefend.attacks.minimal import Closest, MinimalAttack, margin_and_slope, reach, steepest
from softdefend.attacks.names import ATTACKS
from softdefend.core.errors import check_values
from softdefend.core.goals import fooled
from softdefend.core.projections import l1_correction
from softdefend.core.threat import Norm, length
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel

LEAST_GROWTH = 0.001
"""Share by which a ball grows at least while no wrong point is known, an addition to the paper's rule: a ball
that just touches the boundary could stay right for good, by rounding. Also the last ``gamma``."""


@ATTACKS.register("fmn")
@dataclass(frozen=True)
class FMN(MinimalAttack):
    """Gradient steps on the margin inside a ball of each image's own, in l-inf, l2 or l1; the ball shrinks
    while the point is wrong and grows while it is right. Starts at the image.

    Args:
        steps: gradient steps, >= 1.
        step_size: Euclidean length of the first step in pixel units, > 0; falls to a hundredth by a cosine.
        gamma: share by which a ball first grows or shrinks, in (0, 1); falls to 0.001 by a cosine.

    Raises:
        SettingError: a value outside these ranges.
    """

    steps: int = 100
    """Gradient steps, >= 1."""
    step_size: float = 1.0
    """Euclidean length of the first step in pixel units, > 0."""
    gamma: float = 0.05
    """Share by which a ball first grows or shrinks, in (0, 1)."""
    takes_target: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")
    pattern: ClassVar[str] = r"fmn(?:-(?P<steps>\d+))?"
    suffix: ClassVar[str | None] = "[-STEPS]"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            ("steps", self.steps >= 1, "a whole number >= 1"),
            ("step_size", 0 < self.step_size < math.inf, "a positive length in pixel units"),
            ("gamma", 0 < self.gamma < 1, "a share in (0, 1)"),
        )
        check_values("attack", self, checks)

    @property
    def name(self) -> str:
        """``fmn``, or ``fmn-200`` where the steps are not 100."""
        return "fmn" if self.steps == 100 else f"fmn-{self.steps}"

    def closest(
        self,
        net: CountingModel,
        image: Tensor,
        label: Tensor,
        norm: Norm,
        enough: float,
        context: AttackContext,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`MinimalAttack.closest`. Cost: at most ``steps`` + 1 forwards and ``steps`` image
        gradients of each image; an image that is wrong from the start costs one of each."""
        closest = Closest(image, norm)
        rows = torch.arange(len(image), device=image.device)
        x_adv, radius = image, image.new_zeros(len(image))
        found = torch.zeros(len(image), dtype=torch.bool, device=image.device)
        for step in range(self.steps):
            wrong, gap, slope = margin_and_slope(net.at(rows), x_adv, label)
            closest.update(rows, x_adv, wrong)
            left = (closest.distance[rows] > enough).nonzero().flatten()
            if not len(left):
                break
            if len(left) < len(rows):
                rows, image, label, x_adv, radius, found, wrong, gap, slope = (
                    x[left] for x in (rows, image, label, x_adv, radius, found, wrong, gap, slope)
                )
            share = step / self.steps
            step_size = _falling(self.step_size, self.step_size / 100, share)
            gamma = _falling(self.gamma, LEAST_GROWTH, share)
            growth = steepest(slope, norm)[1]
            # Until the boundary is first crossed, the ball ends where it seems to be.
            boundary = torch.where(growth > 0, length(x_adv - image, norm) + reach(gap, growth), radius)
            boundary = torch.maximum(boundary, radius * (1 + LEAST_GROWTH))
            grown = torch.where(found, radius * (1 + gamma), boundary)
            shrunk = torch.minimum(radius * (1 - gamma), closest.distance[rows])
            radius = torch.where(wrong, shrunk, grown)
            found = found | wrong
            x_adv = x_adv + step_size * steepest(slope, "l2")[0]
            x_adv = _into_ball(image, x_adv, radius, norm).clamp(0, 1)
        else:
            closest.update(rows, x_adv, fooled(net.at(rows)(x_adv), label))
        return closest.image, closest.distance


def _falling(first: float, last: float, share: float) -> float:
    """From ``first`` to ``last`` along half a cosine, ``share`` of the way."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _into_ball(image: Tensor, x_adv: Tensor, radius: Tensor, norm: Norm) -> Tensor:
    """The nearest points [m, c, h, w] at most ``radius`` [m] from the images; in l1 those in the box too."""
    if norm == "l1":
        return image + ((x_adv - image) + l1_correction(image, x_adv - image, radius))
    delta, radius = x_adv - image, radius.view(-1, 1, 1, 1)
    if norm == "linf":
        return image + torch.minimum(torch.maximum(delta, -radius), radius)
    size = length(delta, norm).view(-1, 1, 1, 1).clamp_min(1e-12)
    return image + delta * (radius / size).clamp_max(1)
