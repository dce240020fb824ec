"""Targeted fast adaptive boundary attack (Croce & Hein, arXiv 1907.02044): the closest wrong image it finds.

Steps, targets and verdicts are those of AutoAttack's reference implementation (arXiv 2003.01690), where it
starts at the image: nothing is random, and no image feels its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from softdefend.attacks.base import Attack, Forward, value_and_gradient
from softdefend.attacks.losses import AttackLoss
from softdefend.errors import SettingError
from softdefend.threat import Norm, ThreatModel


@dataclass(frozen=True)
class FAB(Attack):
    """Targeted FAB in l-inf or l2, without random start.

    Against each of the runner-up classes of the clean image in turn, linearises the boundary to that class,
    steps beyond it, leaning back to the image, and goes part of the way home from each wrong point.

    Args:
        steps: linearisations per target, >= 0.
        targets: runner-up classes tried, >= 1; all k - 1 where there are fewer.
        alpha_max: largest weight of the projection of the clean image in a step, in [0, 1].
        eta: overshoot of a projection, >= 1.
        beta: share of the way that a wrong point keeps when it goes home, in (0, 1).

    Raises:
        SettingError: a value outside these ranges.
    """

    steps: int = 100
    """Linearisations per target, >= 0."""
    targets: int = 9
    """Runner-up classes tried, >= 1."""
    alpha_max: float = 0.1
    """Largest weight of the projection of the clean image in a step, in [0, 1]."""
    eta: float = 1.05
    """Overshoot of a projection, >= 1."""
    beta: float = 0.9
    """Share of the way that a wrong point keeps when it goes home, in (0, 1)."""

    def __post_init__(self) -> None:
        for name, valid, accepted in (
            ("steps", self.steps >= 0, "a whole number >= 0"),
            ("targets", self.targets >= 1, "a whole number >= 1"),
            ("alpha_max", 0 <= self.alpha_max <= 1, "a weight in [0, 1]"),
            ("eta", 1 <= self.eta < math.inf, "a factor >= 1"),
            ("beta", 0 < self.beta < 1, "a share in (0, 1)"),
        ):
            if not valid:
                raise SettingError(f"attack.{name}", getattr(self, name), accepted)

    @property
    def name(self) -> str:
        """``fab-t``, or ``fab-t-50`` where the steps are not 100."""
        return "fab-t" if self.steps == 100 else f"fab-t-{self.steps}"

    def __call__(
        self,
        forward: Forward,
        image: Tensor,
        target: Tensor,
        threat: ThreatModel,
        *,
        loss: AttackLoss | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See :meth:`Attack.__call__`. Cost: one forward, and per target and step up to two forwards and one
        image gradient of each image that no wrong point within ``eps`` has been found for.

        An image is returned unchanged where none is found; ``generator`` is not used.

        Raises:
            SettingError: a ``loss`` is given; this attack minimises the distance.
        """
        if loss is not None:
            raise SettingError("attack.loss", "a loss", "none: fab-t minimises the distance")
        eps = float(threat.eps)
        closest, distance = self.minimal(forward, image, target, threat.norm, enough=eps)
        return torch.where((distance <= eps).view(-1, 1, 1, 1), closest, image)

    @torch.no_grad()
    def minimal(
        self, forward: Forward, image: Tensor, target: Tensor, norm: Norm, *, enough: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The closest wrong image found, at any distance.

        Args:
            forward, image, target: see :meth:`Attack.__call__`.
            norm: of the distance.
            enough: a distance in pixel units at which the search for a sample stops.

        Returns:
            Images [b, c, h, w] and their distances [b]: the image itself at 0 where the network is wrong
            from the start, and at infinity where no wrong image was found.
        """
        label = target if target.ndim == 1 else target.argmax(dim=1)
        logits = forward(image)
        right = logits.argmax(dim=1) == label
        distance = image.new_zeros(len(image)).masked_fill(right, math.inf)
        closest = image.clone()
        rivals = logits.scatter(1, label.view(-1, 1), math.inf).argsort(dim=1).flip(1)[:, 1:]
        for rival in rivals.T[: self.targets]:
            rows = (distance > enough).nonzero().flatten()
            if len(rows):
                goal = image[rows], label[rows], rival[rows]
                found, length = self._towards(forward, *goal, norm, enough)
                closer = length < distance[rows]
                closest[rows] = torch.where(closer.view(-1, 1, 1, 1), found, closest[rows])
                distance[rows] = torch.where(closer, length, distance[rows])
        return closest, distance

    def _towards(
        self, forward: Forward, image: Tensor, label: Tensor, rival: Tensor, norm: Norm, enough: float
    ) -> tuple[Tensor, Tensor]:
        """The closest wrong images on the way to one rival class each, and distances; see ``minimal``."""
        closest, distance = image.clone(), image.new_full((len(image),), math.inf)
        rows, point = torch.arange(len(image), device=image.device), image
        for _ in range(self.steps):
            gap, slope = value_and_gradient(forward, partial(_gap, label=label, rival=rival), point)
            point = self._step(image, point, gap, slope, norm)
            # The next linearisation could share this forward only where a point is right: one in fourteen
            # on robust networks, and keeping a graph for it cost more gradients than it saved forwards.
            wrong = forward(point).argmax(dim=1) != label
            length, shortest = _length((point - image).flatten(1), norm), distance[rows]
            closer = wrong & (length < shortest)
            distance[rows] = torch.where(closer, length, shortest)
            closest[rows] = torch.where(closer.view(-1, 1, 1, 1), point, closest[rows])
            point = torch.where(wrong.view(-1, 1, 1, 1), image + (point - image) * self.beta, point)
            left = (distance[rows] > enough).nonzero().flatten()
            if len(left) < len(rows):
                rows, image, label, rival, point = (x[left] for x in (rows, image, label, rival, point))
            if not len(left):
                break
        return closest, distance

    def _step(self, image: Tensor, point: Tensor, gap: Tensor, slope: Tensor, norm: Norm) -> Tensor:
        """Over the linearised boundary, leaning towards the point of it next to ``image`` (algorithm 1)."""
        start = torch.stack([point, image]).flatten(2)
        slope = slope.flatten(1)
        gaps = torch.stack([gap, gap + (slope * (start[1] - start[0])).sum(dim=1)])
        shift = _to_hyperplane(start, slope.expand_as(start), gaps, norm)
        near, home = shift.view(2, *image.shape)
        length = _length(shift, norm).clamp_min(1e-8).view(2, -1, 1, 1, 1)
        lean = (length[0] / length.sum(dim=0)).clamp_max(self.alpha_max)
        beyond: Tensor = (point + self.eta * near) * (1 - lean) + (image + self.eta * home) * lean
        return beyond.clamp(0, 1)


def _gap(logits: Tensor, label: Tensor, rival: Tensor) -> Tensor:
    """The rival's logit minus the true one, [m]."""
    pair = logits.gather(1, torch.stack([rival, label], dim=1))
    return pair[:, 0] - pair[:, 1]


def _length(delta: Tensor, norm: Norm) -> Tensor:
    """Length over the last axis."""
    length: Tensor = delta.abs().amax(dim=-1) if norm == "linf" else torch.linalg.vector_norm(delta, dim=-1)
    return length


def _to_hyperplane(point: Tensor, slope: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """The shortest shift that brings a linear function to zero without leaving [0, 1].

    A shift of "height" t moves each pixel against the slope by t (l-inf) or t * |slope| (l2) until it meets
    the box, so both norms ask for the t at which a sum of capped lines reaches ``gap``: sort the caps, add
    up. Where the box holds no zero, the corner next to it.

    Args:
        point: [..., d] in [0, 1].
        slope: [..., d], the gradient of the function.
        gap: [...], its value at ``point``.
        norm: of the shift.

    Returns:
        The shift [..., d].
    """
    # Free of scale: squares of small gradients would otherwise underflow.
    scale = slope.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    slope = slope / scale * torch.where(gap >= 0, 1, -1).unsqueeze(-1)
    drop = gap.abs().unsqueeze(-1) / scale
    speed = slope.sign() if norm == "linf" else slope
    room = torch.where(slope > 0, point, 1 - point)
    cap = torch.where(slope == 0, 0, room / speed.abs()).clamp_max(1e12)
    caps, order = cap.sort(dim=-1)
    rate = (slope * speed).gather(-1, order)
    # Added from the small end: what the large ones leave after subtraction is rounding, times caps of 1e12.
    rest = rate.flip(-1).cumsum(dim=-1).flip(-1)
    stopped = (rate * caps).cumsum(dim=-1) - rate * caps
    last = torch.searchsorted(stopped + caps * rest, drop).clamp_max(caps.shape[-1] - 1)
    rest, stopped, highest = (x.gather(-1, last) for x in (rest, stopped, caps))
    height = ((drop - stopped) / rest.clamp_min(torch.finfo(rest.dtype).tiny)).clamp_min(0)
    return -speed * torch.minimum(torch.minimum(height, highest), cap)
