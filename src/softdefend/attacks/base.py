"""What every attack is: a function from images to images that never leaves the threat model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softdefend.attacks.losses import AttackLoss
from softdefend.threat import ThreatModel

Forward = Callable[[Tensor], Tensor]
"""Maps images [b, c, h, w] in [0, 1] to logits [b, k]."""


@dataclass(frozen=True)
class Attack(ABC):
    """Settings of an attack; calling it makes adversarial images.

    The network's mode and its parameters' ``requires_grad`` are the caller's: an attack only ever asks
    for the gradient with respect to the image.
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

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables and files, such as ``pgd-20``."""


def value_and_gradient(forward: Forward, loss: AttackLoss, image: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each sample, [b], and its gradient with respect to the image, [b, c, h, w].

    The gradient is that of the sum, not the mean: a sample's gradient must not depend on its batch.
    """
    image = image.detach().requires_grad_(True)
    with torch.enable_grad():
        value = loss(forward(image))
        (grad,) = torch.autograd.grad(value.sum(), image)
    return value.detach(), grad
