"""Auto-PGD (Croce & Hein, arXiv 2003.01690): projected gradient ascent that halves its step by itself.

What is different in l1 is in :mod:`softdefend.attacks.apgd_l1`.

From the same start, the iterates are those of the authors' implementation (github.com/fra31/auto-attack) up
to rounding, and so is the verdict on each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from softdefend.attacks import apgd_l1
from softdefend.attacks.base import Attack, larger, pick
from softdefend.attacks.losses import (
    AttackLoss,
    check_classes,
    cross_entropy,
    dlr,
    hard_label,
    image_gradient,
    targeted_dlr,
)
from softdefend.attacks.names import ATTACKS, COUNTS, count_suffix
from softdefend.core.errors import SettingError
from softdefend.core.goals import classes_of, fooled, reaches
from softdefend.core.threat import Norm, ThreatModel
from softdefend.execution.context import ActiveImages, AttackContext, steps_until_packing
from softdefend.execution.counting import CountingModel, Forward

MOMENTUM = 0.75
"""Share of the new step in a move, the rest repeats the last move (alpha in the paper's Algorithm 1)."""


@ATTACKS.register("apgd-ce")
@ATTACKS.register("apgd-dlr")
@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD on the cross-entropy or the difference-of-logits ratio, in l-inf, l2 or l1.

    A sample gets the first image that the network gets wrong, or the image of largest loss if there was
    none; one that is wrong from the outset is returned as it is. A ``loss`` given by the caller is a goal
    of its own: every sample gets its image of largest loss, right or wrong.

    Args:
        steps: iterations, >= 1.
        restarts: independent random starts, >= 1, each against the samples that are still right.
        loss: ``ce`` or ``dlr``; with two classes ``dlr`` is the margin.
        rho: a sample's step is halved where no more than this share of the steps since the last
            checkpoint raised its loss, in (0, 1].
        eot: forwards whose gradients are averaged at each step, >= 1, for networks that draw random numbers
            (expectation over transformation, Athalye et al., arXiv 1802.00420). As in the authors' code the
            last of them decides on loss and verdict.
        multi_eps: in l1, spend 30% of the steps in a ball of 3 eps, and as many in one of 2 eps, before those
            in the ball itself.

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
    multi_eps: bool = True
    """In l1, begin in larger balls."""
    several_batches: ClassVar[bool] = True
    takes_target: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")
    pattern: ClassVar[str] = rf"apgd-(?P<loss>ce|dlr){COUNTS}(?:-eot(?P<eot>\d+))?"
    suffix: ClassVar[str | None] = "[-STEPS[xRESTARTS]][-eotFORWARDS]"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.rho, steps=self.steps, restarts=self.restarts, eot=self.eot)
        if self.loss not in ("ce", "dlr"):
            raise SettingError("attack.loss", repr(self.loss), "ce or dlr")

    @property
    def name(self) -> str:
        """``apgd-ce`` or ``apgd-dlr``; off the defaults ``apgd-ce-50``, ``apgd-ce-100x5`` (restarts),
        ``apgd-ce-eot20``."""
        eot = "" if self.eot == 1 else f"-eot{self.eot}"
        return f"apgd-{self.loss}" + count_suffix(self.steps, self.restarts, default=100) + eot

    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        """See :meth:`Attack.run`; a CPU generator serves images on any device. In an evaluation a start's
        noise is drawn for the images of a batch that are still right: the verdict depends on that batch, and
        on nothing else beside it.

        Cost: one forward, then per restart and sample still right ``steps`` + 1 forwards and ``steps``
        input gradients, ``eot`` times as many of both (but for the last step) with ``eot``. In l1 with
        ``multi_eps`` two forwards and gradients more.
        """
        search = _Search(net, context, threat, self.steps, self.rho, self.eot, self.multi_eps)
        if context.loss is not None:
            return search.climb(context.loss, image, self.restarts)
        loss = _cross_entropy if self.loss == "ce" else _towards if reaches(label) else _dlr
        return search.fool(loss, [label] * self.restarts, image, hard_label(label))


@ATTACKS.register("apgd-t")
@dataclass(frozen=True)
class TargetedAPGD(Attack):
    """Auto-PGD towards each of the likeliest wrong classes in turn, on the targeted difference-of-logits
    ratio, in l-inf, l2 or l1.

    The classes are ranked by the clean logits; each is tried on the samples that are still right. With k
    classes there are at most k - 1 of them, and below four classes the ratio is the bare difference of two
    logits. A target of the caller takes the place of all. Which image a sample gets: as in :class:`APGD`. A
    ``loss`` given by the caller has no class to reach, so each class is one more random start.

    Args:
        steps: iterations per class, >= 1.
        restarts: independent random starts per class, >= 1.
        targets: classes to try, >= 1.
        rho, multi_eps: as in :class:`APGD`.

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
    multi_eps: bool = True
    """In l1, begin in larger balls."""
    several_batches: ClassVar[bool] = True
    takes_target: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")
    pattern: ClassVar[str] = rf"apgd-t{COUNTS}"
    suffix: ClassVar[str | None] = "[-STEPS[xRESTARTS]]"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.rho, steps=self.steps, restarts=self.restarts, targets=self.targets)

    @property
    def name(self) -> str:
        """``apgd-t``; off the defaults ``apgd-t-50``, ``apgd-t-100x5`` (restarts)."""
        return "apgd-t" + count_suffix(self.steps, self.restarts, default=100)

    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        """See :meth:`Attack.run`; a CPU generator serves images on any device. What a verdict depends on is
        as in :class:`APGD`.

        Cost: one forward, then per class, restart and sample still right ``steps`` + 1 forwards and
        ``steps`` input gradients.
        """
        search = _Search(net, context, threat, self.steps, self.rho, 1, self.multi_eps)
        if context.loss is not None:
            return search.climb(context.loss, image, self.targets * self.restarts)
        label = hard_label(label)
        if reaches(label):
            return search.fool(_towards, [label] * self.restarts, image, label)
        classes = _likeliest_wrong(net.clean_logits(image), label, self.targets)
        targets = [target for target in classes for _ in range(self.restarts)]
        return search.fool(targeted_dlr, targets, image, label)


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
"""Maps logits [m, k], labels [m] and targets (what a search climbs away from or towards: labels,
probabilities or wrong classes, [m] or [m, k]) to what is climbed, [m]."""


def _cross_entropy(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target)


def _dlr(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    return dlr(logits, target)


def _towards(logits: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """The targeted ratio of a goal, against the best other class in the place of the true one."""
    reached = classes_of(target)
    other = logits.detach().scatter(1, reached[:, None], -math.inf).argmax(dim=1)
    return targeted_dlr(logits, other, reached)


def _callers(loss: AttackLoss) -> _Loss:
    return lambda logits, label, target: loss(logits)


class _State(NamedTuple):
    """Where a search of m samples stands."""

    x_adv: Tensor
    """Iterate, [m, c, h, w]."""
    previous: Tensor
    """The iterate before the last move, [m, c, h, w]."""
    grad: Tensor
    """Of the loss at ``x_adv``, [m, c, h, w]."""
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
    candidate: Tensor
    """A wrong image where ``claimed``, [m, c, h, w]."""
    claimed: Tensor
    """The searching network has been wrong since the last packing, [m] bool."""
    depth: Tensor
    """Loss that a wrong image must exceed to become the ``candidate``, [m]."""
    share: Tensor
    """In l1: of the values that a step changes, [m]."""
    changed: Tensor
    """In l1: values of ``best`` that differ from the clean image at the last checkpoint, [m]."""


class _Given(NamedTuple):
    """What a search of m samples reads."""

    image: Tensor
    """Clean, [m, c, h, w]."""
    label: Tensor
    """[m] int64."""
    target: Tensor
    """See ``_Loss``."""


@dataclass(frozen=True)
class _Step:
    """A move of all samples and a look at where it led.

    Args:
        fooling: a wrong prediction is what is searched for; otherwise only the loss counts.
        deepest: of several wrong images keep the one of largest loss, which is the likeliest to stand where
            successes are unverified; otherwise the first.
        first: the step ``first`` has no move to repeat.
        last: the step ``last`` needs no gradient.
        factor: of eps, the radius of the ball in which l1 is searched.
    """

    threat: ThreatModel
    loss: _Loss
    eot: int
    fooling: bool
    deepest: bool
    first: bool = False
    last: bool = False
    factor: int = 1

    @property
    def radius(self) -> float:
        """Of the ball, in pixel units."""
        return self.factor * float(self.threat.eps)

    def __call__(self, net: Forward, state: _State, given: _Given) -> _State:
        x_adv = self.move(state, given.image)
        logits, value, grad = self.evaluate(net, given, x_adv)
        better = value > state.best_value
        state = state._replace(
            x_adv=x_adv,
            previous=state.x_adv,
            grad=grad,
            value=value,
            best=pick(better, x_adv, state.best),
            best_grad=pick(better, grad, state.best_grad),
            best_value=torch.where(better, value, state.best_value),
            rises=state.rises + (value > state.value),
        )
        return self.claim(state, given, logits, value)

    def move(self, state: _State, image: Tensor) -> Tensor:
        """The next iterates, [m, c, h, w]."""
        if self.threat.norm == "l1":
            return apgd_l1.move(image, state.x_adv, state.grad, state.share, state.step_size, self.radius)
        direction = state.grad.sign() if self.threat.norm == "linf" else _unit(state.grad)
        x_adv = self.threat.project(image, state.x_adv + state.step_size * direction)
        if self.first:
            return x_adv
        momentum = (1 - MOMENTUM) * (state.x_adv - state.previous)
        x_adv = state.x_adv + MOMENTUM * (x_adv - state.x_adv) + momentum
        return self.threat.project(image, x_adv)

    def claim(self, state: _State, given: _Given, logits: Tensor, value: Tensor) -> _State:
        """Keep a wrong image where the network is fooled at ``state.x_adv``."""
        if not self.fooling:
            return state
        wrong = fooled(logits, given.label)
        fresh = wrong & (~state.claimed | (value > state.depth))
        return state._replace(
            candidate=pick(fresh, state.x_adv, state.candidate),
            claimed=state.claimed | wrong,
            depth=torch.where(fresh, value if self.deepest else math.inf, state.depth),
        )

    def evaluate(self, net: Forward, given: _Given, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [m, k], loss [m] and its gradient [m, c, h, w] (zero where it is NaN or infinite: such a
        pixel must not poison the image)."""
        if self.last:
            with torch.no_grad():
                logits = net(x_adv)
                return logits, self.loss(logits, given.label, given.target), torch.zeros_like(x_adv)
        logits, value, grad = self._gradient(net, given, x_adv)
        for _ in range(self.eot - 1):
            logits, value, more = self._gradient(net, given, x_adv)
            grad = grad + more
        grad = grad if self.eot == 1 else grad / self.eot
        return logits, value, grad.nan_to_num(0, 0, 0)

    def _gradient(self, net: Forward, given: _Given, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_adv = x_adv.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = net(x_adv)
            value = self.loss(logits, given.label, given.target)
            # A network in channels_last order returns its gradient in that order.
            grad = image_gradient(value, x_adv).contiguous()
        return logits.detach(), value.detach(), grad


@dataclass(frozen=True)
class _Search:
    """Auto-PGD from random starts, one after the other."""

    net: CountingModel
    context: AttackContext
    threat: ThreatModel
    steps: int
    rho: float
    eot: int
    multi_eps: bool

    def climb(self, loss: AttackLoss, image: Tensor, starts: int) -> Tensor:
        """Each sample's image of largest loss, right or wrong."""
        best, value = image, image.new_full((len(image),), -math.inf)
        rows = torch.arange(len(image), device=image.device)
        step = self._step(_callers(loss), fooling=False)
        active, given = self.context.active(), _Given(image, rows, rows)  # the loss knows its labels itself
        for _ in range(starts):
            search, state = self._begin(step, active, given, self._noise(image, rows))
            state = search._advance(step, active, state, given, 0, search.steps)
            best, value = larger(state.best, state.best_value, best, value)
        return self.threat.project(image, best) if self.threat.norm == "l1" else best

    def fool(self, loss: _Loss, targets: Sequence[Tensor], image: Tensor, label: Tensor) -> Tensor:
        """One search per target ([n] or [n, k]), over the samples that are right so far."""
        best = image.clone(memory_format=torch.contiguous_format)
        value = image.new_full((len(image),), -math.inf)
        value.masked_fill_(fooled(self.net.clean_logits(image), label), math.inf)
        step = self._step(loss, fooling=True)
        results = {"best": best, "value": value}
        for number, left in self.context.searches(len(targets), results, lambda: value < math.inf):
            given, noise = _Given(image, label, targets[number]), self._noise(image[left], left)
            for rows, part in zip(self.context.portions(left), self.context.portions(noise), strict=True):
                found, reached = self._search(step, self.context.active(rows), given, part)
                best[rows], value[rows] = larger(found, reached, best[rows], value[rows])
        return self.threat.project(image, best) if self.threat.norm == "l1" else best

    def _step(self, loss: _Loss, *, fooling: bool) -> _Step:
        deepest = fooling and self.net.unverified
        return _Step(self.threat, loss, self.eot, fooling=fooling, deepest=deepest)

    def _noise(self, image: Tensor, rows: Tensor) -> Tensor:
        normal = self.threat.norm != "linf"
        noise = self.context.random.batch_noise(image, rows, normal=normal)
        if self.threat.norm == "l1" and self.multi_eps:
            # The authors' code draws at every ball, and uses the first numbers alone.
            for _ in apgd_l1.stages(self.steps, multi_eps=True):
                self.context.random.batch_noise(image, rows, normal=normal)
        return noise

    def _begin(
        self, step: _Step, active: ActiveImages, given: _Given, noise: Tensor
    ) -> tuple[_Search, _State]:
        """The search in the ball itself, and where it begins: in l1 where searches in larger balls ended."""
        x_adv = _start(step, given.image, noise)
        if self.threat.norm != "l1":
            return self, _begin(step, active.net, given, x_adv)
        *wide, (_, steps) = apgd_l1.stages(self.steps, self.multi_eps)
        image, last = given.image, replace(self, steps=steps)
        if not wide:
            x_adv = apgd_l1.project(image, x_adv, step.radius)
            return last, _begin(step, active.net, given, x_adv, share=apgd_l1.FIRST_SHARE)
        # Before the first search twice, as in the authors' code.
        x_adv = apgd_l1.pull(image, x_adv, wide[0][0] * step.radius)
        for factor, steps in wide:
            larger_ball = replace(step, factor=factor, fooling=False, deepest=False)
            x_adv = apgd_l1.pull(image, x_adv, larger_ball.radius)
            state = _begin(larger_ball, active.net, given, x_adv)
            x_adv = replace(self, steps=steps)._advance(larger_ball, active, state, given, 0, steps).best
        return last, _begin(step, active.net, given, apgd_l1.pull(image, x_adv, step.radius))

    def _search(
        self, step: _Step, active: ActiveImages, given: _Given, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adversarial images [m, c, h, w] and the loss they reached [m], inf where the network is fooled."""
        given = active.take(given)
        found = given.image[: len(active)].clone()
        reached = found.new_full((len(found),), -math.inf)
        search, state = self._begin(step, active, given, active.fill(noise))
        done, steps = 0, search.steps
        while True:
            m, claimed, candidate = len(active), state.claimed, state.candidate
            if done == steps and self.net.unverified:
                # Rounding hides successes too: at the end every best image is looked at.
                claimed, candidate = torch.ones_like(claimed), pick(claimed, candidate, state.best)
            right = active.verified(claimed, candidate, given.label).logical_not()
            found[active.place] = pick(right, state.best[:m], candidate[:m])
            reached[active.place] = state.best_value[:m].masked_fill(~right, math.inf).to(reached)
            left = right.nonzero().squeeze(1)
            if done == steps or len(left) == 0:
                return found, reached
            # What was claimed and is not so goes on being attacked from where it is.
            state = state._replace(
                claimed=torch.zeros_like(state.claimed), depth=torch.full_like(state.depth, -math.inf)
            )
            if len(left) < m:
                active, state, given = active.keep(left, state, given)
            until = min(done + steps_until_packing(done, 10), steps)
            state, done = search._advance(step, active, state, given, done, until), until

    def _advance(
        self, step: _Step, active: ActiveImages, state: _State, given: _Given, done: int, until: int
    ) -> _State:
        """Steps ``done`` + 1 to ``until``, each checkpoint's review included."""
        plan = apgd_l1.reviews if self.threat.norm == "l1" else checkpoints
        reviews = [0, *(at for at in plan(self.steps) if at < self.steps)]
        while done < until:
            if done == 0 or done + 1 == self.steps:
                ends = replace(step, first=done == 0, last=done + 1 == self.steps)
                state, done = ends(active.net, state, given), done + 1
            else:
                stop = min([until, self.steps - 1, *(at for at in reviews if at > done)])
                state, done = active.repeat(step, state, given, stop - done), stop
            if done in reviews and self.threat.norm == "l1":
                state = _review_l1(state, given.image, step.radius)
            elif done in reviews:
                since = done - reviews[reviews.index(done) - 1]
                state = _review(state, self.rho * since)
        return state


def _start(step: _Step, image: Tensor, noise: Tensor) -> Tensor:
    """At ``noise`` (uniform in [0, 1) or normal) stretched to the ball's surface: l-inf by its largest
    pixel, l2 by its length; in l1 not stretched, and not yet in the ball."""
    if step.threat.norm == "l1":
        return image + noise
    if step.threat.norm == "linf":
        noise = 2 * noise - 1
        noise = noise / (noise.abs().amax(dim=(1, 2, 3), keepdim=True) + 1e-12)
    else:
        noise = _unit(noise)
    return image + step.radius * noise


def _begin(step: _Step, net: Forward, given: _Given, x_adv: Tensor, share: float | None = None) -> _State:
    """At ``x_adv``; in l1 the first steps change a ``share`` of the values, or what follows from it."""
    x_adv = x_adv.clamp(0, 1)
    logits, value, grad = step.evaluate(net, given, x_adv)
    changed, shares = torch.zeros_like(value, dtype=torch.int64), torch.zeros_like(value)
    if step.threat.norm == "l1":
        changed = apgd_l1.changed(given.image, x_adv)
        shares = apgd_l1.share_of(changed, x_adv)
        if share is not None:
            changed = torch.full_like(changed, x_adv[0].numel())
            shares = torch.full_like(shares, share)
    state = _State(
        x_adv=x_adv,
        previous=x_adv,
        grad=grad,
        # The authors' code compares the first step's loss with zero, not with the start's. Kept: the
        # count decides over halving at the first checkpoint.
        value=torch.zeros_like(value),
        best=x_adv,
        best_grad=grad,
        best_value=value,
        step_size=x_adv.new_full(
            (len(x_adv), 1, 1, 1), step.radius if step.threat.norm == "l1" else 2 * step.radius
        ),
        rises=torch.zeros_like(value, dtype=torch.int64),
        halved=torch.ones_like(value, dtype=torch.bool),
        checked_value=value,
        candidate=x_adv,
        claimed=torch.zeros_like(value, dtype=torch.bool),
        depth=torch.full_like(value, -math.inf),
        share=shares,
        changed=changed,
    )
    return step.claim(state, given, logits, value)


def _review(state: _State, enough: float) -> _State:
    """Halves the step, and returns to the best iterate, where no more than ``enough`` steps raised the loss
    or where the step was kept at the last checkpoint and the best loss has not grown since (the paper's
    conditions 1 and 2)."""
    stalled = ~state.halved & (state.checked_value >= state.best_value)
    halve = (state.rises <= enough) | stalled
    return state._replace(
        x_adv=pick(halve, state.best, state.x_adv),
        grad=pick(halve, state.best_grad, state.grad),
        step_size=pick(halve, state.step_size / 2, state.step_size),
        rises=torch.zeros_like(state.rises),
        halved=halve,
        checked_value=state.best_value,
    )


def _review_l1(state: _State, image: Tensor, radius: float) -> _State:
    """Makes steps as sparse as the best iterate; returns to it with long steps where it has become sparser,
    and shortens them elsewhere (algorithm 1 of arXiv 2103.01208)."""
    changed = apgd_l1.changed(image, state.best)
    sparser = changed / state.changed < apgd_l1.SPARSER
    return state._replace(
        x_adv=pick(sparser, state.best, state.x_adv),
        grad=pick(sparser, state.best_grad, state.grad),
        step_size=apgd_l1.next_step_size(state.step_size, sparser, radius),
        share=apgd_l1.share_of(changed, image),
        changed=changed,
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
