"""Projected gradient descent (Madry et al., arXiv 1706.06083): steps of steepest ascent inside the ball."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from softdefend.attacks.base import Attack, Randomness, larger, pick, value_and_gradient
from softdefend.attacks.losses import FROM_CLEAN, AttackLoss, OwnLoss, check_loss, hard_label, named
from softdefend.attacks.names import ATTACKS, COUNTS, EOT, LOSS
from softdefend.core.errors import SettingError
from softdefend.core.goals import fooled
from softdefend.core.threat import Budget, Norm, ThreatModel
from softdefend.execution.context import ActiveImages, AttackContext
from softdefend.execution.counting import CountingModel, Forward

Start = Literal["auto", "uniform", "uniform-unclipped", "gaussian", "none"]

GAUSSIAN_START_STD = 0.001
"""Standard deviation of the ``gaussian`` start, in pixel units (TRADES' reference code)."""


@ATTACKS.register("pgd")
@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent in l-inf, l2 or l1.

    Args:
        steps: gradient steps, >= 0 (0 returns the start).
        step_size: length of a step in pixel units; a quarter of ``eps`` when None (2/255 at 8/255).
        restarts: independent starts, >= 1; each sample keeps one that the network gets wrong, and among
            equals that of the largest loss. Of a caller's loss (as in training) it keeps the largest.
        start: ``uniform`` draws in the ball and cuts to [0, 1]; ``uniform-unclipped`` leaves the start
            outside [0, 1] until the first step (TE's and SGLS's per-epoch evaluation); ``gaussian`` adds
            noise of 0.001 (TRADES, MART); ``none`` starts at the image; ``auto`` is ``uniform``, and in
            training the objective's own.
        loss: ``ce``, ``margin``, ``kl``, ``match`` (logits like the clean ones with the true class and the
            likeliest wrong one exchanged), or the user's ``package.module:function`` of logits [b, k] and
            labels [b].
        keep: ``last`` returns the final iterate (what the field calls PGD-k); ``best`` the iterate of
            largest loss, at the cost of one more forward.
        eot: forwards whose losses and gradients are averaged, >= 1, for networks that draw random numbers
            (expectation over transformation, Athalye et al., arXiv 1802.00420).

        momentum: weight of the sum of the gradients before, each brought to l1 length one, in that which a
            step climbs, >= 0: MI-FGSM (Dong et al., arXiv 1710.06081) with steps of eps / ``steps`` from the
            image and 1.

    Raises:
        SettingError: a count, length or name outside these ranges.
    """

    steps: int = 10
    """Gradient steps, >= 0."""
    step_size: Budget | None = None
    """Length of a step in pixel units; a quarter of eps when null."""
    restarts: int = 1
    """Independent random starts, >= 1."""
    start: Start = "auto"
    """Where a search begins: auto, uniform, uniform-unclipped, gaussian or none."""
    loss: str = "ce"
    """What to climb: ce, margin, kl, match, or package.module:function of logits and labels."""
    keep: Literal["last", "best"] = "last"
    """Which iterate to return: last or best."""
    eot: int = 1
    """Forwards whose gradients are averaged at each step, >= 1."""
    momentum: float = 0.0
    """Weight of the gradients before (MI-FGSM), >= 0."""
    randomness: ClassVar[Randomness] = "image"
    takes_target: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")
    several_batches: ClassVar[bool] = True
    pattern: ClassVar[str] = rf"pgd(?=-\d){COUNTS}{LOSS}{EOT}"
    suffix: ClassVar[str | None] = "-STEPS[xRESTARTS][-margin|-kl|-match|-MODULE:FUNCTION][-eotFORWARDS]"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise SettingError("attack.steps", self.steps, "a whole number >= 0")
        if self.restarts < 1:
            raise SettingError("attack.restarts", self.restarts, "a whole number >= 1")
        if self.step_size is not None:
            object.__setattr__(self, "step_size", Budget(self.step_size))
            if self.step_size <= 0:
                raise SettingError("attack.step_size", self.step_size, "a positive length such as 2/255")
        for field, value, accepted in (
            ("start", self.start, ("auto", "uniform", "uniform-unclipped", "gaussian", "none")),
            ("keep", self.keep, ("last", "best")),
        ):
            if value not in accepted:
                raise SettingError(f"attack.{field}", repr(value), " or ".join(accepted))
        check_loss(self.loss)
        _check_eot(self.eot)
        if not 0 <= self.momentum < math.inf:
            raise SettingError("attack.momentum", self.momentum, "a weight >= 0")

    @property
    def name(self) -> str:
        """``pgd-20``, ``pgd-20-margin``, ``pgd-50x10`` (restarts), ``pgd-20-eot10``."""
        suffix = ("" if self.loss == "ce" else f"-{self.loss}") + eot_suffix(self.eot)
        return f"pgd-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "") + suffix

    def check_target(self) -> None:
        """See :meth:`Attack.check_target`: the losses ``ce`` and ``margin`` alone know targets."""
        super().check_target()
        if self.loss not in ("ce", "margin"):
            raise SettingError("attack.loss", repr(self.loss), "ce or margin for a target")

    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        """See :meth:`Attack.run`. In an evaluation a start belongs to the image's position in the data, so a
        result depends neither on batches nor on what else is in them.

        Cost per restart: ``steps`` forwards and input gradients (``eot`` times as many with ``eot``), one
        forward more where the best iterate is kept, and one where restarts are compared.
        """
        clean = net.clean_logits(image) if self.loss in FROM_CLEAN and context.loss is None else label
        search = partial(self._search, _Given(image, label, clean), threat, context)
        return context.in_portions(image, search)

    def _search(
        self, given: _Given, threat: ThreatModel, context: AttackContext, active: ActiveImages
    ) -> Tensor:
        """The image that each sample keeps of all restarts."""
        given = active.take(given)
        step = _Step(
            context.loss or (OwnLoss.find(self.loss) if ":" in self.loss else self.loss),
            threat,
            float(threat.eps) / 4 if self.step_size is None else float(self.step_size),
            contiguous=active.rows is not None,
            eot=self.eot,
        )
        loss, label, kept = step.loss_of(given), hard_label(given.label), None
        for restart in range(self.restarts):
            start = self._start(given.image[: len(active)], active.rows, threat, context, restart)
            x_adv = self._ascend(active, step, given, active.fill(start))
            if self.restarts == 1:
                return x_adv
            with torch.no_grad():
                logits = active.net(x_adv)
                wrong = fooled(logits, label)
                if context.loss is not None:  # which may have another goal than a wrong class
                    wrong = torch.zeros_like(wrong)
                reached = _Reached(x_adv, wrong, loss(logits))
            kept = reached if kept is None else _worse(reached, kept)
        assert kept is not None
        return kept.image

    def _start(
        self, image: Tensor, rows: Tensor | None, threat: ThreatModel, context: AttackContext, restart: int
    ) -> Tensor:
        """Where a restart begins."""
        if self.start == "none":
            return image
        if self.start == "gaussian":
            return image + GAUSSIAN_START_STD * context.random.normal_like(image, rows, restart)
        start = context.random.in_ball(threat, image, rows, restart)
        return start if self.start == "uniform-unclipped" else start.clamp(0, 1)

    def _ascend(self, active: ActiveImages, step: _Step, given: _Given, start: Tensor) -> Tensor:
        """Where the steps from one start lead."""
        threat, image = step.threat, given.image
        if self.keep == "last" and self.momentum:
            moving = _Moving(start, torch.zeros_like(start))
            moving = active.repeat(_MomentumStep(step, self.momentum), moving, given, self.steps)
            return threat.project(image, moving.x_adv)
        if self.keep == "last":
            return threat.project(image, active.repeat(step, _State(start), given, self.steps).x_adv)
        x_adv, loss, best, best_value = start, step.loss_of(given), None, None
        direction = torch.zeros_like(start)
        for _ in range(self.steps):
            value, grad = mean_gradient(active.net, loss, x_adv, self.eot)
            best, best_value = _better(x_adv, value, best, best_value)
            direction = _accumulated(direction, grad, self.momentum) if self.momentum else grad
            x_adv = threat.move(image, x_adv, direction, step.step_size)
        x_adv = threat.project(image, x_adv)
        with torch.no_grad():
            value = loss(active.net(x_adv))
        best, _ = _better(x_adv, value, best, best_value)
        return threat.project(image, best)


class _State(NamedTuple):
    """Where a search of m samples stands."""

    x_adv: Tensor
    """Iterate, [m, c, h, w]."""


class _Given(NamedTuple):
    """What a search of m samples reads."""

    image: Tensor
    """Clean, [m, c, h, w]."""
    label: Tensor
    """[m] int64, or probabilities [m, k]."""
    clean: Tensor
    """Clean logits [m, k] where the loss measures from them; else anything [m, ...]."""


@dataclass(frozen=True)
class _Step:
    """A move of all samples.

    Args:
        loss: what to climb, by its name or as a caller gives it.
        threat: the set to stay in.
        step_size: of the move, in pixel units.
        contiguous: bring gradients into contiguous memory, whatever order the network gives them in. Not so
            where one batch is attacked as it is: in training that would be a copy of every gradient.
        eot: forwards whose losses and gradients are averaged.
    """

    loss: str | OwnLoss | AttackLoss
    threat: ThreatModel
    step_size: float
    contiguous: bool
    eot: int

    def loss_of(self, given: _Given) -> AttackLoss:
        """What these samples climb."""
        return self.loss if callable(self.loss) else named(self.loss, given.label, given.clean)

    def __call__(self, net: Forward, state: _State, given: _Given) -> _State:
        _, grad = mean_gradient(net, self.loss_of(given), state.x_adv, self.eot)
        grad = grad.contiguous() if self.contiguous else grad
        return _State(self.threat.move(given.image, state.x_adv, grad, self.step_size))


class _Moving(NamedTuple):
    """Where a search with momentum stands."""

    x_adv: Tensor
    """Iterate, [m, c, h, w]."""
    direction: Tensor
    """Sum of the gradients so far, [m, c, h, w]."""


@dataclass(frozen=True)
class _MomentumStep:
    """A move along the sum of the gradients so far, each counting ``decay`` times less at every step."""

    step: _Step
    decay: float

    def __call__(self, net: Forward, state: _Moving, given: _Given) -> _Moving:
        _, grad = mean_gradient(net, self.step.loss_of(given), state.x_adv, self.step.eot)
        direction = _accumulated(state.direction, grad, self.decay)
        return _Moving(
            self.step.threat.move(given.image, state.x_adv, direction, self.step.step_size), direction
        )


def _accumulated(direction: Tensor, grad: Tensor, decay: float) -> Tensor:
    """The paper's equation 6."""
    return decay * direction + grad / grad.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)


class _Reached(NamedTuple):
    """What a restart came to, for m samples."""

    image: Tensor
    """[m, c, h, w]."""
    wrong: Tensor
    """Whether the network gets it wrong, [m] bool."""
    value: Tensor
    """Its loss, [m]."""


def _better(
    candidate: Tensor, value: Tensor, best: Tensor | None, best_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Per sample, whichever of the two has the larger loss [b]; the earlier one on a tie."""
    if best is None or best_value is None:
        return candidate, value
    return larger(candidate, value, best, best_value)


def mean_gradient(net: Forward, loss: AttackLoss, image: Tensor, eot: int) -> tuple[Tensor, Tensor]:
    """:func:`value_and_gradient`, both means of ``eot`` forwards."""
    value, grad = value_and_gradient(net, loss, image)
    for _ in range(eot - 1):
        more = value_and_gradient(net, loss, image)
        value, grad = value + more[0], grad + more[1]
    return (value, grad) if eot == 1 else (value / eot, grad / eot)


def eot_suffix(eot: int) -> str:
    """What :data:`~softdefend.attacks.names.EOT` reads."""
    return "" if eot == 1 else f"-eot{eot}"


def _check_eot(eot: int) -> None:
    if eot < 1:
        raise SettingError("attack.eot", eot, "a whole number >= 1")


def _worse(one: _Reached, other: _Reached) -> _Reached:
    """Per sample, what is worse for the network: to be wrong before a loss, of whatever size; ``other`` on a
    tie. A larger cross-entropy alone may well belong to a point that the network still gets right."""
    wins = (one.wrong & ~other.wrong) | ((one.wrong == other.wrong) & (one.value > other.value))
    return _Reached(
        pick(wins, one.image, other.image), one.wrong | other.wrong, torch.where(wins, one.value, other.value)
    )


@ATTACKS.register("fgsm")
@dataclass(frozen=True)
class FGSM(Attack):
    """One signed-gradient step of length ``eps`` from the image (Goodfellow et al., arXiv 1412.6572).

    In l2 the step is the normalized gradient, in l1 as ``ThreatModel.ascend`` has it.
    Deterministic: no random start.
    """

    loss: str = "ce"
    """What to climb: ce, margin, kl, match, or package.module:function of logits and labels."""
    eot: int = 1
    """Forwards whose gradients are averaged, >= 1."""
    randomness: ClassVar[Randomness] = "none"
    takes_target: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")
    pattern: ClassVar[str] = f"fgsm{LOSS}{EOT}"
    suffix: ClassVar[str | None] = "[-margin|-kl|-match|-MODULE:FUNCTION][-eotFORWARDS]"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        _check_eot(self.eot)

    @property
    def name(self) -> str:
        """``fgsm``, or ``fgsm-margin``, ``fgsm-eot20`` and the like."""
        return "fgsm" + ("" if self.loss == "ce" else f"-{self.loss}") + eot_suffix(self.eot)

    def check_target(self) -> None:
        """See :meth:`Attack.check_target`: the losses ``ce`` and ``margin`` alone know targets."""
        super().check_target()
        if self.loss not in ("ce", "margin"):
            raise SettingError("attack.loss", repr(self.loss), "ce or margin for a target")

    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        """See :meth:`Attack.run`. Cost: ``eot`` forwards and input gradients."""
        loss = context.loss
        if loss is None:
            clean = net.clean_logits(image) if self.loss in FROM_CLEAN else None
            loss = named(OwnLoss.find(self.loss) if ":" in self.loss else self.loss, label, clean)
        _, grad = mean_gradient(net, loss, image, self.eot)
        return threat.move(image, image, grad, float(threat.eps))
