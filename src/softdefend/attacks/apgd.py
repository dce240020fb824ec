"""Auto-PGD (Croce & Hein, arXiv 2003.01690): projected gradient ascent that halves its step by itself.

From the same start, the iterates are those of the authors' implementation (github.com/fra31/auto-attack) up
to rounding, and so is the verdict on each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from softdefend.attacks.base import Attack, Forward, larger, pick
from softdefend.attacks.losses import (
    AttackLoss,
    check_classes,
    cross_entropy,
    dlr,
    hard_label,
    image_gradient,
    targeted_dlr,
)
from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.execution.counting import Journal, Oracle, View, block
from softdefend.execution.randomness import Draws

MOMENTUM = 0.75
"""Share of the new step in a move, the rest repeats the last move (alpha in the paper's Algorithm 1)."""


@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD on the cross-entropy or the difference-of-logits ratio, in l-inf or l2.

    A sample gets the first image that the network gets wrong, or the image of largest loss if there was
    none; one that is wrong from the outset is returned as it is. A ``loss`` given by the caller is an aim of
    its own: every sample gets its image of largest loss, right or wrong.

    Args:
        steps: iterations, >= 1.
        restarts: independent random starts, >= 1, each against the samples that are still right.
        loss: ``ce`` or ``dlr``; with two classes ``dlr`` is the margin.
        rho: a sample's step is halved where no more than this share of the steps since the last
            checkpoint raised its loss, in (0, 1].
        eot: forwards whose gradients are averaged at each step, >= 1, for networks that draw random numbers
            (expectation over transformation, Athalye et al., arXiv 1802.00420). As in the authors' code the
            last of them decides on loss and verdict.

    Raises:
        SettingError: a count, share or name outside these ranges.
    """

    steps: int = 100
    """Iterations, >= 1."""
    restarts: int = 1
    """Independent random starts, >= 1."""
    loss: Literal["ce", "dlr"] = "ce"
    """What to climb: ce or dlr."""
    rho: float = 0.75
    """The step is halved where no more than this share of steps raised the loss, in (0, 1]."""
    eot: int = 1
    """Forwards whose gradients are averaged at each step, >= 1."""

    def __post_init__(self) -> None:
        _check(self.rho, steps=self.steps, restarts=self.restarts, eot=self.eot)
        if self.loss not in ("ce", "dlr"):
            raise SettingError("attack.loss", repr(self.loss), "ce or dlr")

    @property
    def name(self) -> str:
        """``apgd-ce`` or ``apgd-dlr``; off the defaults ``apgd-ce-50``, ``apgd-ce-100x5`` (restarts),
        ``apgd-ce-eot20``."""
        eot = "" if self.eot == 1 else f"-eot{self.eot}"
        return f"apgd-{self.loss}" + _suffix(self.steps, self.restarts) + eot

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
        """See :meth:`Attack.__call__`; a CPU ``generator`` serves images on any device.

        Cost: one forward, then per restart and sample still right ``steps`` + 1 forwards and ``steps``
        input gradients, ``eot`` times as many of both (but for the last step) with ``eot``.
        """
        oracle, draws = Oracle(forward, len(image)), Draws.of(generator, len(image))
        if loss is not None:
            return self._searching(oracle, threat, draws, _given(loss)).climb(image, self.restarts)
        return self._fool(oracle, image, target, threat, draws, Journal())

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
        """See :meth:`Attack.search`. A start's noise is drawn for the images of a logical batch that are
        still right: the verdict depends on that batch, and on nothing else beside it."""
        return self._fool(oracle, image, label, threat, draws, journal or Journal())

    def _searching(self, oracle: Oracle, threat: ThreatModel, draws: Draws, loss: _Loss) -> _Search:
        return _Search(oracle, threat, self.steps, self.rho, self.eot, draws, loss)

    def _fool(
        self,
        oracle: Oracle,
        image: Tensor,
        target: Tensor,
        threat: ThreatModel,
        draws: Draws,
        journal: Journal,
    ) -> Tensor:
        search = self._searching(oracle, threat, draws, _cross_entropy if self.loss == "ce" else _dlr)
        return search.fool([target] * self.restarts, image, hard_label(target), journal)


@dataclass(frozen=True)
class TargetedAPGD(Attack):
    """Auto-PGD towards each of the likeliest wrong classes in turn, on the targeted difference-of-logits
    ratio, in l-inf or l2.

    The classes are ranked by the clean logits; each is tried on the samples that are still right. With k
    classes there are at most k - 1 of them, and below four classes the ratio is the bare difference of two
    logits. Which image a sample gets: as in :class:`APGD`. A ``loss`` given by the caller has no class to
    reach, so each class is one more random start.

    Args:
        steps: iterations per class, >= 1.
        restarts: independent random starts per class, >= 1.
        targets: classes to try, >= 1.
        rho: as in :class:`APGD`.

    Raises:
        SettingError: a count or share outside these ranges.
    """

    steps: int = 100
    """Iterations per class, >= 1."""
    restarts: int = 1
    """Independent random starts per class, >= 1."""
    targets: int = 9
    """Wrong classes to try, likeliest first, >= 1."""
    rho: float = 0.75
    """The step is halved where no more than this share of steps raised the loss, in (0, 1]."""

    def __post_init__(self) -> None:
        _check(self.rho, steps=self.steps, restarts=self.restarts, targets=self.targets)

    @property
    def name(self) -> str:
        """``apgd-t``; off the defaults ``apgd-t-50``, ``apgd-t-100x5`` (restarts)."""
        return "apgd-t" + _suffix(self.steps, self.restarts)

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
        """See :meth:`Attack.__call__`; a CPU ``generator`` serves images on any device.

        Cost: one forward, then per class, restart and sample still right ``steps`` + 1 forwards and
        ``steps`` input gradients.
        """
        oracle, draws = Oracle(forward, len(image)), Draws.of(generator, len(image))
        if loss is not None:
            starts = self.targets * self.restarts
            return self._searching(oracle, threat, draws, _given(loss)).climb(image, starts)
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
        """See :meth:`Attack.search`; what a verdict depends on is as in :class:`APGD`."""
        aims = [
            wrong
            for wrong in _likeliest_wrong(oracle.clean(image), label, self.targets)
            for _ in range(self.restarts)
        ]
        search = self._searching(oracle, threat, draws, targeted_dlr)
        return search.fool(aims, image, label, journal or Journal())

    def _searching(self, oracle: Oracle, threat: ThreatModel, draws: Draws, loss: _Loss) -> _Search:
        return _Search(oracle, threat, self.steps, self.rho, 1, draws, loss)


def checkpoints(steps: int) -> list[int]:
    """The steps after which the step size is reviewed: the first after 22% of ``steps``, each interval 3%
    shorter than the last, none below 6%.

    The shares of ``steps`` are cut to whole numbers >= 1 before they are added, as in the authors' code; the
    paper rounds their sums up (section 3.1). For 100 steps both give the same.

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    interval, shorter, shortest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found = [interval]
    while found[-1] < steps:
        interval = max(interval - shorter, shortest)
        found.append(found[-1] + interval)
    return [step for step in found if step <= steps]


_Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps logits [m, k], labels [m] and aims (what a search climbs away from or towards: labels, probabilities
or wrong classes, [m] or [m, k]) to what is climbed, [m]."""


def _cross_entropy(logits: Tensor, label: Tensor, aim: Tensor) -> Tensor:
    return cross_entropy(logits, aim)


def _dlr(logits: Tensor, label: Tensor, aim: Tensor) -> Tensor:
    return dlr(logits, aim)


def _given(loss: AttackLoss) -> _Loss:
    return lambda logits, label, aim: loss(logits)


class _State(NamedTuple):
    """Where a search of m samples stands."""

    here: Tensor
    """Iterate, [m, c, h, w]."""
    before: Tensor
    """The iterate before the last move, [m, c, h, w]."""
    grad: Tensor
    """Of the loss at ``here``, [m, c, h, w]."""
    value: Tensor
    """Loss after the last step, [m]."""
    best: Tensor
    """The iterate of largest loss, [m, c, h, w]."""
    best_grad: Tensor
    best_value: Tensor
    step_size: Tensor
    """[m, 1, 1, 1], in pixel units."""
    rises: Tensor
    """Steps since the last checkpoint that raised the loss, [m] int64."""
    halved: Tensor
    """The last checkpoint halved the step, [m] bool."""
    checked_value: Tensor
    """``best_value`` at the last checkpoint, [m]."""
    caught: Tensor
    """A wrong image where ``claimed``, [m, c, h, w]."""
    claimed: Tensor
    """The searching forward has been wrong since the last packing, [m] bool."""
    depth: Tensor
    """Loss that a wrong image must exceed to become ``caught``, [m]."""


class _Given(NamedTuple):
    """What a search of m samples reads."""

    image: Tensor
    """Clean, [m, c, h, w]."""
    label: Tensor
    """[m] int64."""
    aim: Tensor
    """See ``_Loss``."""


@dataclass(frozen=True)
class _Step:
    """A move of all samples and a look at where it led.

    Args:
        fooling: a wrong prediction is what is searched for; otherwise only the loss counts.
        deepest: of several wrong images keep the one of largest loss, which is the likeliest to stand where
            the search's own predictions are in doubt; otherwise the first.
        first: the step ``first`` has no move to repeat.
        last: the step ``last`` needs no gradient.
    """

    threat: ThreatModel
    loss: _Loss
    eot: int
    fooling: bool
    deepest: bool
    first: bool = False
    last: bool = False

    def __call__(self, forward: View, state: _State, given: _Given) -> _State:
        direction = state.grad.sign() if self.threat.norm == "linf" else _unit(state.grad)
        moved = self.threat.project(given.image, state.here + state.step_size * direction)
        if not self.first:
            momentum = (1 - MOMENTUM) * (state.here - state.before)
            moved = state.here + MOMENTUM * (moved - state.here) + momentum
            moved = self.threat.project(given.image, moved)
        logits, value, grad = self.look(forward, given, moved)
        better = value > state.best_value
        state = state._replace(
            here=moved,
            before=state.here,
            grad=grad,
            value=value,
            best=pick(better, moved, state.best),
            best_grad=pick(better, grad, state.best_grad),
            best_value=torch.where(better, value, state.best_value),
            rises=state.rises + (value > state.value),
        )
        return self.claim(state, given, logits, value)

    def claim(self, state: _State, given: _Given, logits: Tensor, value: Tensor) -> _State:
        """Keep a wrong image where the network is fooled at ``state.here``."""
        if not self.fooling:
            return state
        wrong = logits.argmax(dim=1) != given.label
        fresh = wrong & (~state.claimed | (value > state.depth))
        return state._replace(
            caught=pick(fresh, state.here, state.caught),
            claimed=state.claimed | wrong,
            depth=torch.where(fresh, value if self.deepest else math.inf, state.depth),
        )

    def look(self, forward: View, given: _Given, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [m, k], loss [m] and its gradient [m, c, h, w] (zero where it is NaN or infinite: such a
        pixel must not poison the image)."""
        if self.last:
            with torch.no_grad():
                logits = forward(image)
                return logits, self.loss(logits, given.label, given.aim), torch.zeros_like(image)
        logits, value, grad = self._slope(forward, given, image)
        for _ in range(self.eot - 1):
            logits, value, more = self._slope(forward, given, image)
            grad = grad + more
        grad = grad if self.eot == 1 else grad / self.eot
        return logits, value, grad.nan_to_num(0, 0, 0)

    def _slope(self, forward: View, given: _Given, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = image.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = forward(image)
            value = self.loss(logits, given.label, given.aim)
            # A network in channels_last order returns its gradient in that order.
            grad = image_gradient(value, image).contiguous()
        return logits.detach(), value.detach(), grad


@dataclass(frozen=True)
class _Search:
    """Auto-PGD from random starts, one after the other."""

    oracle: Oracle
    threat: ThreatModel
    steps: int
    rho: float
    eot: int
    draws: Draws
    loss: _Loss

    def fool(self, aims: Sequence[Tensor], image: Tensor, label: Tensor, journal: Journal) -> Tensor:
        """One search per aim ([n] or [n, k]), over the samples that are right so far."""
        saved = journal.load()
        if saved:
            best, value, begun = saved["best"], saved["value"], int(saved["aims"])
            self.draws.load_state(saved["draws"])
        else:
            best, value, begun = image, image.new_full((len(image),), -math.inf), 0
            wrong = self.oracle.clean(image).argmax(dim=1) != label
            value = value.masked_fill(wrong, math.inf)
        for number in range(begun, len(aims)):
            # Here the host reads the device: it packs the samples that are left.
            left = (value < math.inf).nonzero().squeeze(1)
            if len(left) == 0:
                break
            noise = self.draws.fresh(left, image[left], normal=self.threat.norm == "l2")
            for part in self.oracle.parts(len(left), image.device):
                rows = left[part]
                given = _Given(image[rows], label[rows], aims[number][rows])
                found, reached = self.fooled(rows, given, noise[part])
                kept, reached = larger(found, reached, best[rows], value[rows])
                best, value = best.index_copy(0, rows, kept), value.index_copy(0, rows, reached)
            journal.save(partial(self._note, best, value, number + 1))
        return best

    def _note(self, best: Tensor, value: Tensor, aims: int) -> dict[str, Tensor]:
        return {"best": best, "value": value, "aims": torch.tensor(aims), "draws": self.draws.state()}

    def climb(self, image: Tensor, starts: int) -> Tensor:
        """Each sample's image of largest loss, right or wrong."""
        best, value = image, image.new_full((len(image),), -math.inf)
        rows = torch.arange(len(image), device=image.device)
        step = _Step(self.threat, self.loss, self.eot, fooling=False, deepest=False)
        forward, given = self.oracle.at(), _Given(image, rows, rows)  # the loss knows its labels itself
        for _ in range(starts):
            noise = self.draws.fresh(rows, image, normal=self.threat.norm == "l2")
            state = _begin(step, forward, given, noise)
            state = self.advance(step, forward, state, given, 0, self.steps)
            best, value = larger(state.best, state.best_value, best, value)
        return best

    def fooled(self, rows: Tensor, given: _Given, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Adversarial images [m, c, h, w] and the loss they reached [m], inf where the network is fooled."""
        image = given.image
        found, reached = image.clone(), image.new_full((len(image),), -math.inf)
        place = torch.arange(len(image), device=image.device)
        step = _Step(self.threat, self.loss, self.eot, fooling=True, deepest=self.oracle.doubted)
        forward = self.oracle.at(rows)
        given, noise = _Given(*self.oracle.fill(*given)), self.oracle.fill(noise)[0]
        state, done = _begin(step, forward, given, noise), 0
        while True:
            # Filled up with copies are all fields of ``state`` and ``given``, but not ``rows`` and ``place``.
            m, claimed, shown = len(rows), state.claimed, state.caught
            if done == self.steps and self.oracle.doubted:
                # Rounding hides successes too: at the end every best image is looked at.
                claimed, shown = torch.ones_like(claimed), pick(claimed, shown, state.best)
            right = self.oracle.confirmed(claimed, shown, given.label, rows).logical_not()
            found[place] = pick(right, state.best[:m], shown[:m])
            reached[place] = state.best_value[:m].masked_fill(~right, math.inf).to(reached)
            left = right.nonzero().squeeze(1)
            if done == self.steps or len(left) == 0:
                return found, reached
            # What was claimed and is not so goes on being attacked from where it is.
            state = state._replace(
                claimed=torch.zeros_like(state.claimed), depth=torch.full_like(state.depth, -math.inf)
            )
            if len(left) < m:
                rows, place, forward = rows[left], place[left], self.oracle.at(rows[left])
                state = _State(*self.oracle.fill(*(field[left] for field in state)))
                given = _Given(*self.oracle.fill(*(field[left] for field in given)))
            until = min(done + block(done, 10), self.steps)
            state, done = self.advance(step, forward, state, given, done, until), until

    def advance(
        self, step: _Step, forward: View, state: _State, given: _Given, done: int, until: int
    ) -> _State:
        """Steps ``done`` + 1 to ``until``, each checkpoint's review included."""
        reviews = [0, *(at for at in checkpoints(self.steps) if at < self.steps)]
        while done < until:
            if done == 0 or done + 1 == self.steps:
                ends = replace(step, first=done == 0, last=done + 1 == self.steps)
                state, done = ends(forward, state, given), done + 1
            else:
                stop = min([until, self.steps - 1, *(at for at in reviews if at > done)])
                state, done = forward.advance(step, state, given, stop - done), stop
            if done in reviews:
                since = done - reviews[reviews.index(done) - 1]
                state = _review(state, self.rho * since)
        return state


def _begin(step: _Step, forward: View, given: _Given, noise: Tensor) -> _State:
    """At ``noise`` (uniform in [0, 1) or normal) stretched to the ball's surface: l-inf by its largest
    pixel, l2 by its length."""
    if step.threat.norm == "linf":
        noise = 2 * noise - 1
        noise = noise / (noise.abs().amax(dim=(1, 2, 3), keepdim=True) + 1e-12)
    else:
        noise = _unit(noise)
    eps = float(step.threat.eps)
    here = (given.image + eps * noise).clamp(0, 1)
    logits, value, grad = step.look(forward, given, here)
    nowhere = torch.full_like(value, -math.inf)
    state = _State(
        here=here,
        before=here,
        grad=grad,
        # The authors' code compares the first step's loss with zero, not with the start's. Kept: the
        # count decides over halving at the first checkpoint.
        value=torch.zeros_like(value),
        best=here,
        best_grad=grad,
        best_value=value,
        step_size=here.new_full((len(here), 1, 1, 1), 2 * eps),
        rises=torch.zeros_like(value, dtype=torch.int64),
        halved=torch.ones_like(value, dtype=torch.bool),
        checked_value=value,
        caught=here,
        claimed=torch.zeros_like(value, dtype=torch.bool),
        depth=nowhere,
    )
    return step.claim(state, given, logits, value)


def _review(state: _State, enough: float) -> _State:
    """Halves the step, and returns to the best iterate, where no more than ``enough`` steps raised the loss
    or where the step was kept at the last checkpoint and the best loss has not grown since (the paper's
    conditions 1 and 2)."""
    stalled = ~state.halved & (state.checked_value >= state.best_value)
    halve = (state.rises <= enough) | stalled
    return state._replace(
        here=pick(halve, state.best, state.here),
        grad=pick(halve, state.best_grad, state.grad),
        step_size=pick(halve, state.step_size / 2, state.step_size),
        rises=torch.zeros_like(state.rises),
        halved=halve,
        checked_value=state.best_value,
    )


def _likeliest_wrong(clean: Tensor, label: Tensor, most: int) -> Sequence[Tensor]:
    """Wrong classes by falling clean logit: at most ``most`` tensors [b] int64."""
    check_classes(clean)
    k = clean.shape[1]
    # The true class first, whatever its logit, so that a tie with it cannot make it a target.
    ranked = clean.scatter(1, label[:, None], math.inf).topk(min(most + 1, k), dim=1).indices
    return ranked.unbind(dim=1)[1:]


def _unit(vector: Tensor) -> Tensor:
    """Each sample at Euclidean length one; shorter where the length is itself near 1e-12, as in the authors'
    code: vanishing gradients move an image less than the rest, and verdicts depend on it."""
    length: Tensor = torch.linalg.vector_norm(vector, dim=(1, 2, 3), keepdim=True)
    return vector / (length + 1e-12)


def _check(rho: float, **counts: int) -> None:
    for setting, count in counts.items():
        if count < 1:
            raise SettingError(f"attack.{setting}", count, "a whole number >= 1")
    if not 0 < rho <= 1:
        raise SettingError("attack.rho", rho, "a share in (0, 1]")


def _suffix(steps: int, restarts: int) -> str:
    if restarts > 1:
        return f"-{steps}x{restarts}"
    return "" if steps == 100 else f"-{steps}"
