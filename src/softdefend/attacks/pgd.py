"""Projected gradient descent (Madry et al., arXiv 1706.06083): steps of steepest ascent inside the ball."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from softdefend.attacks.base import Attack, Forward, Randomness, larger, pick, value_and_gradient
from softdefend.attacks.losses import AttackLoss, LossName, hard_label, named
from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget, ThreatModel
from softdefend.execution.counting import Journal, Oracle, View
from softdefend.execution.randomness import Draws

Start = Literal["auto", "uniform", "uniform-unclipped", "gaussian", "none"]

GAUSSIAN_START_STD = 0.001
"""Standard deviation of the ``gaussian`` start, in pixel units (TRADES' reference code)."""


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent in l-inf or l2.

    Args:
        steps: gradient steps, >= 0 (0 returns the start).
        step_size: length of a step in pixel units; a quarter of ``eps`` when None (2/255 at 8/255).
        restarts: independent starts, >= 1; each sample keeps one that the network gets wrong, and among
            equals that of the largest loss.
        start: ``uniform`` draws in the ball and cuts to [0, 1]; ``uniform-unclipped`` leaves the start
            outside [0, 1] until the first step (TE's and SGLS's per-epoch evaluation); ``gaussian`` adds
            noise of 0.001 (TRADES, MART); ``none`` starts at the image; ``auto`` is ``uniform``, and in
            training the objective's own.
        loss: ``ce``, ``margin`` or ``kl``.
        keep: ``last`` returns the final iterate (what the field calls PGD-k); ``best`` the iterate of
            largest loss, at the cost of one more forward.

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
    loss: LossName = "ce"
    """What to climb: ce, margin or kl."""
    keep: Literal["last", "best"] = "last"
    """Which iterate to return: last or best."""
    randomness: ClassVar[Randomness] = "image"

    def __post_init__(self) -> None:
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
            ("loss", self.loss, ("ce", "margin", "kl")),
            ("keep", self.keep, ("last", "best")),
        ):
            if value not in accepted:
                raise SettingError(f"attack.{field}", repr(value), " or ".join(accepted))

    @property
    def name(self) -> str:
        """``pgd-20``, ``pgd-20-margin``, ``pgd-50x10`` (restarts)."""
        suffix = "" if self.loss == "ce" else f"-{self.loss}"
        return f"pgd-{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "") + suffix

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
        """See :meth:`Attack.__call__`. Cost per restart: ``steps`` forwards and input gradients, one
        forward more where the best iterate is kept, and one where restarts are compared."""
        climb = loss or named(self.loss, forward, image, target)
        begin = partial(_begin, self.start, image, threat, generator)
        return self._ascend(forward, climb, image, hard_label(target), threat, begin)

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
        """See :meth:`Attack.search`. A start belongs to the image's position in the data, so a result depends
        neither on batches nor on what else is in them."""
        clean = oracle.clean(image) if self.loss == "kl" else label
        found = []
        for rows in oracle.parts(len(image), image.device):
            forward, given = oracle.at(rows), _Given(*oracle.fill(image[rows], label[rows], clean[rows]))
            begin = partial(_begin_alone, self.start, image[rows], threat, draws, rows)
            step = _Step(self.loss, threat, self._step_size(threat))
            result = self._ascend(
                forward,
                step.climbs(given),
                given.image,
                given.label,
                threat,
                partial(_filled, oracle, begin),
                partial(_advanced, forward, step, given, self.steps),
            )
            found.append(result[: len(rows)])
        return torch.cat(found)

    def _step_size(self, threat: ThreatModel) -> float:
        return float(threat.eps) / 4 if self.step_size is None else float(self.step_size)

    def _ascend(
        self,
        forward: Forward,
        climb: AttackLoss,
        image: Tensor,
        label: Tensor,
        threat: ThreatModel,
        begin: Callable[[int], Tensor],
        moved: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The search; ``begin`` gives the start of each restart, ``moved`` makes all its steps at once."""
        chosen = None
        for restart in range(self.restarts):
            found = self._restart(forward, climb, image, threat, begin(restart), moved)
            if self.restarts == 1:
                return found
            with torch.no_grad():
                logits = forward(found)
                reached = _Reached(found, logits.argmax(1) != label, climb(logits))
            chosen = reached if chosen is None else _worse(reached, chosen)
        assert chosen is not None
        return chosen.image

    def _restart(
        self,
        forward: Forward,
        climb: AttackLoss,
        image: Tensor,
        threat: ThreatModel,
        adversarial: Tensor,
        moved: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Where the search from one start ends."""
        if self.keep == "last":
            if moved is not None:
                return threat.project(image, moved(adversarial))
            for _ in range(self.steps):
                _, grad = value_and_gradient(forward, climb, adversarial)
                adversarial = threat.move(image, adversarial, grad, self._step_size(threat))
            return threat.project(image, adversarial)
        best = best_value = None
        for _ in range(self.steps):
            value, grad = value_and_gradient(forward, climb, adversarial)
            best, best_value = _better(adversarial, value, best, best_value)
            adversarial = threat.move(image, adversarial, grad, self._step_size(threat))
        adversarial = threat.project(image, adversarial)
        with torch.no_grad():
            value = climb(forward(adversarial))
        best, _ = _better(adversarial, value, best, best_value)
        return threat.project(image, best)


class _Reached(NamedTuple):
    """What a restart came to, for m samples."""

    image: Tensor
    """[m, c, h, w]."""
    wrong: Tensor
    """Whether the network gets it wrong, [m] bool."""
    value: Tensor
    """Its loss, [m]."""


class _State(NamedTuple):
    """Where a search of m samples stands: its iterate, [m, c, h, w]."""

    here: Tensor


class _Given(NamedTuple):
    """What a search of m samples reads."""

    image: Tensor
    """Clean, [m, c, h, w]."""
    label: Tensor
    """[m] int64."""
    clean: Tensor
    """Clean logits [m, k] where the loss measures from them; else anything [m, ...]."""


@dataclass(frozen=True)
class _Step:
    """A move of all samples."""

    loss: LossName
    threat: ThreatModel
    step_size: float

    def climbs(self, given: _Given) -> AttackLoss:
        """What these samples climb."""
        return named(self.loss, lambda image: given.clean, given.image, given.label)

    def __call__(self, forward: View, state: _State, given: _Given) -> _State:
        _, grad = value_and_gradient(forward, self.climbs(given), state.here)
        return _State(self.threat.move(given.image, state.here, grad.contiguous(), self.step_size))


def _filled(oracle: Oracle, begin: Callable[[int], Tensor], restart: int) -> Tensor:
    return oracle.fill(begin(restart))[0]


def _advanced(forward: View, step: _Step, given: _Given, steps: int, start: Tensor) -> Tensor:
    return forward.advance(step, _State(start), given, steps).here


@dataclass(frozen=True)
class FGSM(Attack):
    """One signed-gradient step of length ``eps`` from the image (Goodfellow et al., arXiv 1412.6572).

    In l2 the step is the normalized gradient. Deterministic: no random start.
    """

    loss: LossName = "ce"
    """What to climb: ce, margin or kl."""
    randomness: ClassVar[Randomness] = "none"

    @property
    def name(self) -> str:
        """``fgsm``, or ``fgsm-margin`` and the like."""
        return "fgsm" if self.loss == "ce" else f"fgsm-{self.loss}"

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
        """See :meth:`Attack.__call__`. Cost: one forward and one input gradient."""
        climb = loss or named(self.loss, forward, image, target)
        _, grad = value_and_gradient(forward, climb, image)
        return threat.move(image, image, grad, float(threat.eps))


def _begin(
    start: Start, image: Tensor, threat: ThreatModel, generator: torch.Generator | None, restart: int
) -> Tensor:
    """The start of a restart, from the next numbers of a generator."""
    if start == "none":
        return image
    if start == "gaussian":
        noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
        return image + GAUSSIAN_START_STD * noise
    point = threat.random_start(image, generator)
    return point if start == "uniform-unclipped" else point.clamp(0, 1)


def _begin_alone(
    start: Start, image: Tensor, threat: ThreatModel, draws: Draws, rows: Tensor, restart: int
) -> Tensor:
    """As :func:`_begin`, from numbers that belong to each image."""
    if start == "none":
        return image
    pixels = image[0].numel()
    if start == "gaussian":
        noise = draws.normal(rows, pixels, 2 * restart).view_as(image).to(image)
        return image + GAUSSIAN_START_STD * noise
    if threat.norm == "linf":
        noise = draws.uniform(rows, pixels, 2 * restart).view_as(image).to(image)
        point = image + (2 * noise - 1) * float(threat.eps)
    else:
        noise = draws.normal(rows, pixels, 2 * restart).view_as(image).to(image)
        # The volume inside radius r grows as r^d, so uniform in the ball means r = eps * u^(1/d).
        radius = draws.uniform(rows, 1, 2 * restart + 1).to(image).pow(1 / pixels) * float(threat.eps)
        point = image + threat.ascend(torch.zeros_like(image), noise, 1.0) * radius.view(-1, 1, 1, 1)
    return point if start == "uniform-unclipped" else point.clamp(0, 1)


def _better(
    candidate: Tensor, value: Tensor, best: Tensor | None, best_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Per sample, whichever of the two has the larger loss [b]; the earlier one on a tie."""
    if best is None or best_value is None:
        return candidate, value
    return larger(candidate, value, best, best_value)


def _worse(one: _Reached, other: _Reached) -> _Reached:
    """Per sample, what is worse for the network: to be wrong before a loss, of whatever size; ``other`` on a
    tie. A larger cross-entropy alone may well belong to a point that the network still gets right."""
    wins = (one.wrong & ~other.wrong) | ((one.wrong == other.wrong) & (one.value > other.value))
    return _Reached(
        pick(wins, one.image, other.image), one.wrong | other.wrong, torch.where(wins, one.value, other.value)
    )
