"""Training against several norms at once: the worst of them, their mean, the steepest steps among them, or
each on a part of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from softdefend.attacks import PGD, Attack, AttackLoss, cross_entropy, value_and_gradient
from softdefend.attacks.base import larger, pick
from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget, Norm, ThreatModel
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.labels import Predictions, Supervision
from softdefend.objectives.at import PGDAT
from softdefend.objectives.base import OBJECTIVES

if TYPE_CHECKING:
    from softdefend.data import Batch

How = Literal["max", "average", "msd", "mixed"]


@dataclass(frozen=True)
class MultiNormAttack(Attack):
    """The attack inside training, in every ball at once. Its results lie in the union of the balls.

    Args:
        how: see :class:`MultiNorm`.
        balls: one for each norm; that of the run's own norm is replaced by the threat in force.
        pgd: what is run in the balls. Where its step size is not that of the run's norm it is eps / 4.
    """

    how: How
    balls: tuple[ThreatModel, ...]
    pgd: PGD

    @property
    def name(self) -> str:
        return f"{self.how}-{self.pgd.name}"

    def check(self, threat: ThreatModel) -> None:
        self.pgd.check(threat)

    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        loss = context.loss or partial(cross_entropy, target=label)
        balls = [threat if ball.norm == threat.norm else ball for ball in self.balls]
        if self.how in ("msd", "mixed"):
            return self._one_search(net, image, loss, balls, threat, context)
        found = [self._pgd(ball, threat).run(net, image, label, ball, context) for ball in balls]
        if self.how == "average":
            return torch.cat(found)
        return _highest(net, loss, found)

    def _one_search(
        self,
        net: CountingModel,
        image: Tensor,
        loss: AttackLoss,
        balls: list[ThreatModel],
        threat: ThreatModel,
        context: AttackContext,
    ) -> Tensor:
        """Steps for which all balls share a gradient. Each image takes the step of the ball that raises its
        loss most (msd), or always that of its own ball (mixed)."""
        own = context.random.places(len(image), image.device) % len(balls)
        x_adv = image
        if self.how == "mixed" and self.pgd.start != "none":
            drawn = [context.random.in_ball(b, image, None, number) for number, b in enumerate(balls)]
            starts = [ball.project(image, start) for ball, start in zip(balls, drawn, strict=True)]
            x_adv = _of_own(own, starts)
        for _ in range(self.pgd.steps):
            _, grad = value_and_gradient(net, loss, x_adv)
            moved = [ball.move(image, x_adv, grad, self._step_size(ball, threat)) for ball in balls]
            x_adv = _of_own(own, moved) if self.how == "mixed" else _highest(net, loss, moved)
        return x_adv

    def _step_size(self, ball: ThreatModel, threat: ThreatModel) -> float:
        given = self.pgd.step_size if ball.norm == threat.norm else None
        return float(ball.eps) / 4 if given is None else float(given)

    def _pgd(self, ball: ThreatModel, threat: ThreatModel) -> PGD:
        return self.pgd if ball.norm == threat.norm else replace(self.pgd, step_size=None)


def _of_own(own: Tensor, each: list[Tensor]) -> Tensor:
    """Of the images [b, c, h, w] of each ball those that belong to it, by the number of their ball [b]."""
    chosen = each[0]
    for number, images in enumerate(each[1:], 1):
        chosen = pick(own == number, images, chosen)
    return chosen


@torch.no_grad()
def _highest(net: CountingModel, loss: AttackLoss, candidates: list[Tensor]) -> Tensor:
    """Of each image the candidate [b, c, h, w] with the largest loss, the earliest on a tie."""
    best, value = candidates[0], loss(net(candidates[0]))
    for x_adv in candidates[1:]:
        best, value = larger(x_adv, loss(net(x_adv)), best, value)
    return best


@OBJECTIVES.register("MultiNorm")
class MultiNorm(PGDAT):
    """PGD-AT against the union of balls in several norms: the worst of them, their mean, the steepest steps
    among them, or each on a part of the batch.

    The ball of the run's own norm has the threat's eps. Where the threat's eps is ramped the others are not.
    66 forward units with PGD-10 for the worst of three norms.

    Args:
        how: ``max`` trains on the one of the PGD results in all balls that has the largest loss, ``average``
            on all of them; ``msd`` takes at each step the move with the largest loss; ``mixed`` gives every
            image of a batch one ball in turn, at the cost of a single norm.
        linf, l2, l1: radius in each norm, such as 8/255; null leaves the norm out, unless it is the run's.

    Raises:
        SettingError: an unknown ``how``, a radius that is none, or no second norm.
    """

    source = "Tramèr & Boneh 2019 (max, average); Maini et al. 2020 (msd); Croce & Hein 2022 (mixed)"

    def __init__(
        self,
        how: str = "max",
        linf: str | None = "8/255",
        l2: str | None = "128/255",
        l1: str | None = "12",
    ) -> None:
        if how not in get_args(How):
            raise SettingError("objective.how", repr(how), " or ".join(get_args(How)))
        self.how, self.linf, self.l2, self.l1 = how, linf, l2, l1
        self._balls("linf")
        if sum(radius is not None for radius in (linf, l2, l1)) < 2:
            raise SettingError("objective.l2", "fewer than two norms", "a radius in two norms or three")

    def _balls(self, trained: Norm) -> tuple[ThreatModel, ...]:
        radii: dict[Norm, str | None] = {"linf": self.linf, "l2": self.l2, "l1": self.l1}
        balls = []
        for norm, radius in radii.items():
            if radius is None and norm != trained:
                continue
            try:
                balls.append(ThreatModel(norm, Budget(radius if radius is not None else "0.5")))
            except SettingError as error:
                raise SettingError(f"objective.{norm}", repr(radius), error.accepted) from error
        return tuple(balls)

    @property
    def norms(self) -> int:
        """How many norms there are."""
        return sum(radius is not None for radius in (self.linf, self.l2, self.l1))

    def attack_units(self, steps: int) -> float:
        per_norm = {"max": 2 * steps + 1, "average": 2 * steps, "msd": steps, "mixed": 0}[self.how]
        return self.norms * per_norm + (2 * steps if self.how in ("msd", "mixed") else 0)

    def units(self, steps: int) -> float:
        forwards = self.norms if self.how == "average" else 1
        return self.attack_units(steps) + 3 * forwards

    def training_attack(self, configured: PGD, threat: ThreatModel) -> Attack:
        pgd = super().training_attack(configured, threat)
        assert isinstance(pgd, PGD)
        how: dict[str, How] = {one: one for one in get_args(How)}
        return MultiNormAttack(how[self.how], self._balls(threat.norm), pgd)

    def outer_loss(self, predictions: Predictions, batch: Batch, supervision: Supervision) -> Tensor:
        repeats = len(predictions.adversarial) // len(batch.label)
        return super().outer_loss(predictions, batch, supervision.repeat(repeats))
