"""DeepFool (Moosavi-Dezfooli et al., arXiv 1511.04599): straight over the nearest linearised boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softdefend.attacks.losses import check_classes, check_differentiable, image_gradient, margin
from softdefend.attacks.minimal import Closest, MinimalAttack, reach, steepest
from softdefend.attacks.names import ATTACKS
from softdefend.core.errors import check_values
from softdefend.core.goals import classes_of, fooled, reaches
from softdefend.core.threat import Norm
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel

NUDGE = 1e-4
"""Added to every step, in pixel units: near the boundary a step would otherwise vanish in rounding. As in the
authors' code; a distance is never shorter."""


@ATTACKS.register("deepfool")
@dataclass(frozen=True)
class DeepFool(MinimalAttack):
    """Steps to the nearest of the boundaries to the runner-up classes, each taken as a hyperplane, in l-inf
    or l2; the first wrong point is the answer. Cut to [0, 1] after each step, which the paper does not do.

    Args:
        steps: linearisations, >= 1.
        targets: runner-up classes of the clean image that are looked at, >= 1; all k - 1 where there are
            fewer.
        overshoot: share by which a step goes beyond the boundary, >= 0.

    Raises:
        SettingError: a value outside these ranges.
    """

    steps: int = 50
    """Linearisations, >= 1."""
    targets: int = 9
    """Runner-up classes looked at, >= 1."""
    overshoot: float = 0.02
    """Share by which a step goes beyond the boundary, >= 0."""
    takes_target: ClassVar[bool] = True
    pattern: ClassVar[str] = r"deepfool(?:-(?P<steps>\d+))?"
    suffix: ClassVar[str | None] = "[-STEPS]"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            ("steps", self.steps >= 1, "a whole number >= 1"),
            ("targets", self.targets >= 1, "a whole number >= 1"),
            ("overshoot", 0 <= self.overshoot < math.inf, "a share >= 0"),
        )
        check_values("attack", self, checks)

    @property
    def name(self) -> str:
        """``deepfool``, or ``deepfool-100`` where the steps are not 50."""
        return "deepfool" if self.steps == 50 else f"deepfool-{self.steps}"

    def closest(
        self,
        net: CountingModel,
        image: Tensor,
        label: Tensor,
        norm: Norm,
        enough: float,
        context: AttackContext,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`MinimalAttack.closest`. Cost: at most ``steps`` + 1 forwards and ``steps * targets``
        image gradients of each image; an image leaves the batch after the step that sees it wrong.

        ``enough`` changes nothing: an image is left at its first wrong point.
        """
        closest = Closest(image, norm)
        rows, x_adv, targets = torch.arange(len(image), device=image.device), image, None
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_(True)
            with torch.enable_grad():
                logits = net.at(rows)(x_adv)
            check_classes(logits)
            check_differentiable(logits)
            wrong = fooled(logits, label)
            closest.update(rows, x_adv.detach(), wrong)
            if targets is None:
                targets = (
                    classes_of(label)[:, None]
                    if reaches(label)
                    else _runners_up(logits.detach(), label, self.targets)
                )
            left = (~wrong).nonzero().flatten()
            if not len(left):
                break
            shift = self._shift(logits, x_adv, label, targets, norm)
            # The network has counted one gradient for each image.
            net.add_unassigned_gradients(len(x_adv) * (targets.shape[1] - 1))
            x_adv = (x_adv.detach() + shift).clamp(0, 1)
            if len(left) < len(rows):
                rows, label, targets, x_adv = (x[left] for x in (rows, label, targets, x_adv))
        else:
            closest.update(rows, x_adv, fooled(net.at(rows)(x_adv), label))
        return closest.image, closest.distance

    def _shift(self, logits: Tensor, x_adv: Tensor, label: Tensor, targets: Tensor, norm: Norm) -> Tensor:
        """Over the nearest of the hyperplanes, [m, c, h, w]; zero where every slope is.

        One target's gradient at a time, so that memory does not grow with their number.
        """
        shift, nearest = torch.zeros_like(x_adv), x_adv.new_full((len(x_adv),), math.inf)
        for column in range(targets.shape[1]):
            with torch.enable_grad():
                gap = _gap(logits, label, targets[:, column])
                slope = image_gradient(gap, x_adv, keep_graph=column + 1 < targets.shape[1])
            way, growth = steepest(slope.nan_to_num(0, 0, 0), norm)
            distance = reach(gap.detach().to(growth), growth)
            closer, step = distance < nearest, (1 + self.overshoot) * (distance + NUDGE)
            shift = torch.where(closer.view(-1, 1, 1, 1), step.view(-1, 1, 1, 1) * way, shift)
            nearest = torch.where(closer, distance, nearest)
        return shift


def _gap(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """The target's logit minus the label's, or the best other one where it is to be reached, [m]."""
    if reaches(label):
        return margin(logits, label)
    return (logits.gather(1, target[:, None]) - logits.gather(1, label[:, None])).flatten()


def _runners_up(logits: Tensor, label: Tensor, most: int) -> Tensor:
    """The likeliest wrong classes of each sample, likeliest first, [m, at most ``most``]."""
    ranked = logits.scatter(1, label[:, None], math.inf).topk(min(most + 1, logits.shape[1]), dim=1)
    return ranked.indices[:, 1:]
