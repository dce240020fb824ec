"""What every attack is: a function from images to images that never leaves the threat model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from softdefend.attacks.losses import AttackLoss, image_gradient
from softdefend.core.threat import ThreatModel
from softdefend.execution.counting import Forward as Forward
from softdefend.execution.counting import Journal, Oracle
from softdefend.execution.randomness import Draws

Randomness = Literal["none", "image", "batch"]


@dataclass(frozen=True)
class Attack(ABC):
    """Settings of an attack; calling it makes adversarial images.

    The network's mode and its parameters' ``requires_grad`` are the caller's: an attack only ever asks
    for the gradient with respect to the image.
    """

    randomness: ClassVar[Randomness] = "batch"
    """What a result depends on beside the image: nothing; the image's position in the data; or the logical
    batch it is attacked in. An attack that draws nothing should say so: an evaluation may then cut its
    batches as memory asks."""

    def check(self, threat: ThreatModel) -> None:  # noqa: B027 (most attacks take every threat model)
        """Refuse a threat model that this attack is not made for; an evaluation asks before it runs anything.

        Raises:
            SettingError: the attack would refuse it when called.
        """

    @abstractmethod
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
        """Adversarial images [b, c, h, w], inside ``threat`` around ``image``.

        Args:
            forward: images [b, c, h, w] to logits [b, k].
            image: [b, c, h, w] float32 in [0, 1].
            target: labels [b] int64, or probabilities [b, k].
            threat: the set the result stays in.
            loss: what to climb, in place of the attack's own loss.
            generator: source of every random draw, on the device of ``image``; torch's own when None.
        """

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
        """What an evaluation calls: the same attack on the images of several logical batches at once.

        The default calls the attack on one logical batch after the other, in full precision; where nothing
        is random, on as many images at once as ``oracle`` takes.

        Args:
            oracle: the network.
            image: [n, c, h, w] float32 in [0, 1].
            label: [n] int64.
            threat: the set the result stays in.
            draws: the random numbers of these images.
            journal: where to note what a killed evaluation should not do twice.

        Returns:
            Adversarial images [n, c, h, w].
        """
        parts = draws.portions(image.device)
        if self.randomness == "none":
            parts = ((rows, None) for rows in oracle.parts(len(image), image.device))
        found = [
            self(oracle.exact_at(rows), image[rows], label[rows], threat, generator=generator).detach()
            for rows, generator in parts
        ]
        return torch.cat(found)

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables and files, such as ``pgd-20``."""


def value_and_gradient(forward: Forward, loss: AttackLoss, image: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each sample, [b], and its gradient with respect to the image, [b, c, h, w], zero where it is
    NaN or infinite: such a pixel must not poison the image.

    The gradient is that of the sum, not the mean: a sample's gradient must not depend on its batch.

    Raises:
        SettingError: a network without gradients in the image.
    """
    image = image.detach().requires_grad_(True)
    with torch.enable_grad():
        value = loss(forward(image))
        grad = image_gradient(value, image)
    return value.detach(), grad.nan_to_num(0, 0, 0)


def pick(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Per sample, by a mask [b], of images [b, c, h, w]."""
    return torch.where(mask.view(-1, 1, 1, 1), yes, no)


def larger(found: Tensor, reached: Tensor, best: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Per sample, whichever image [b, c, h, w] has the larger loss [b], and that loss; ``best``, the earlier
    one, on a tie."""
    wins = reached > value
    return pick(wins, found, best), torch.where(wins, reached.to(value), value)
