"""SurFree (Maho et al., arXiv 2011.12807): along circles through the image, without estimating a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softdefend.attacks.decision import STARTS, DecisionAttack, Decisions, SearchState, to_boundary
from softdefend.attacks.names import ATTACKS
from softdefend.core.threat import Norm
from softdefend.execution.context import AttackContext

FIRST_ANGLE = math.pi / 6
"""The first angle that is tried, and the largest share of the quarter circle."""
TRIALS, BISECTIONS, SHRINK = 3, 7, 0.98
"""Angles tried in each of two directions; halvings of the interval around the one found; what the first angle
is multiplied by after a plane without success, and divided by after one with."""


@ATTACKS.register("surfree")
@dataclass(frozen=True)
class SurFree(DecisionAttack):
    """From a wrong image at the boundary, in l2: turn in a random plane on the circle whose diameter reaches
    from the image to that point. Where the boundary is flat, that is the shortest way to stay on it.

    Unlike in the paper's code planes are drawn from all pixels, not from low frequencies, and at a right
    angle to the current direction only.

    Args:
        queries: of each image, >= 1.

    Raises:
        SettingError: no query.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    pattern: ClassVar[str] = r"surfree(?:-(?P<queries>\d+))?"

    @property
    def name(self) -> str:
        """``surfree``, or ``surfree-1000`` where the queries are not 5000."""
        return "surfree" if self.queries == 5000 else f"surfree-{self.queries}"

    def search(
        self, decisions: Decisions, image: Tensor, norm: Norm, context: AttackContext, state: SearchState
    ) -> None:
        """See :meth:`DecisionAttack.search`; ``state.scale`` is the first angle of each image over the
        largest."""
        point = state.point
        if state.step == 1:
            rows = state.rows()
            point[rows] = to_boundary(decisions, image, rows, point[rows], norm, 2.0**-10)
            state.next_step()
        while len(rows := state.rows()):
            noise = decisions.noise(context, image[rows], rows, STARTS + state.step)
            circle = _Circle.through(image[rows], point[rows], noise)
            angle = _first_wrong(decisions, rows, circle, FIRST_ANGLE * state.scale[rows])
            turned = angle != 0
            angle = _largest_wrong(decisions, rows, circle, angle)
            point[rows] = torch.where(turned.view(-1, 1, 1, 1), circle.at(angle), point[rows])
            scale = state.scale[rows]
            state.scale[rows] = torch.where(turned, scale / SHRINK, scale * SHRINK).clamp_max(1.0)
            state.next_step()


@dataclass(frozen=True)
class _Circle:
    """A circle for each of m images, through the image and a wrong point."""

    image: Tensor
    """[m, c, h, w]."""
    way: Tensor
    """Unit vectors towards the wrong point, [m, c, h, w]."""
    across: Tensor
    """Unit vectors at a right angle to it, [m, c, h, w]."""
    diameter: Tensor
    """[m, 1, 1, 1]."""

    @classmethod
    def through(cls, image: Tensor, point: Tensor, noise: Tensor) -> _Circle:
        """In the plane that ``noise`` [m, c, h, w] lies in."""
        delta = point - image
        diameter = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        way = delta / diameter.clamp_min(1e-12)
        across = noise - (noise * way).sum(dim=(1, 2, 3), keepdim=True) * way
        size = torch.linalg.vector_norm(across, dim=(1, 2, 3), keepdim=True)
        return cls(image, way, across / size.clamp_min(1e-12), diameter)

    def at(self, angle: Tensor, place: Tensor | slice = slice(None)) -> Tensor:
        """The points at angles [p] of the images at ``place`` [p], cut to the box: the wrong point itself at
        0, nearer by the angle's cosine elsewhere."""
        angle = angle.view(-1, 1, 1, 1)
        ray = angle.cos() * self.way[place] + angle.sin() * self.across[place]
        return (self.image[place] + self.diameter[place] * angle.cos() * ray).clamp(0, 1)


def _first_wrong(decisions: Decisions, rows: Tensor, circle: _Circle, largest: Tensor) -> Tensor:
    """The first of some angles, to both sides and ever smaller, whose point is wrong, [m]; 0 for none."""
    found = torch.zeros_like(largest)
    place = decisions.places(rows)
    for trial in range(2 * TRIALS):
        left = decisions.active(rows[found == 0])
        if not len(left):
            break
        at = place[left]
        angle = (-1) ** trial * largest[at] / 2 ** (trial // 2)
        found[at] = torch.where(decisions.wrong(left, circle.at(angle, at)), angle, found[at])
    return found


def _largest_wrong(decisions: Decisions, rows: Tensor, circle: _Circle, angle: Tensor) -> Tensor:
    """The largest angle up to twice the one found whose point is wrong, by bisection, [m]."""
    low, high = angle.clone(), (2 * angle).clamp(-math.pi / 2, math.pi / 2)
    place = decisions.places(rows)
    for _ in range(BISECTIONS):
        left = decisions.active(rows[angle != 0])
        if not len(left):
            break
        at = place[left]
        middle = (low[at] + high[at]) / 2
        wrong = decisions.wrong(left, circle.at(middle, at))
        low[at], high[at] = torch.where(wrong, middle, low[at]), torch.where(wrong, high[at], middle)
    return low
