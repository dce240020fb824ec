"""Carlini and Wagner's attacks (arXiv 1608.04644): the original in l2, and what papers call CW in l-inf."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from softdefend.attacks.losses import check_classes, check_differentiable, margin
from softdefend.attacks.minimal import Closest, MinimalAttack
from softdefend.attacks.names import ATTACKS, COUNTS, EOT, count_suffix
from softdefend.attacks.pgd import PGD, eot_suffix
from softdefend.core.errors import check_values
from softdefend.core.goals import fooled
from softdefend.core.threat import Norm
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel, Forward


@ATTACKS.register("cw-linf")
@dataclass(frozen=True)
class CWLinf(PGD):
    """Projected gradient ascent on the margin, 30 steps in l-inf: what papers on adversarial training report
    as CW. It is ``pgd-30-margin`` under its usual name, not the l-inf attack of Carlini & Wagner.

    Args:
        steps, step_size, restarts, start, keep, eot: as in :class:`PGD`.

    Raises:
        SettingError: as in :class:`PGD`.
    """

    steps: int = 30
    """Gradient steps, >= 0."""
    loss: str = field(default="margin", init=False)
    norms: ClassVar[tuple[Norm, ...]] = ("linf",)
    pattern: ClassVar[str] = rf"cw-linf{COUNTS}{EOT}"
    suffix: ClassVar[str | None] = "[-STEPS[xRESTARTS]][-eotFORWARDS]"

    @property
    def name(self) -> str:
        """``cw-linf``; off the defaults ``cw-linf-100``, ``cw-linf-30x5`` (restarts)."""
        return "cw-linf" + count_suffix(self.steps, self.restarts, default=30) + eot_suffix(self.eot)


@ATTACKS.register("cw-l2")
@dataclass(frozen=True)
class CWL2(MinimalAttack):
    """Carlini & Wagner's l2 attack, untargeted and without confidence: Adam on the squared distance plus c
    times how far the margin is from wrong, the image written as a tanh; c is found by bisection for each
    image.

    Unlike the authors' code, which stops a batch when its mean loss stalls, each image stops by itself.

    Args:
        rounds: values of c tried, >= 1.
        steps: steps of Adam per round, >= 1; the authors' 10,000 cost ten times as much as the 1,000 here.
        lr: learning rate of Adam, > 0, in units of the tanh's argument.
        first_c: the first c, > 0; times ten after a round without success as long as there was none.

    Raises:
        SettingError: a value outside these ranges.
    """

    rounds: int = 9
    """Values of c tried, >= 1."""
    steps: int = 1000
    """Steps of Adam per round, >= 1."""
    lr: float = 0.01
    """Learning rate of Adam, > 0."""
    first_c: float = 1e-3
    """The first c, > 0."""
    takes_target: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    pattern: ClassVar[str] = r"cw-l2(?:-(?P<rounds>\d+)x(?P<steps>\d+))?"
    suffix: ClassVar[str | None] = "[-ROUNDSxSTEPS]"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            ("rounds", self.rounds >= 1, "a whole number >= 1"),
            ("steps", self.steps >= 1, "a whole number >= 1"),
            ("lr", 0 < self.lr < math.inf, "a positive learning rate"),
            ("first_c", 0 < self.first_c < math.inf, "a positive weight"),
        )
        check_values("attack", self, checks)

    @property
    def name(self) -> str:
        """``cw-l2``, or ``cw-l2-5x100`` where rounds and steps are not 9 and 1000."""
        return "cw-l2" if (self.rounds, self.steps) == (9, 1000) else f"cw-l2-{self.rounds}x{self.steps}"

    def closest(
        self,
        net: CountingModel,
        image: Tensor,
        label: Tensor,
        norm: Norm,
        enough: float,
        context: AttackContext,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`MinimalAttack.closest`. Cost: one forward, and at most ``rounds * steps`` forwards and
        image gradients of each image that is right.

        Raises:
            SettingError: a network with fewer than two classes, or without gradients
                in the image.
        """
        closest, logits = Closest(image, norm), net(image)
        check_classes(logits)
        everyone = torch.arange(len(image), device=image.device)
        closest.update(everyone, image, fooled(logits, label))
        c = image.new_full((len(image),), self.first_c)
        low, high = torch.zeros_like(c), torch.full_like(c, math.inf)
        for _ in range(self.rounds):
            rows = (closest.distance > enough).nonzero().flatten()
            if not len(rows):
                break
            found = self._round(net, closest, rows, label[rows], c[rows], enough)
            high[rows] = torch.where(found, c[rows], high[rows])
            low[rows] = torch.where(found, low[rows], c[rows])
            c = torch.where(high.isfinite(), (low + high) / 2, 10 * low)
        return closest.image, closest.distance

    def _round(
        self, net: CountingModel, closest: Closest, rows: Tensor, label: Tensor, c: Tensor, enough: float
    ) -> Tensor:
        """Adam from the images at one c each; whether a wrong point was met, [m]."""
        met = torch.zeros_like(label, dtype=torch.bool)
        image = closest.clean[rows]
        # The authors' factor: keeps the argument of pixels at 0 and 1 finite.
        argument = ((2 * image - 1) * (1 - 1e-6)).atanh()
        mean, square = torch.zeros_like(image), torch.zeros_like(image)
        before = torch.full_like(c, math.inf)
        place = torch.arange(len(rows), device=rows.device)
        for step in range(self.steps):
            x_adv, wrong, loss, grad = _descend(net.at(rows), argument, image, label, c)
            closest.update(rows, x_adv, wrong)
            met[place] |= wrong
            mean, square = torch.lerp(grad, mean, 0.9), torch.lerp(grad.square(), square, 0.999)
            scale = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            argument = argument - self.lr / (1 - 0.9 ** (step + 1)) * mean / scale
            active = closest.distance[rows] > enough
            if step % max(self.steps // 10, 1) == 0:
                active &= ~(loss > 0.9999 * before)
                before = loss
            left = active.nonzero().flatten()
            if len(left) < len(rows):
                rows, label, c, image, argument, mean, square, before, place = (
                    x[left] for x in (rows, label, c, image, argument, mean, square, before, place)
                )
            if not len(left):
                break
        return met


def _descend(
    net: Forward, argument: Tensor, image: Tensor, label: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [m, c, h, w] of the tanh's arguments, whether they are wrong, the loss [m] and its gradient in
    the arguments, zero where it is NaN or infinite."""
    argument = argument.detach().requires_grad_(True)
    with torch.enable_grad():
        x_adv = (argument.tanh() + 1) / 2
        logits = net(x_adv)
        check_differentiable(logits)
        right_by = (-margin(logits, label)).clamp_min(0)
        loss = (x_adv - image).square().sum(dim=(1, 2, 3)) + c * right_by
        (grad,) = torch.autograd.grad(loss.sum(), argument)
    return x_adv.detach(), fooled(logits, label), loss.detach(), grad.nan_to_num(0, 0, 0)
