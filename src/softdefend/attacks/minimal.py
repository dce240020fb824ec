"""Attacks that look for the closest wrong image, whatever its distance."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from softdefend.attacks.base import Attack, Randomness, free_values, with_known_target
from softdefend.attacks.losses import hard_label, image_gradient, margin
from softdefend.core.goals import fooled
from softdefend.core.threat import Norm, ThreatModel, length
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel, Forward, Mask
from softdefend.execution.randomness import CallerRandomness


@dataclass(frozen=True)
class MinimalAttack(Attack):
    """An attack that minimises the distance; a subclass writes :meth:`closest`. Called with a threat model,
    it returns what it found within ``eps``, and the image itself where that is nothing."""

    randomness: ClassVar[Randomness] = "none"
    minimizes_distance: ClassVar[bool] = True

    @abstractmethod
    def closest(
        self,
        net: CountingModel,
        image: Tensor,
        label: Tensor,
        norm: Norm,
        enough: float,
        context: AttackContext,
    ) -> tuple[Tensor, Tensor]:
        """The closest wrong images and their distances; see :meth:`minimal`. Called without gradients.

        Args:
            label: [b] int64, or a goal to reach.
            context: the source of every random draw.
        """

    @final
    @torch.no_grad()
    def minimal(
        self,
        net: Forward,
        image: Tensor,
        label: Tensor,
        norm: Norm,
        *,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        enough: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The closest wrong image found, at any distance.

        Args:
            net, image, label, target, mask, generator: see :meth:`Attack.__call__`.
            norm: of the distance.
            enough: a distance in pixel units at which the search for a sample stops.

        Returns:
            Images [b, c, h, w] in [0, 1] and their distances [b]: the image itself at 0 where the network
            is wrong from the start, and at infinity where no wrong image was found.

        Raises:
            SettingError: a norm that the attack is not made for; a network with fewer than two classes, or
                without the gradients that the attack takes.
        """
        self.check_norm(norm)
        goal = hard_label(label) if target is None else self.goal(target, len(image))
        net = net if target is None else with_known_target(net, target)
        masked = None if mask is None else Mask(free_values(mask, image), image)
        model = net if isinstance(net, CountingModel) else CountingModel(net, len(image), mask=masked)
        context = AttackContext(model, CallerRandomness(generator, len(image)))
        closest, distance = self.closest(model, image, goal, norm, enough, context)
        if masked is not None:  # rounding may have moved the others
            closest = masked(closest, None)
            distance = torch.where(distance.isfinite(), length(closest - image, norm), distance)
        return closest, distance

    @torch.no_grad()
    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        """See :meth:`Attack.run`. Cost: that of :meth:`closest`, less what stopping at ``eps`` saves."""
        eps = float(threat.eps)
        closest, distance = self.closest(net, image, hard_label(label), threat.norm, eps, context)
        return torch.where((distance <= eps).view(-1, 1, 1, 1), closest, image)


class Closest:
    """The closest wrong image seen so far of each sample of a batch.

    Attributes:
        image: [b, c, h, w]; the clean image where none was seen.
        distance: [b] in pixel units; infinity where none was seen.
    """

    def __init__(self, image: Tensor, norm: Norm) -> None:
        self.clean, self.norm, self.image = image, norm, image.clone()
        self.distance = image.new_full((len(image),), math.inf)

    def update(self, rows: Tensor, x_adv: Tensor, wrong: Tensor) -> None:
        """Images [m, c, h, w] of these samples [m], and which of them the network gets wrong [m]."""
        distance, before = length(x_adv - self.clean[rows], self.norm), self.distance[rows]
        closer = wrong & (distance < before)
        self.image[rows] = torch.where(closer.view(-1, 1, 1, 1), x_adv, self.image[rows])
        self.distance[rows] = torch.where(closer, distance, before)


def margin_and_slope(net: Forward, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one image gradient.

    Returns:
        Where the network is wrong [m] bool, the margin [m], and the margin's gradient [m, c, h, w]; both
        numbers are zero where they are NaN or infinite.

    Raises:
        SettingError: a network with fewer than two classes, or without gradients in the image.
    """
    image = image.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = net(image)
        gap = margin(logits, label)
        slope = image_gradient(gap, image).nan_to_num(0, 0, 0)
    # Logits may be wider than the images; the rest of a search is not.
    return fooled(logits, label), gap.detach().to(slope).nan_to_num(0, 0, 0), slope


def steepest(slope: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """The shift of length one along which a linear function of this slope [m, c, h, w] grows fastest, and
    its growth [m]: the slope's dual norm. Both are zero where the slope is. Of l-inf, l2 or l1."""
    # Squares of small gradients would underflow.
    scale = slope.abs().amax(dim=(1, 2, 3), keepdim=True)
    slope = slope / scale.clamp_min(torch.finfo(slope.dtype).tiny)
    if norm == "linf":
        return slope.sign(), scale.flatten() * slope.abs().sum(dim=(1, 2, 3))
    if norm == "l1":
        largest = slope.abs() >= 1  # several where they are equal
        return slope.sign() * largest / largest.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1), scale.flatten()
    size = torch.linalg.vector_norm(slope, dim=(1, 2, 3), keepdim=True)
    return slope / size.clamp_min(1), (scale * size).flatten()


def reach(gap: Tensor, growth: Tensor) -> Tensor:
    """How far the zero of a linear function lies that is ``gap`` [m] here and grows by ``growth`` [m] per
    unit of length; infinity where it does not grow."""
    return torch.where(growth > 0, gap.abs() / growth, math.inf)
