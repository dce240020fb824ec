"""HopSkipJump (Chen et al., arXiv 1904.02144): gradients at the boundary, estimated from decisions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softdefend.attacks.decision import STARTS, DecisionAttack, Decisions, SearchState, to_boundary
from softdefend.attacks.minimal import steepest
from softdefend.attacks.names import ATTACKS
from softdefend.core.errors import SettingError
from softdefend.core.threat import Norm, length
from softdefend.execution.context import AttackContext

MOST_HALVINGS = 20
"""Of a leap that does not end at a wrong image, before the point is kept as it is."""


@ATTACKS.register("hop-skip-jump")
@dataclass(frozen=True)
class HopSkipJump(DecisionAttack):
    """From a wrong image at the boundary: estimate the boundary's normal from the answers to random probes,
    leap along it, and go back to the boundary by bisection. In l-inf or l2.

    Args:
        queries: of each image, >= 1.
        probes: of the first estimate, >= 1; the t-th has sqrt(t) times as many.

    Raises:
        SettingError: a count outside these ranges.
    """

    probes: int = 100
    """Probes of the first estimate of a normal, >= 1."""
    pattern: ClassVar[str] = r"hop-skip-jump(?:-(?P<queries>\d+))?"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 1:
            raise SettingError("attack.probes", self.probes, "a whole number >= 1")

    @property
    def name(self) -> str:
        """``hop-skip-jump``, or ``hop-skip-jump-1000`` where the queries are not 5000."""
        return "hop-skip-jump" if self.queries == 5000 else f"hop-skip-jump-{self.queries}"

    def search(
        self, decisions: Decisions, image: Tensor, norm: Norm, context: AttackContext, state: SearchState
    ) -> None:
        """See :meth:`DecisionAttack.search`."""
        pixels, point = image[0].numel(), state.point
        tolerance = 1 / (pixels * math.sqrt(pixels)) if norm == "l2" else 1 / pixels**2
        tolerance = min(tolerance, 0.25)
        # Of the distance: how far away a probe lies (section 4.2 of the paper).
        probe = tolerance * (math.sqrt(pixels) if norm == "l2" else pixels)
        if state.step == 1:
            rows = state.rows()
            point[rows] = to_boundary(decisions, image, rows, point[rows], norm, tolerance)
            state.next_step()
        drawn = STARTS + sum(self._probes(step) for step in range(2, state.step))
        while len(rows := state.rows()):
            number, count = state.step - 1, self._probes(state.step)
            distance = length(point[rows] - image[rows], norm)
            radius = torch.full_like(distance, 0.1) if number == 1 else probe * distance
            normal = _normal(
                decisions, image, rows, point[rows], radius, context, range(drawn, drawn + count)
            )
            drawn += count
            leapt = _leap(decisions, rows, point, steepest(normal, norm)[0], distance / math.sqrt(number))
            point[rows] = to_boundary(decisions, image, rows, leapt, norm, tolerance)
            state.next_step()

    def _probes(self, step: int) -> int:
        return math.ceil(self.probes * math.sqrt(step - 1))


def _normal(
    decisions: Decisions,
    image: Tensor,
    rows: Tensor,
    point: Tensor,
    radius: Tensor,
    context: AttackContext,
    draws: range,
) -> Tensor:
    """The boundary's normal at each point, towards wrong images, [m, c, h, w]: the mean of probes that are
    wrong less that of those that are right (equation 16), or of either where there are no others."""
    signed, plain = torch.zeros_like(point), torch.zeros_like(point)
    votes, asked = torch.zeros_like(radius), torch.zeros_like(radius)
    place = decisions.places(rows)
    for number in draws:
        left = decisions.active(rows)
        if not len(left):
            break
        at = place[left]
        noise = decisions.noise(context, image[left], left, number)
        noise = noise / torch.linalg.vector_norm(noise, dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
        probe = (point[at] + radius[at].view(-1, 1, 1, 1) * noise).clamp(0, 1)
        moved = (probe - point[at]) / radius[at].view(-1, 1, 1, 1).clamp_min(1e-12)
        vote = torch.where(decisions.wrong(left, probe), 1.0, -1.0).to(point)
        signed[at] += vote.view(-1, 1, 1, 1) * moved
        plain[at] += moved
        votes[at] += vote
        asked[at] += 1
    mean = (votes / asked.clamp_min(1)).view(-1, 1, 1, 1)
    return torch.where(mean.abs() == 1, mean * plain, signed - mean * plain)


def _leap(decisions: Decisions, rows: Tensor, point: Tensor, way: Tensor, size: Tensor) -> Tensor:
    """Wrong images [m, c, h, w] along ``way``: the first of ever shorter leaps that ends at one."""
    leapt, open_, size = point[rows].clone(), torch.ones_like(rows, dtype=torch.bool), size.clone()
    place = decisions.places(rows)
    for _ in range(MOST_HALVINGS):
        left = decisions.active(rows[open_])
        if not len(left):
            break
        at = place[left]
        candidate = (point[left] + size[at].view(-1, 1, 1, 1) * way[at]).clamp(0, 1)
        wrong = decisions.wrong(left, candidate)
        leapt[at[wrong]] = candidate[wrong]
        open_[at] = ~wrong
        size[at] /= 2
    return leapt
