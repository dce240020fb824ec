"""Fast adaptive boundary attack (Croce & Hein, arXiv 1907.02044): the closest wrong image it finds.

Steps, targets, restarts and verdicts are those of AutoAttack's reference implementation (arXiv 2003.01690).
The first search of each target starts at the image: without restarts nothing is random, and no image feels
its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from softdefend.attacks.base import Attack, Forward, value_and_gradient
from softdefend.attacks.losses import AttackLoss, check_classes, hard_label, image_gradient
from softdefend.core.errors import SettingError
from softdefend.core.threat import Norm, ThreatModel
from softdefend.execution.counting import Journal, Oracle, View, block
from softdefend.execution.randomness import Draws


@dataclass(frozen=True)
class FAB(Attack):
    """FAB in l-inf or l2.

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

    def __post_init__(self) -> None:
        for name, valid, accepted in (
            ("steps", self.steps >= 0, "a whole number >= 0"),
            ("targets", self.targets >= 1, "a whole number >= 1"),
            ("restarts", self.restarts >= 1, "a whole number >= 1"),
            ("alpha_max", 0 <= self.alpha_max <= 1, "a weight in [0, 1]"),
            ("eta", 1 <= self.eta < math.inf, "a factor >= 1"),
            ("beta", 0 < self.beta < 1, "a share in (0, 1)"),
        ):
            if not valid:
                raise SettingError(f"attack.{name}", getattr(self, name), accepted)

    @property
    def name(self) -> str:
        """``fab-t``, untargeted ``fab``; off the defaults ``fab-t-50``, ``fab-100x5`` (restarts)."""
        name = "fab-t" if self.targeted else "fab"
        if self.restarts > 1:
            return f"{name}-{self.steps}x{self.restarts}"
        return name if self.steps == 100 else f"{name}-{self.steps}"

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
        """See :meth:`Attack.__call__`. Cost: one forward, and per search and step up to two forwards and one
        image gradient (untargeted: one for each class) of each image that no wrong point within ``eps`` has
        been found for.

        An image is returned unchanged where none is found. ``generator`` may live on the CPU wherever the
        images are, and is used by restarts alone.

        Raises:
            SettingError: a ``loss`` is given; this attack minimises the distance.
        """
        if loss is not None:
            raise SettingError("attack.loss", "a loss", f"none: {self.name} minimises the distance")
        oracle, draws = Oracle(forward, len(image)), Draws.of(generator, len(image))
        return self.search(oracle, image, hard_label(target), threat, draws=draws)

    def search(
        self,
        oracle: Oracle,
        image: Tensor,
        label: Tensor,
        threat: ThreatModel,
        *,
        draws: Draws,
        journal: Journal | None = None,
    ) -> Tensor:
        """See :meth:`Attack.search`. Without restarts a verdict depends on the image alone; a restart's noise
        is drawn for the images of a logical batch that are still right."""
        eps = float(threat.eps)
        hunt = _Hunt(self, oracle, draws, threat.norm, eps)
        closest, distance = hunt(image, label, journal or Journal())
        return torch.where((distance <= eps).view(-1, 1, 1, 1), closest, image)

    def minimal(
        self,
        forward: Forward,
        image: Tensor,
        target: Tensor,
        norm: Norm,
        *,
        enough: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The closest wrong image found, at any distance.

        Args:
            forward, image, target: see :meth:`Attack.__call__`.
            norm: of the distance.
            enough: a distance in pixel units at which the search for a sample stops. Restarts begin half of
                it away from the image.
            generator: of the restarts' random points.

        Returns:
            Images [b, c, h, w] and their distances [b]: the image itself at 0 where the network is wrong
            from the start, and at infinity where no wrong image was found.
        """
        oracle, draws = Oracle(forward, len(image)), Draws.of(generator, len(image))
        return _Hunt(self, oracle, draws, norm, enough)(image, hard_label(target), Journal())


@dataclass(frozen=True)
class _Hunt:
    """The searches of one attack on one batch; a wrong image within ``enough`` ends a sample's."""

    attack: FAB
    oracle: Oracle
    draws: Draws
    norm: Norm
    enough: float

    @torch.no_grad()
    def __call__(self, image: Tensor, label: Tensor, journal: Journal) -> tuple[Tensor, Tensor]:
        """Closest wrong images and distances; see :meth:`FAB.minimal`."""
        logits, attack = self.oracle.clean(image), self.attack
        check_classes(logits)
        rivals = [label]
        if attack.targeted:
            ranked = logits.scatter(1, label.view(-1, 1), math.inf).argsort(dim=1).flip(1)[:, 1:]
            rivals = list(ranked.T[: attack.targets])
        plan = [(rival, restart) for rival in rivals for restart in range(attack.restarts)]
        saved = journal.load()
        if saved:
            closest, distance, begun = saved["closest"], saved["distance"], int(saved["searches"])
            self.draws.load_state(saved["draws"])
        else:
            right = logits.argmax(dim=1) == label
            distance = image.new_zeros(len(image)).masked_fill(right, math.inf)
            closest, begun = image.clone(), 0
        for number in range(begun, len(plan)):
            rival, restart = plan[number]
            left = (distance > self.enough).nonzero().flatten()
            if not len(left):
                break
            start = image[left] if restart == 0 else self._away(image[left], left)
            for part in self.oracle.parts(len(left), image.device):
                rows = left[part]
                found, length = self._once(_Given(image[rows], label[rows], rival[rows]), start[part], rows)
                closer = length < distance[rows]
                closest[rows] = torch.where(closer.view(-1, 1, 1, 1), found, closest[rows])
                distance[rows] = torch.where(closer, length, distance[rows])
            journal.save(partial(self._note, closest, distance, number + 1))
        return closest, distance

    def _note(self, closest: Tensor, distance: Tensor, searches: int) -> dict[str, Tensor]:
        return {
            "closest": closest,
            "distance": distance,
            "searches": torch.tensor(searches),
            "draws": self.draws.state(),
        }

    def _away(self, image: Tensor, rows: Tensor) -> Tensor:
        """Random points half of ``enough`` from the images, cut to the box."""
        noise = self.draws.fresh(rows, image, normal=self.norm == "l2")
        noise = 2 * noise - 1 if self.norm == "linf" else noise
        length = _length(noise.flatten(1), self.norm).view(-1, 1, 1, 1)
        return (image + 0.5 * self.enough * noise / length).clamp(0, 1)

    def _once(self, given: _Given, point: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The closest wrong images on the way from ``point`` [m, c, h, w], and distances."""
        attack, image = self.attack, given.image
        found, reached = image.clone(), image.new_full((len(image),), math.inf)
        place, done = torch.arange(len(image), device=image.device), 0
        forward = self.oracle.at(rows, several=not attack.targeted)
        step = _Step(self.norm, attack.targeted, attack.alpha_max, attack.eta, attack.beta)
        state = _State(*self.oracle.fill(point, image, reached))
        given = _Given(*self.oracle.fill(*given))
        while done < attack.steps:
            until = min(done + block(done, 10), attack.steps)
            state, done = forward.advance(step, state, given, until - done), until
            # Filled up with copies are all fields of ``state`` and ``given``, but not ``rows`` and ``place``.
            m, within = len(rows), state.distance <= self.enough
            fooled = self.oracle.confirmed(within, state.closest, given.label, rows)
            distance = state.distance[:m].masked_fill(~fooled & within[:m], math.inf)
            found[place], reached[place] = state.closest[:m], distance
            left = (~fooled).nonzero().flatten()
            if not len(left):
                break
            state = state._replace(distance=self.oracle.fill(distance)[0])
            if len(left) < m:
                rows, place = rows[left], place[left]
                forward = self.oracle.at(rows, several=not attack.targeted)
                state = _State(*self.oracle.fill(*(field[left] for field in state)))
                given = _Given(*self.oracle.fill(*(field[left] for field in given)))
        return found, reached


class _State(NamedTuple):
    """Where the search of m samples stands."""

    point: Tensor
    """Of the next linearisation, [m, c, h, w]."""
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
    rival: Tensor
    """The class to reach, [m] int64; not looked at by a search that is not targeted."""


@dataclass(frozen=True)
class _Step:
    """A linearisation, a step beyond it, and a look at where it led; see :class:`FAB` for the settings."""

    norm: Norm
    targeted: bool
    alpha_max: float
    eta: float
    beta: float

    def __call__(self, forward: View, state: _State, given: _Given) -> _State:
        gap, slope = self._boundary(forward, state.point, given)
        # Logits may be wider than the images; the points are not. Nor need a slope be in their order.
        point = self._move(given.image, state.point, gap.to(slope), slope.contiguous())
        # The next linearisation could share this forward only where a point is right: one in fourteen
        # on robust networks, and keeping a graph for it cost more gradients than it saved forwards.
        wrong = forward(point).argmax(dim=1) != given.label
        length = _length((point - given.image).flatten(1), self.norm)
        closer = wrong & (length < state.distance)
        home = given.image + (point - given.image) * self.beta
        return _State(
            torch.where(wrong.view(-1, 1, 1, 1), home, point),
            torch.where(closer.view(-1, 1, 1, 1), point, state.closest),
            torch.where(closer, length, state.distance),
        )

    def _boundary(self, forward: View, point: Tensor, given: _Given) -> tuple[Tensor, Tensor]:
        """The logit of the rival minus the true one [m], and its slope [m, c, h, w]; untargeted, of the class
        whose linearised boundary is closest."""
        label = given.label
        if self.targeted:
            return value_and_gradient(forward, partial(_gap, label=label, rival=given.rival), point)
        point = point.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = forward(point)
            gaps = logits - logits.gather(1, label.view(-1, 1))
            columns = gaps.unbind(dim=1)
        gaps = gaps.detach()
        k = logits.shape[1]
        forward.more_gradients(k - 1)
        gap, slope = torch.zeros_like(gaps[:, 0]), torch.zeros_like(point)
        nearest = torch.full_like(gap, math.inf)
        for other in range(k):
            with torch.enable_grad():
                grad = image_gradient(columns[other], point, keep_graph=other < k - 1).nan_to_num(0, 0, 0)
            dual = _length(grad.flatten(1), "l2") if self.norm == "l2" else grad.abs().sum(dim=(1, 2, 3))
            away = gaps[:, other].abs() / (1e-12 + dual)
            nearer = (away < nearest) & (label != other)
            gap = torch.where(nearer, gaps[:, other], gap)
            slope = torch.where(nearer.view(-1, 1, 1, 1), grad, slope)
            nearest = torch.where(nearer, away, nearest)
        return gap, slope

    def _move(self, image: Tensor, point: Tensor, gap: Tensor, slope: Tensor) -> Tensor:
        """Over the linearised boundary, leaning towards the point of it next to ``image`` (algorithm 1)."""
        start = torch.stack([point, image]).flatten(2)
        slope = slope.flatten(1)
        gaps = torch.stack([gap, gap + (slope * (start[1] - start[0])).sum(dim=1)])
        shift = to_hyperplane(start, slope.expand_as(start), gaps, self.norm)
        near, home = shift.view(2, *image.shape)
        length = _length(shift, self.norm).clamp_min(1e-8).view(2, -1, 1, 1, 1)
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


def to_hyperplane(point: Tensor, slope: Tensor, gap: Tensor, norm: Norm) -> Tensor:
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
