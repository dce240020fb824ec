"""Attacks that see decisions only: which class the network names, neither logits nor gradients."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from softdefend.attacks.base import Randomness
from softdefend.attacks.losses import check_classes
from softdefend.attacks.minimal import Closest, MinimalAttack
from softdefend.core.errors import SettingError
from softdefend.core.goals import classes_of, fooled, reaches
from softdefend.core.threat import Norm
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel

NUDGE = 1e-4
"""Share of its distance by which a closest image is moved on: at the boundary itself rounding, which depends
on the batch, would decide over it."""
STARTS = 50
"""Random images tried as a wrong one to start from, at most."""


class Decisions:
    """The network as it answers with classes. Counts what each of n images has asked, and keeps the closest
    wrong image that was seen.

    Args:
        net: the network, asked in full precision.
        label: [n] int64.
        closest: what is kept.
        queries: of each image, at most.
        enough: a distance at which an image needs no more.

    Attributes:
        used: queries of each image, [n] int64.
    """

    def __init__(
        self, net: CountingModel, label: Tensor, closest: Closest, queries: int, enough: float
    ) -> None:
        self.net, self.label, self.closest = net, label, closest
        self.queries, self.enough = queries, enough
        self.used = torch.zeros_like(classes_of(label))
        self._reserved = int(enough == 0)

    def active(self, rows: Tensor) -> Tensor:
        """Those of ``rows`` [m] that may and need to ask on."""
        left = (self.used[rows] < self.queries - self._reserved) & (self.closest.distance[rows] > self.enough)
        return rows[left]

    def places(self, rows: Tensor) -> Tensor:
        """Where each of the n images stands among ``rows`` [m], [n]; -1 where it does not."""
        place = torch.full_like(self.used, -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        return place

    def masked(self, rows: Tensor, x_adv: Tensor) -> Tensor:
        """``x_adv`` [m, c, h, w], clean where the images at ``rows`` [m] may not change."""
        return x_adv if self.net.mask is None else self.net.mask(x_adv, rows)

    def noise(self, context: AttackContext, image: Tensor, rows: Tensor, number: int) -> Tensor:
        """Standard normal numbers shaped like ``image`` [m, c, h, w], zero where the images at ``rows`` [m]
        may not change: what is spent there would be missing elsewhere."""
        noise = context.random.normal_like(image, rows, number)
        return noise if self.net.mask is None else noise * self.net.mask.free[rows]

    def wrong(self, rows: Tensor, x_adv: Tensor) -> Tensor:
        """Whether the network gets ``x_adv`` [m, c, h, w], made of the images at ``rows`` [m], wrong, [m]."""
        self.used[rows] += 1
        wrong = fooled(self.net.exact(rows)(x_adv), self.label[rows])
        self.closest.update(rows, x_adv, wrong)
        return wrong

    def move_on(self) -> None:
        """Spend a last query on a point a little beyond the closest wrong image, where no distance is enough:
        it takes the image's place where it is wrong too."""
        distance = self.closest.distance
        rows = ((distance > 0) & distance.isfinite() & (self.used < self.queries)).nonzero().flatten()
        if not self._reserved or not len(rows):
            return
        clean, near = self.closest.clean[rows], self.closest.image[rows]
        beyond = (clean + (1 + NUDGE) * (near - clean)).clamp(0, 1)
        self.used[rows] += 1
        wrong = fooled(self.net.exact(rows)(beyond), self.label[rows])
        self.closest.distance[rows[wrong]] = math.inf
        self.closest.update(rows, beyond, wrong)


@dataclass(frozen=True)
class DecisionAttack(MinimalAttack):
    """An attack that minimises the distance by decisions alone, with a budget of queries for each image; a
    subclass writes :meth:`search`.

    Called with a threat model, it returns what it found within ``eps``, and the image itself where that is
    nothing; an image asks no more once it is there. In an evaluation all random numbers belong to the image.
    A search towards a class starts at an image of the same batch that has it.

    Args:
        queries: of each image, >= 1.

    Raises:
        SettingError: no query.
    """

    queries: int = 5000
    """Queries of each image, >= 1."""
    randomness: ClassVar[Randomness] = "image"
    several_batches: ClassVar[bool] = True
    takes_target: ClassVar[bool] = True
    suffix: ClassVar[str | None] = "[-QUERIES]"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 1:
            raise SettingError("attack.queries", self.queries, "a whole number >= 1")

    @abstractmethod
    def search(
        self, decisions: Decisions, image: Tensor, norm: Norm, context: AttackContext, state: SearchState
    ) -> None:
        """Ask until no image is active.

        Args:
            decisions: keeps the closest wrong image.
            image: clean, [n, c, h, w].
            norm: of the distance.
            context: the source of random numbers.
            state: where the search stands: at wrong images, where some were found.
        """

    def closest(
        self,
        net: CountingModel,
        image: Tensor,
        label: Tensor,
        norm: Norm,
        enough: float,
        context: AttackContext,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`MinimalAttack.closest`. Cost: one forward, and at most ``queries`` forwards of each
        image that is right."""
        closest, clean = Closest(image, norm), net.clean_logits(image)
        check_classes(clean)
        everyone = torch.arange(len(image), device=image.device)
        closest.update(everyone, image, fooled(clean, label))
        decisions = Decisions(net, label, closest, self.queries, enough)
        state = SearchState(decisions, image, context)
        if state.step == 0:
            if reaches(label):
                _start_in_batch(decisions, image, state, context, clean)
            _start(decisions, image, state, context)
        self.search(decisions, image, norm, context, state)
        decisions.move_on()
        return closest.image, closest.distance


class SearchState:
    """Where a search stands: what a killed evaluation goes on from.

    Attributes:
        step: of the search, from 1; 0 before a start was looked for.
        point: a wrong image near the boundary, where one was found, [n, c, h, w].
        found: where one was, [n] bool.
        scale: a number that the search keeps for each image, [n].
    """

    def __init__(self, decisions: Decisions, image: Tensor, context: AttackContext) -> None:
        self._decisions, self._context = decisions, context
        self.step, self.point = 0, image.clone()
        self.found = torch.zeros(len(image), dtype=torch.bool, device=image.device)
        self.scale = image.new_ones(len(image))
        saved = context.progress.load()
        if saved:
            self.step, self.point = int(saved["step"]), saved["point"]
            self.found, self.scale = saved["found"], saved["scale"]
            decisions.used = saved["used"]
            decisions.closest.image, decisions.closest.distance = saved["closest"], saved["distance"]

    def rows(self) -> Tensor:
        """The images that still search, [m]."""
        return self._decisions.active(self.found.nonzero().flatten())

    def next_step(self) -> None:
        """A step is done."""
        self.step += 1
        self._context.progress.save(self._state)

    def _state(self) -> dict[str, Tensor]:
        closest = self._decisions.closest
        return {
            "step": torch.tensor(self.step),
            "point": self.point,
            "found": self.found,
            "scale": self.scale,
            "used": self._decisions.used,
            "closest": closest.image,
            "distance": closest.distance,
        }


def _start(decisions: Decisions, image: Tensor, state: SearchState, context: AttackContext) -> None:
    """A wrong image for each of those that are right: the first of random ones, of ever coarser blocks."""
    rows = decisions.active((~state.found).nonzero().flatten())
    for number in range(STARTS):
        rows = decisions.active(rows)
        if not len(rows):
            break
        noise = context.random.normal_like(image[rows], rows, number)
        start = _blocks(0.5 * (1 + torch.erf(noise / math.sqrt(2))), 2 ** (number % 4))
        start = decisions.masked(rows, start)
        wrong = decisions.wrong(rows, start)
        state.point[rows[wrong]], state.found[rows[wrong]] = start[wrong], True
        rows = rows[~wrong]
    state.next_step()


def _start_in_batch(
    decisions: Decisions, image: Tensor, state: SearchState, context: AttackContext, clean: Tensor
) -> None:
    """Where a class is to be reached, the first image of its batch that has it: a random one seldom does."""
    batch = context.random.batch.to(image.device)
    has = batch[:, None] == batch
    has &= clean.argmax(dim=1) == classes_of(decisions.label)[:, None]
    rows = decisions.active(has.any(dim=1).nonzero().flatten())
    start = decisions.masked(rows, image[has[rows].int().argmax(dim=1)])
    reached = decisions.wrong(rows, start)
    state.point[rows[reached]], state.found[rows[reached]] = start[reached], True


def _blocks(image: Tensor, side: int) -> Tensor:
    """Images [m, c, h, w] in which blocks of some pixels have one color."""
    coarse = image[:, :, ::side, ::side]
    return F.interpolate(coarse, scale_factor=float(side))[:, :, : image.shape[2], : image.shape[3]]


def between(image: Tensor, point: Tensor, share: Tensor, norm: Norm) -> Tensor:
    """The points [m, c, h, w] at a share [m] of the distance from ``image`` to ``point``: on the line in l2,
    by cutting changes in l-inf."""
    delta, share = point - image, share.view(-1, 1, 1, 1)
    if norm == "linf":
        most = share * delta.abs().amax(dim=(1, 2, 3), keepdim=True)
        return image + torch.minimum(torch.maximum(delta, -most), most)
    return image + share * delta


def to_boundary(
    decisions: Decisions, image: Tensor, rows: Tensor, point: Tensor, norm: Norm, tolerance: float
) -> Tensor:
    """Wrong images [m, c, h, w] a share ``tolerance`` of the way or less beyond right ones, by bisection from
    the wrong ``point`` [m, c, h, w] towards the image; farther where the queries end before."""
    low, high = torch.zeros(len(rows)).to(point), torch.ones(len(rows)).to(point)
    place = decisions.places(rows)
    for _ in range(math.ceil(math.log2(1 / tolerance))):
        left = decisions.active(rows)
        if not len(left):
            break
        at = place[left]
        middle = (low[at] + high[at]) / 2
        wrong = decisions.wrong(left, between(image[left], point[at], middle, norm))
        high[at], low[at] = torch.where(wrong, middle, high[at]), torch.where(wrong, low[at], middle)
    return between(image[rows], point, high, norm)
