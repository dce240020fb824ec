"""Auto-PGD (Croce & Hein, arXiv 2003.01690): projected gradient ascent that halves its step by itself.

From the same start, the iterates are those of the authors' implementation (github.com/fra31/auto-attack) up
to rounding, and so is the verdict on each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from softdefend.attacks.base import Attack, Forward
from softdefend.attacks.draws import Draws
from softdefend.attacks.losses import (
    AttackLoss,
    check_classes,
    cross_entropy,
    dlr,
    hard_label,
    image_gradient,
    targeted_dlr,
)
from softdefend.attacks.oracle import Journal, Oracle, View, block
from softdefend.errors import SettingError
from softdefend.threat import ThreatModel

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
            return self._searching(oracle, threat, draws).climb(loss, image, self.restarts)
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

    def _searching(self, oracle: Oracle, threat: ThreatModel, draws: Draws) -> _Search:
        return _Search(oracle, threat, self.steps, self.rho, self.eot, draws)

    def _fool(
        self,
        oracle: Oracle,
        image: Tensor,
        target: Tensor,
        threat: ThreatModel,
        draws: Draws,
        journal: Journal,
    ) -> Tensor:
        own = cross_entropy if self.loss == "ce" else dlr
        aims: list[_Aim] = [lambda rows: partial(own, target=target[rows])] * self.restarts
        return self._searching(oracle, threat, draws).fool(aims, image, hard_label(target), journal)


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
            return self._searching(oracle, threat, draws).climb(loss, image, self.targets * self.restarts)
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
            partial(_towards, wrong, label)
            for wrong in _likeliest_wrong(oracle.clean(image), label, self.targets)
            for _ in range(self.restarts)
        ]
        return self._searching(oracle, threat, draws).fool(aims, image, label, journal or Journal())

    def _searching(self, oracle: Oracle, threat: ThreatModel, draws: Draws) -> _Search:
        return _Search(oracle, threat, self.steps, self.rho, 1, draws)


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


_Aim = Callable[[Tensor], AttackLoss]
"""Maps rows of the batch, [m] int64, to what to climb for them."""


class _State(NamedTuple):
    """Where a search of m samples stands; no shape changes between packings, so a step can be captured."""

    image: Tensor
    """Clean, [m, c, h, w]."""
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


@dataclass(frozen=True)
class _Search:
    """Auto-PGD from random starts, one after the other."""

    oracle: Oracle
    threat: ThreatModel
    steps: int
    rho: float
    eot: int
    draws: Draws

    def fool(self, aims: Sequence[_Aim], image: Tensor, label: Tensor, journal: Journal) -> Tensor:
        """One search per aim, over the samples that are right so far."""
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
                found, reached = self.once(aims[number], rows, image[rows], label[rows], noise[part])
                kept, reached = _better(found, reached, best[rows], value[rows])
                best, value = best.index_copy(0, rows, kept), value.index_copy(0, rows, reached)
            journal.save(partial(self._note, best, value, number + 1))
        return best

    def _note(self, best: Tensor, value: Tensor, aims: int) -> dict[str, Tensor]:
        return {"best": best, "value": value, "aims": torch.tensor(aims), "draws": self.draws.state()}

    def climb(self, loss: AttackLoss, image: Tensor, starts: int) -> Tensor:
        """Each sample's image of largest loss."""
        best, value = image, image.new_full((len(image),), -math.inf)
        rows = torch.arange(len(image), device=image.device)
        for _ in range(starts):
            noise = self.draws.fresh(rows, image, normal=self.threat.norm == "l2")
            best, value = _better(*self.once(lambda _: loss, rows, image, None, noise), best, value)
        return best

    def once(
        self, aim: _Aim, rows: Tensor, image: Tensor, label: Tensor | None, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adversarial images [m, c, h, w] and the loss they reached [m], inf where the network is fooled;
        without labels nothing fools it."""
        found, reached = image.clone(), image.new_full((len(image),), -math.inf)
        place = torch.arange(len(image), device=image.device)
        forward, loss = self.oracle.at(rows), aim(rows)
        state = self._begin(forward, loss, image, label, noise)
        reviewed, reviews, packed = 0, checkpoints(self.steps), 0
        for step in range(self.steps + 1):
            if step > 0:
                state = self._step(state, forward, loss, label, first=step == 1, last=step == self.steps)
                if step in reviews and step < self.steps:
                    state, reviewed = _review(state, self.rho * (step - reviewed)), step
            if label is None or (step < self.steps and step < packed):
                continue
            packed = step + block(step, 10)
            fooled = self.oracle.confirmed(state.claimed, state.caught, label, rows)
            found[place] = _pick(fooled, state.caught, state.best)
            reached[place] = state.best_value.masked_fill(fooled, math.inf).to(reached)
            left = (~fooled).nonzero().squeeze(1)
            if len(left) == 0:
                break
            # What was claimed and is not so goes on being attacked from where it is.
            state = state._replace(
                claimed=torch.zeros_like(fooled), depth=torch.full_like(state.depth, -math.inf)
            )
            if len(left) < len(rows):
                state = _State(*(field[left] for field in state))
                rows, label, place = rows[left], label[left], place[left]
                forward, loss = self.oracle.at(rows), aim(rows)
        return (found, reached) if label is not None else (state.best, state.best_value)

    def _begin(
        self, forward: View, loss: AttackLoss, image: Tensor, label: Tensor | None, noise: Tensor
    ) -> _State:
        """At ``noise`` (uniform in [0, 1) or normal) stretched to the ball's surface: l-inf by its largest
        pixel, l2 by its length."""
        if self.threat.norm == "linf":
            noise = 2 * noise - 1
            noise = noise / (noise.abs().amax(dim=(1, 2, 3), keepdim=True) + 1e-12)
        else:
            noise = _unit(noise)
        here = (image + float(self.threat.eps) * noise).clamp(0, 1)
        logits, value, grad = self._look(forward, loss, here)
        nowhere = torch.full_like(value, -math.inf)
        state = _State(
            image=image,
            here=here,
            before=here,
            grad=grad,
            # The authors' code compares the first step's loss with zero, not with the start's. Kept: the
            # count decides over halving at the first checkpoint.
            value=torch.zeros_like(value),
            best=here,
            best_grad=grad,
            best_value=value,
            step_size=image.new_full((len(image), 1, 1, 1), 2 * float(self.threat.eps)),
            rises=torch.zeros_like(value, dtype=torch.int64),
            halved=torch.ones_like(value, dtype=torch.bool),
            checked_value=value,
            caught=here,
            claimed=torch.zeros_like(value, dtype=torch.bool),
            depth=nowhere,
        )
        return self._claim(state, logits, value, label)

    def _step(
        self,
        state: _State,
        forward: View,
        loss: AttackLoss,
        label: Tensor | None,
        *,
        first: bool,
        last: bool,
    ) -> _State:
        """One move with momentum (none in the ``first``) and a look; the ``last`` needs no gradient."""
        image = state.image
        direction = state.grad.sign() if self.threat.norm == "linf" else _unit(state.grad)
        moved = self.threat.project(image, state.here + state.step_size * direction)
        if not first:
            momentum = (1 - MOMENTUM) * (state.here - state.before)
            moved = state.here + MOMENTUM * (moved - state.here) + momentum
            moved = self.threat.project(image, moved)
        logits, value, grad = self._look(forward, loss, moved, gradient=not last)
        better = value > state.best_value
        state = state._replace(
            here=moved,
            before=state.here,
            grad=grad,
            value=value,
            best=_pick(better, moved, state.best),
            best_grad=_pick(better, grad, state.best_grad),
            best_value=torch.where(better, value, state.best_value),
            rises=state.rises + (value > state.value),
        )
        return self._claim(state, logits, value, label)

    def _claim(self, state: _State, logits: Tensor, value: Tensor, label: Tensor | None) -> _State:
        """Keep the first wrong image; of wrong images in doubt the one of largest loss, which is the one most
        likely to stand."""
        if label is None:
            return state
        wrong = logits.argmax(dim=1) != label
        fresh = wrong & (~state.claimed | (value > state.depth))
        return state._replace(
            caught=_pick(fresh, state.here, state.caught),
            claimed=state.claimed | wrong,
            depth=torch.where(fresh, value if self.oracle.doubted else math.inf, state.depth),
        )

    def _look(
        self, forward: View, loss: AttackLoss, image: Tensor, gradient: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [m, k], loss [m] and its gradient [m, c, h, w] (zero where it is NaN or infinite: such a
        pixel must not poison the image)."""
        if not gradient:
            with torch.no_grad():
                logits = forward(image)
                return logits, loss(logits), torch.zeros_like(image)
        logits, value, grad = self._slope(forward, loss, image)
        for _ in range(self.eot - 1):
            logits, value, more = self._slope(forward, loss, image)
            grad = grad + more
        grad = grad if self.eot == 1 else grad / self.eot
        return logits, value, grad.nan_to_num(0, 0, 0)

    def _slope(self, forward: View, loss: AttackLoss, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = image.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = forward(image)
            value = loss(logits)
            grad = image_gradient(value, image)
        return logits.detach(), value.detach(), grad


def _review(state: _State, enough: float) -> _State:
    """Halves the step, and returns to the best iterate, where no more than ``enough`` steps raised the loss
    or where the step was kept at the last checkpoint and the best loss has not grown since (the paper's
    conditions 1 and 2)."""
    stalled = ~state.halved & (state.checked_value >= state.best_value)
    halve = (state.rises <= enough) | stalled
    return state._replace(
        here=_pick(halve, state.best, state.here),
        grad=_pick(halve, state.best_grad, state.grad),
        step_size=_pick(halve, state.step_size / 2, state.step_size),
        rises=torch.zeros_like(state.rises),
        halved=halve,
        checked_value=state.best_value,
    )


def _towards(wrong: Tensor, label: Tensor, rows: Tensor) -> AttackLoss:
    return partial(targeted_dlr, label=label[rows], aim=wrong[rows])


def _likeliest_wrong(clean: Tensor, label: Tensor, most: int) -> Sequence[Tensor]:
    """Wrong classes by falling clean logit: at most ``most`` tensors [b] int64."""
    check_classes(clean)
    k = clean.shape[1]
    # The true class first, whatever its logit, so that a tie with it cannot make it a target.
    ranked = clean.scatter(1, label[:, None], math.inf).topk(min(most + 1, k), dim=1).indices
    return ranked.unbind(dim=1)[1:]


def _pick(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Per sample, by a mask [b], of images [b, c, h, w]."""
    return torch.where(mask.view(-1, 1, 1, 1), yes, no)


def _better(found: Tensor, reached: Tensor, best: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Per sample, whichever image has the larger loss [b]; the earlier one on a tie."""
    wins = reached > value
    return _pick(wins, found, best), torch.where(wins, reached.to(value), value)


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
