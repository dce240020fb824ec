"""DeepFool (Moosavi-Dezfooli et al., arXiv 1511.04599): straight over the nearest linearised boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softdefend.attacks.base import Forward
from softdefend.attacks.losses import check_classes, check_differentiable, hard_label, image_gradient
from softdefend.attacks.minimal import Closest, MinimalAttack, reach, steepest
from softdefend.core.errors import SettingError
from softdefend.core.threat import Norm
from softdefend.execution.counting import View

NUDGE = 1e-4
"""Added to every step, in pixel units: near the boundary a step would otherwise vanish in rounding. As in the
authors' code; a distance is never shorter."""


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

    def __post_init__(self) -> None:
        for name, valid, accepted in (
            ("steps", self.steps >= 1, "a whole number >= 1"),
            ("targets", self.targets >= 1, "a whole number >= 1"),
            ("overshoot", 0 <= self.overshoot < math.inf, "a share >= 0"),
        ):
            if not valid:
                raise SettingError(f"attack.{name}", getattr(self, name), accepted)

    @property
    def name(self) -> str:
        """``deepfool``, or ``deepfool-100`` where the steps are not 50."""
        return "deepfool" if self.steps == 50 else f"deepfool-{self.steps}"

    @torch.no_grad()
    def minimal(
        self, forward: Forward, image: Tensor, target: Tensor, norm: Norm, *, enough: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`MinimalAttack.minimal`. Cost: at most ``steps`` + 1 forwards and ``steps * targets``
        image gradients of each image; an image leaves the batch after the step that sees it wrong.

        ``enough`` changes nothing: an image is left at its first wrong point.
        """
        label, best = hard_label(target), Closest(image, norm)
        rows, point, rivals = torch.arange(len(image), device=image.device), image, None
        for _ in range(self.steps):
            point = point.detach().requires_grad_(True)
            with torch.enable_grad():
                logits = forward(point)
            check_classes(logits)
            check_differentiable(logits)
            wrong = logits.argmax(dim=1) != label
            best.see(rows, point.detach(), wrong)
            if rivals is None:
                rivals = _runners_up(logits.detach(), label, self.targets)
            left = (~wrong).nonzero().flatten()
            if not len(left):
                break
            shift = self._shift(logits, point, label, rivals, norm)
            if isinstance(forward, View):  # it has counted one gradient for each image
                forward.loose[1] += len(point) * (rivals.shape[1] - 1)
            point = (point.detach() + shift).clamp(0, 1)
            if len(left) < len(rows):
                rows, label, rivals, point = (x[left] for x in (rows, label, rivals, point))
        else:
            best.see(rows, point, forward(point).argmax(dim=1) != label)
        return best.image, best.distance

    def _shift(self, logits: Tensor, point: Tensor, label: Tensor, rivals: Tensor, norm: Norm) -> Tensor:
        """Over the nearest of the hyperplanes, [m, c, h, w]; zero where every slope is.

        One rival's gradient at a time, so that memory does not grow with their number.
        """
        shift, nearest = torch.zeros_like(point), point.new_full((len(point),), math.inf)
        for column in range(rivals.shape[1]):
            with torch.enable_grad():
                gap = (logits.gather(1, rivals[:, column, None]) - logits.gather(1, label[:, None])).flatten()
                slope = image_gradient(gap, point, keep_graph=column + 1 < rivals.shape[1])
            way, growth = steepest(slope.nan_to_num(0, 0, 0), norm)
            distance = reach(gap.detach().to(growth), growth)
            closer, step = distance < nearest, (1 + self.overshoot) * (distance + NUDGE)
            shift = torch.where(closer.view(-1, 1, 1, 1), step.view(-1, 1, 1, 1) * way, shift)
            nearest = torch.where(closer, distance, nearest)
        return shift


def _runners_up(logits: Tensor, label: Tensor, most: int) -> Tensor:
    """The likeliest wrong classes of each sample, likeliest first, [m, at most ``most``]."""
    ranked = logits.scatter(1, label[:, None], math.inf).topk(min(most + 1, logits.shape[1]), dim=1)
    return ranked.indices[:, 1:]
