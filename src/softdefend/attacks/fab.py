"""Fast adaptive boundary attack (Croce & Hein, arXiv 1907.02044): the closest wrong image it finds.

Steps, targets, restarts and verdicts are those of AutoAttack's reference implementation (arXiv 2003.01690).
The first search of each target starts at the image: without restarts nothing is random, and no image feels
its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from softdefend.attacks.base import Randomness, value_and_gradient
from softdefend.attacks.losses import check_classes, image_gradient, margin
from softdefend.attacks.minimal import MinimalAttack
from softdefend.attacks.names import ATTACKS, COUNTS, count_suffix
from softdefend.core.errors import check_values
from softdefend.core.goals import fooled, reaches
from softdefend.core.threat import Norm
from softdefend.execution.context import ActiveImages, AttackContext, steps_until_packing
from softdefend.execution.counting import CountingModel, RowsModel


@ATTACKS.register("fab")
@ATTACKS.register("fab-t")
@dataclass(frozen=True)
class FAB(MinimalAttack):
    """FAB in l-inf, l2 or l1.

    Linearises the boundary to another class, steps beyond it, leaning back to the image, and goes part of
    the way home from each wrong point. Targeted, it does so against each of the runner-up classes of the
    clean image in turn; untargeted, against whichever class is closest at each step, which costs a gradient
    for every class.

    Args:
        steps: linearisations per search, >= 0.
        targets: runner-up classes tried, >= 1; all k - 1 where there are fewer.
        restarts: searches per target (of one that is untargeted: in all), >= 1. Those after the first begin
            at a random point half of ``eps`` away.
        targeted: towards one class after the other.
        alpha_max: largest weight of the projection of the clean image in a step, in [0, 1].
        eta: overshoot of a projection, >= 1.
        beta: share of the way that a wrong point keeps when it goes home, in (0, 1).

    Raises:
        SettingError: a value outside these ranges.
    """

    steps: int = 100
    """Linearisations per search, >= 0."""
    targets: int = 9
    """Runner-up classes tried, >= 1."""
    alpha_max: float = 0.1
    """Largest weight of the projection of the clean image in a step, in [0, 1]."""
    eta: float = 1.05
    """Overshoot of a projection, >= 1."""
    beta: float = 0.9
    """Share of the way that a wrong point keeps when it goes home, in (0, 1)."""
    restarts: int = 1
    """Searches per target, >= 1; all but the first begin at a random point."""
    targeted: bool = True
    """Towards one class after the other, or always towards the closest."""
    randomness: ClassVar[Randomness] = "batch"
    several_batches: ClassVar[bool] = True
    takes_target: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")
    pattern: ClassVar[str] = rf"fab(?:-t)?{COUNTS}"
    suffix: ClassVar[str | None] = "[-STEPS[xRESTARTS]]"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = (
            ("steps", self.steps >= 0, "a whole number >= 0"),
            ("targets", self.targets >= 1, "a whole number >= 1"),
            ("restarts", self.restarts >= 1, "a whole number >= 1"),
            ("alpha_max", 0 <= self.alpha_max <= 1, "a weight in [0, 1]"),
            ("eta", 1 <= self.eta < math.inf, "a factor >= 1"),
            ("beta", 0 < self.beta < 1, "a share in (0, 1)"),
        )
        check_values("attack", self, checks)

    @property
    def name(self) -> str:
        """``fab-t``, untargeted ``fab``; off the defaults ``fab-t-50``, ``fab-100x5`` (restarts)."""
        return ("fab-t" if self.targeted else "fab") + count_suffix(self.steps, self.restarts, default=100)

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        """See :meth:`Attack.from_name`."""
        found = super().from_name(name)
        return None if found is None else replace(found, targeted=name.startswith("fab-t"))

    def closest(
        self,
        net: CountingModel,
        image: Tensor,
        label: Tensor,
        norm: Norm,
        enough: float,
        context: AttackContext,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`MinimalAttack.closest`. Restarts begin half of ``enough`` away from the image.

        Cost: one forward, and per search and step up to two forwards and one image gradient (untargeted: one
        for each class) of each image that no wrong point within ``enough`` has been found for.

        Without restarts the result depends on the image alone; a restart's noise is drawn for the images of a
        batch that are still right, from a generator that may live on the CPU wherever the images are.
        """
        logits = net.clean_logits(image)
        check_classes(logits)
        plan = [
            (target, restart) for target in self._targets(logits, label) for restart in range(self.restarts)
        ]
        right = ~fooled(logits, label)
        closest, distance = image.clone(), image.new_zeros(len(image)).masked_fill(right, math.inf)
        results = {"closest": closest, "distance": distance}
        for number, left in context.searches(len(plan), results, lambda: distance > enough):
            target, restart = plan[number]
            start = image[left]
            if restart > 0:
                noise = context.random.batch_noise(start, left, normal=norm != "linf")
                start = _away(start, noise, 0.5 * enough, norm)
            for rows, part in zip(context.portions(left), context.portions(start), strict=True):
                active = context.active(rows, many_gradients=not (self.targeted or reaches(label)))
                found, length = self._search(active, _Given(image, label, target), part, norm, enough)
                closer = length < distance[rows]
                closest[rows] = torch.where(closer.view(-1, 1, 1, 1), found, closest[rows])
                distance[rows] = torch.where(closer, length, distance[rows])
        return closest, distance

    def _targets(self, logits: Tensor, label: Tensor) -> list[Tensor]:
        """The class that each search is to reach, [n] each, from the clean logits. Untargeted, and
        where the caller has a class to reach, one search whose class is not looked at."""
        if not self.targeted or reaches(label):
            return [label]
        ranked = logits.scatter(1, label.view(-1, 1), math.inf).argsort(dim=1).flip(1)[:, 1:]
        return list(ranked.T[: self.targets])

    def _search(
        self, active: ActiveImages, given: _Given, start: Tensor, norm: Norm, enough: float
    ) -> tuple[Tensor, Tensor]:
        """The closest wrong images [m, c, h, w] on the way from ``start``, and their distances [m]."""
        given, done = active.take(given), 0
        found, reached = given.image[: len(active)].clone(), start.new_full((len(active),), math.inf)
        step = _Step(norm, self.targeted, self.alpha_max, self.eta, self.beta)
        state = _State(active.fill(start), given.image, active.fill(reached))
        while done < self.steps:
            until = min(done + steps_until_packing(done, 10), self.steps)
            state, done = active.repeat(step, state, given, until - done), until
            m, within = len(active), state.distance <= enough
            fooled = active.verified(within, state.closest, given.label)
            distance = state.distance[:m].masked_fill(~fooled & within[:m], math.inf)
            found[active.place], reached[active.place] = state.closest[:m], distance
            left = (~fooled).nonzero().flatten()
            if not len(left):
                break
            state = state._replace(distance=active.fill(distance))
            if len(left) < m:
                active, state, given = active.keep(left, state, given)
        return found, reached


class _State(NamedTuple):
    """Where the search of m samples stands."""

    x_adv: Tensor
    """Where the network is linearised next, [m, c, h, w]."""
    closest: Tensor
    """The closest wrong image, [m, c, h, w]."""
    distance: Tensor
    """Of ``closest``, [m]; infinity where there is none."""


class _Given(NamedTuple):
    """What the search of m samples reads."""

    image: Tensor
    """Clean, [m, c, h, w]."""
    label: Tensor
    """[m] int64."""
    target: Tensor
    """The class to reach, [m] int64; not looked at by a search that is not targeted."""


@dataclass(frozen=True)
class _Step:
    """A linearisation, a step beyond it, and a look at where it led; see :class:`FAB` for the settings."""

    norm: Norm
    targeted: bool
    alpha_max: float
    eta: float
    beta: float

    def __call__(self, net: RowsModel, state: _State, given: _Given) -> _State:
        gap, slope = self._boundary(net, state.x_adv, given)
        # Logits may be wider than the images; x_adv is not. Nor need a slope be in their order.
        x_adv = self._move(given.image, state.x_adv, gap.to(slope), slope.contiguous())
        # The next linearisation could share this forward only where x_adv is right: one in fourteen
        # on robust networks, and keeping a graph for it cost more gradients than it saved forwards.
        wrong = fooled(net(x_adv), given.label)
        length = _length((x_adv - given.image).flatten(1), self.norm)
        closer = wrong & (length < state.distance)
        home = given.image + (x_adv - given.image) * self.beta
        return _State(
            torch.where(wrong.view(-1, 1, 1, 1), home, x_adv),
            torch.where(closer.view(-1, 1, 1, 1), x_adv, state.closest),
            torch.where(closer, length, state.distance),
        )

    def _boundary(self, net: RowsModel, x_adv: Tensor, given: _Given) -> tuple[Tensor, Tensor]:
        """The target's logit minus the true one [m], and its slope [m, c, h, w]; untargeted, of the class
        whose linearised boundary is closest; of a class to be reached, minus the best other one."""
        label = given.label
        if reaches(label):
            return value_and_gradient(net, partial(margin, target=label), x_adv)
        if self.targeted:
            return value_and_gradient(net, partial(_gap, label=label, target=given.target), x_adv)
        x_adv = x_adv.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = net(x_adv)
            gaps = logits - logits.gather(1, label.view(-1, 1))
            columns = gaps.unbind(dim=1)
        gaps = gaps.detach()
        k = logits.shape[1]
        net.add_gradients(k - 1)
        gap, slope = torch.zeros_like(gaps[:, 0]), torch.zeros_like(x_adv)
        nearest = torch.full_like(gap, math.inf)
        for other in range(k):
            with torch.enable_grad():
                grad = image_gradient(columns[other], x_adv, keep_graph=other < k - 1).nan_to_num(0, 0, 0)
            if self.norm == "linf":
                dual = grad.abs().sum(dim=(1, 2, 3))
            else:
                dual = _length(grad.flatten(1), "l2" if self.norm == "l2" else "linf")
            away = gaps[:, other].abs() / (1e-12 + dual)
            nearer = (away < nearest) & (label != other)
            gap = torch.where(nearer, gaps[:, other], gap)
            slope = torch.where(nearer.view(-1, 1, 1, 1), grad, slope)
            nearest = torch.where(nearer, away, nearest)
        return gap, slope

    def _move(self, image: Tensor, x_adv: Tensor, gap: Tensor, slope: Tensor) -> Tensor:
        """Over the linearised boundary, leaning towards the point of it next to ``image`` (algorithm 1)."""
        start = torch.stack([x_adv, image]).flatten(2)
        slope = slope.flatten(1)
        gaps = torch.stack([gap, gap + (slope * (start[1] - start[0])).sum(dim=1)])
        shift = to_hyperplane(start, slope.expand_as(start), gaps, self.norm)
        near, home = shift.view(2, *image.shape)
        length = _length(shift, self.norm).clamp_min(1e-8).view(2, -1, 1, 1, 1)
        lean = (length[0] / length.sum(dim=0)).clamp_max(self.alpha_max)
        beyond: Tensor = (x_adv + self.eta * near) * (1 - lean) + (image + self.eta * home) * lean
        return beyond.clamp(0, 1)


def _gap(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """The target's logit minus the true one, [m]."""
    pair = logits.gather(1, torch.stack([target, label], dim=1))
    return pair[:, 0] - pair[:, 1]


def _away(image: Tensor, noise: Tensor, radius: float, norm: Norm) -> Tensor:
    """Points ``radius`` from the images along random directions (from numbers uniform in [0, 1) or normal),
    cut to the box."""
    direction = 2 * noise - 1 if norm == "linf" else noise
    length = _length(direction.flatten(1), norm).view(-1, 1, 1, 1)
    return (image + radius * direction / length).clamp(0, 1)


def _length(delta: Tensor, norm: Norm) -> Tensor:
    """Length over the last axis."""
    if norm == "linf":
        return delta.abs().amax(dim=-1)
    if norm == "l1":
        return delta.abs().sum(dim=-1)
    length: Tensor = torch.linalg.vector_norm(delta, dim=-1)
    return length


def to_hyperplane(point: Tensor, slope: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """The shortest shift that brings a linear function to zero without leaving [0, 1].

    A shift of "height" t moves each pixel against the slope by t (l-inf) or t * |slope| (l2) until it meets
    the box, so both norms ask for the t at which a sum of capped lines reaches ``gap``: sort the caps, add
    up. In l1 the pixels of steepest slope go as far as the box lets them, one after the other. Where the box
    holds no zero, the corner next to it.

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
    if norm == "l1":
        return _steepest_first(point, slope, drop)
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


def _steepest_first(point: Tensor, slope: Tensor, drop: Tensor) -> Tensor:
    """The shortest shift in l1, [..., d], that lowers a linear function by ``drop`` [..., 1]."""
    room = torch.where(slope > 0, point, 1 - point)
    size, order = slope.abs().sort(dim=-1, descending=True)
    gain = size * room.gather(-1, order)
    missing = (drop - (gain.cumsum(dim=-1) - gain)).clamp_min(0)
    part = torch.where(size > 0, missing / size, 0)
    shift = torch.zeros_like(slope).scatter(-1, order, part)
    return -slope.sign() * torch.minimum(shift, room)
