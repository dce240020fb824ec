"""The network under audit, as every check sees it: batch by batch, float32, one gradient path for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from softdefend.attacks import AttackLoss
from softdefend.core import rng
from softdefend.core.threat import ThreatModel, diameter

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits [b, k] and labels [b] to a loss [b]."""


class Perturbation(Protocol):
    """What the audit runs: an attack, or something that is called like one."""

    @property
    def name(self) -> str:
        """Of its random stream."""
        ...

    def __call__(
        self,
        forward: Callable[[Tensor], Tensor],
        image: Tensor,
        label: Tensor,
        threat: ThreatModel,
        /,
        *,
        loss: AttackLoss | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images [b, c, h, w] of images [b, c, h, w] with labels [b]."""
        ...


@dataclass(frozen=True)
class Probe:
    """A network with images that it gets right.

    Args:
        net: in eval mode, parameters frozen.
        images: [n, c, h, w].
        labels: [n].
        threat: the perturbations allowed.
        batch_size: images at once.
        seed: of every draw.
    """

    net: nn.Module
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @property
    def reach(self) -> float:
        """How far each pixel moves where all move equally far to the surface of the ball."""
        return float(self.threat.eps) / diameter(self.threat.norm, self.images[0].numel())

    def only(self, which: Tensor) -> Probe:
        """With only these images, by a mask [n] or positions."""
        return replace(self, images=self.images[which], labels=self.labels[which])

    def generator(self, name: str, step: int = 0) -> torch.Generator:
        """The stream of one check."""
        return rng.stream(self.seed, f"audit/{name}", step=step, device=self.device)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [b, k] float32. Logits without a gradient get one of zeros, so that attacks can run."""
        logits: Tensor = self.net(image)
        logits = logits.float()
        if not image.requires_grad:
            return logits
        return logits + (0 * image).flatten(1).sum(1, keepdim=True)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """[n, k]."""
        return torch.cat([self.forward(part) for part in torch.split(images, self.batch_size)])

    def values(self, loss: Loss, images: Tensor) -> Tensor:
        """Loss at images that belong to this probe's, [n]."""
        return loss(self.logits(images), self.labels)

    def gradient(self, loss: Loss, images: Tensor) -> Tensor:
        """Gradient of the loss at images that belong to this probe's, [n, c, h, w]."""
        found = []
        for part, label in zip(
            torch.split(images, self.batch_size), torch.split(self.labels, self.batch_size), strict=True
        ):
            part = part.detach().requires_grad_(True)
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(loss(self.forward(part), label).sum(), part)
            found.append(grad)
        return torch.cat(found)

    def attacked(
        self,
        attack: Perturbation,
        *,
        loss: Callable[[Tensor], AttackLoss] | None = None,
        name: str = "",
    ) -> Tensor:
        """Adversarial images [n, c, h, w] as an evaluator takes them: NaN is no change, projected again.

        Args:
            attack: what to run.
            loss: makes the loss to climb from labels [b]; the attack's own when None.
            name: of the stream, where one attack is run twice.
        """
        found = []
        parts = zip(
            torch.split(self.images, self.batch_size), torch.split(self.labels, self.batch_size), strict=True
        )
        for number, (image, label) in enumerate(parts):
            adversarial = attack(
                self.forward,
                image.clone(),
                label,
                self.threat,
                loss=None if loss is None else loss(label),
                generator=self.generator(f"{attack.name}{name}", number),
            ).detach()
            adversarial = torch.where(adversarial.isfinite(), adversarial, image)
            found.append(self.threat.project(image, adversarial))
        return torch.cat(found)

    def fooled(self, adversarial: Tensor) -> Tensor:
        """Which images are classified wrongly, [n] bool."""
        return self.logits(adversarial).argmax(1) != self.labels


def random_signs(probe: Probe, name: str, step: int = 0) -> Tensor:
    """A random corner direction for each image, entries -1 or 1, [n, c, h, w]."""
    noise = torch.rand(probe.images.shape, generator=probe.generator(name, step), device=probe.device)
    return torch.where(noise < 0.5, -1.0, 1.0)


def random_start(probe: Probe, name: str) -> Tensor:
    """Each image at a uniform random point of its ball, inside the box."""
    return probe.threat.random_start(probe.images, probe.generator(name)).clamp(0, 1)
