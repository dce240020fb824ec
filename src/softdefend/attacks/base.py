"""What every attack is: a function from images to images that never leaves the threat model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, final

import torch
from torch import Tensor

from softdefend.attacks.losses import AttackLoss, checked_loss, image_gradient
from softdefend.core.errors import SettingError
from softdefend.core.goals import reaches, to_reach
from softdefend.core.hints import check_fields, check_type
from softdefend.core.threat import Norm, ThreatModel
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel, Mask
from softdefend.execution.counting import Forward as Forward
from softdefend.execution.randomness import CallerRandomness

Randomness = Literal["none", "image", "batch"]

_MADE_FOR: dict[Norm, str] = {
    "l1": "pgd-20, apgd-ce, fab-t, square, fmn and autoattack",
    "l0": "sigma-zero",
    "l2": "cw-l2 and pgd-30-margin",
    "linf": "cw-linf",
}
"""What a message names where another norm was asked for."""

MOST = 1_000_000
"""Steps, restarts, queries and the like: more are a typing mistake that would run for years."""


@dataclass(frozen=True)
class Attack(ABC):
    """Settings of an attack; calling it makes adversarial images.

    A subclass writes :meth:`run` and :attr:`name`, and says in :attr:`randomness` what its results depend on.
    One that is to be asked for by its name is registered, see :mod:`softdefend.attacks.names`.

    The network's mode and its parameters' ``requires_grad`` are the caller's: an attack only ever asks
    for the gradient with respect to the image.
    """

    randomness: ClassVar[Randomness] = "batch"
    """What a result depends on beside the image: nothing; the image's position in the data; or the
    batch it is attacked in. An attack that draws nothing should say so: an evaluation may then cut its
    batches as memory asks."""
    several_batches: ClassVar[bool] = False
    """Whether :meth:`run` takes the images of several batches of an evaluation at once, in portions that fit
    into memory, and has its successes verified. Any other attack is run on one batch after the other, in full
    precision; where nothing is random, on as many images as fit."""
    minimizes_distance: ClassVar[bool] = False
    """Whether the attack looks for the closest wrong image: it then has no use for a caller's loss."""
    takes_target: ClassVar[bool] = False
    """Whether ``label`` may be a goal to reach (:mod:`softdefend.core.goals`): the attack then asks
    ``fooled(logits, label)`` where it would compare an answer with the label, and climbs losses that know
    goals, as those of :mod:`softdefend.attacks.losses` do."""
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")
    """The norms that the attack is made for."""
    pattern: ClassVar[str] = ""
    """A regular expression for the names of this attack, whose groups are constructor arguments:
    ``pgd-(?P<steps>\\d+)``. Without one there is a name for the default settings only."""
    suffix: ClassVar[str | None] = ""
    """What may stand behind the name that the attack is registered under, for messages:
    ``-STEPS[xRESTARTS]``. None where a name alone makes no attack."""

    def __post_init__(self) -> None:
        """Check the types of all settings, and that counts are at most :data:`MOST`."""
        check_fields(self, "attack", MOST)

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables and files, such as ``pgd-20``."""

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        """The attack that a name stands for, the rest of its settings as they are by default; None for a name
        that is not understood."""
        if not cls.pattern:
            default = cls()
            return default if default.name == name else None
        match = re.fullmatch(cls.pattern, name)
        if match is None:
            return None
        given = {setting: value for setting, value in match.groupdict().items() if value is not None}
        return cls(**{s: _count(s, v) if v.isdecimal() else v for s, v in given.items()})

    def check(self, threat: ThreatModel) -> None:
        """Refuse a threat model that this attack is not made for; an evaluation asks before it runs anything.

        Raises:
            SettingError: the attack would refuse it when called.
        """
        self.check_norm(threat.norm)

    def check_norm(self, norm: Norm) -> None:
        """Refuse a norm that is not one of :attr:`norms`."""
        if norm not in self.norms:
            hint = f"; {norm} has {_MADE_FOR[norm]}" if norm in _MADE_FOR else ""
            raise SettingError("threat.norm", norm, f"{' or '.join(self.norms)} under {self.name}{hint}")

    def check_target(self) -> None:
        """Refuse a class to be reached where the attack knows only labels.

        Raises:
            SettingError: it does.
        """
        if not self.takes_target:
            raise SettingError("attack.target", "classes to reach", f"none: {self.name} has no targeted form")

    @abstractmethod
    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        """Adversarial images [b, c, h, w], inside ``threat`` around ``image``.

        Args:
            net: images [b, c, h, w] to logits [b, k].
            image: [b, c, h, w] float32 in [0, 1].
            label: [b] int64; or probabilities [b, k], from a caller who trains (see
                :func:`~softdefend.attacks.losses.hard_label`); or, with :attr:`takes_target`, a goal.
            threat: the set the result stays in.
            context: the caller's loss if there is one (``context.loss``), and the source of every random
                draw: ``context.generator``, or for an attack of several batches ``context.random``.
        """

    @final
    def __call__(
        self,
        net: Forward,
        image: Tensor,
        label: Tensor,
        threat: ThreatModel,
        *,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        loss: AttackLoss | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images [b, c, h, w], inside ``threat`` around ``image``; what they cost is said at the
        attack's :meth:`run`.

        Args:
            net: images [b, c, h, w] to logits [b, k].
            image: [b, c, h, w] float32 in [0, 1].
            label: [b] int64, or probabilities [b, k].
            threat: the set the result stays in.
            target: classes to be reached, [b] integers; the label then does not matter, and only the target
                is a success.
            mask: the values that may change, bool, [h, w], [c, h, w] or [b, c, h, w]; all when None. What an
                attack spends on others, such as a random start in l2, is lost.
            loss: what to climb, in place of the attack's own loss.
            generator: source of every random draw, on the device of ``image``; torch's own when None.

        Raises:
            SettingError: what :meth:`check` refuses; a ``loss`` for an attack that minimises the distance, or
                one that does not return [b]; a ``target`` of another shape or type, beside a ``loss``, that
                is no class, or for an attack without a targeted form; a ``mask`` of another shape or type.
        """
        if target is not None:
            if loss is not None:
                raise SettingError("attack.target", "a target and a loss", "one of both")
            label = self.goal(target, len(image))
            net = with_known_target(net, target)
        if loss is not None and self.minimizes_distance:
            raise SettingError("attack.loss", "a loss", f"none: {self.name} minimises the distance")
        self.check(threat)
        masked = None if mask is None else Mask(free_values(mask, image), image)
        model = CountingModel(net, len(image), mask=masked)
        climbed = None if loss is None else checked_loss(loss)
        context = AttackContext(model, CallerRandomness(generator, len(image)), loss=climbed)
        x_adv = self.run(model, image, label, threat, context)
        return x_adv if masked is None else masked(x_adv, None)

    @final
    def goal(self, target: Tensor, n: int) -> Tensor:
        """The goal to reach these classes, in the place of the labels.

        Raises:
            SettingError: not n integers, one below zero, or an attack without a targeted form.
        """
        self.check_target()
        target = check_type("attack.target", target, Tensor)
        if target.shape != (n,) or target.is_floating_point() or target.dtype == torch.bool:
            given = f"{target.dtype} {list(target.shape)}".removeprefix("torch.")
            raise SettingError("attack.target", given, f"class numbers [{n}] int64")
        if n and int(target.amin()) < 0:
            raise SettingError("attack.target", int(target.amin()), "class numbers from 0")
        return to_reach(target)

    @final
    def run_batches(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        """What an evaluation calls: :meth:`run` on the images of several batches.

        Args:
            net: the network for all n images.
            image: [n, c, h, w] float32 in [0, 1].
            label: [n] int64, or a goal to reach.
            threat: the set the result stays in.
            context: of all n images.

        Returns:
            Adversarial images [n, c, h, w].
        """
        self.check(threat)
        if reaches(label):
            self.check_target()
        if self.several_batches:
            return self.run(net, image, label, threat, context)
        batches = context.random.batches(image.device)
        if self.randomness == "none":
            everything = torch.arange(len(image), device=image.device)
            batches = ((rows, CallerRandomness(None, len(rows))) for rows in context.portions(everything))
        found = []
        for rows, random in batches:
            part = net.part(rows)
            x_adv = self.run(part, image[rows], label[rows], threat, AttackContext(part, random))
            found.append(x_adv.detach())
        return torch.cat(found)


def free_values(mask: Tensor, image: Tensor) -> Tensor:
    """A mask for each image, [b, c, h, w] bool.

    Raises:
        SettingError: another type, or a shape that does not fit.
    """
    mask = check_type("attack.mask", mask, Tensor)
    fits = mask.ndim in (2, 3, 4) and all(
        m in (1, i) for m, i in zip(mask.shape[::-1], image.shape[::-1], strict=False)
    )
    if mask.dtype != torch.bool or not fits:
        given = f"{mask.dtype} {list(mask.shape)}".removeprefix("torch.")
        raise SettingError("attack.mask", given, f"bool [h, w], [c, h, w] or {list(image.shape)}")
    return mask.expand(image.shape)


def with_known_target(net: Forward, target: Tensor) -> Forward:
    """The network; when called it refuses a target [b] with classes that it has no logits for."""
    last = int(target.amax()) if len(target) else 0

    def forward(image: Tensor) -> Tensor:
        logits = net(image)
        if last >= logits.shape[1]:
            raise SettingError("attack.target", last, f"class numbers from 0 to {logits.shape[1] - 1}")
        return logits

    return forward


def _count(setting: str, digits: str) -> int:
    digits = digits.lstrip("0") or "0"
    if len(digits) > len(str(MOST)):  # Python refuses to read thousands of digits
        raise SettingError(f"attack.{setting}", f"a number of {len(digits)} digits", f"at most {MOST:,}")
    return int(digits)


def value_and_gradient(net: Forward, loss: AttackLoss, image: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each sample, [b], and its gradient with respect to the image, [b, c, h, w], zero where it is
    NaN or infinite: such a pixel must not poison the image.

    The gradient is that of the sum, not the mean: a sample's gradient must not depend on its batch.

    Raises:
        SettingError: a network without gradients in the image.
    """
    image = image.detach().requires_grad_(True)
    with torch.enable_grad():
        value = loss(net(image))
        grad = image_gradient(value, image)
    return value.detach(), grad.nan_to_num(0, 0, 0)


def pick(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Per sample, by a mask [b], of images [b, c, h, w]."""
    return torch.where(mask.view(-1, 1, 1, 1), yes, no)


def larger(candidate: Tensor, reached: Tensor, best: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Per sample, whichever image [b, c, h, w] has the larger loss [b], and that loss; ``best``, the earlier
    one, on a tie."""
    wins = reached > value
    return pick(wins, candidate, best), torch.where(wins, reached.to(value), value)
