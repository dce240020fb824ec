"""The threat model: how far an adversary may move an image. Pixels are in [0, 1] everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.projections import l1_correction, project_l0, uniform_in_l1

Norm = Literal["linf", "l2", "l1", "l0"]


class Budget(float):
    """A length in pixel units that reads ``8/255`` and prints back as it was written.

    >>> Budget("8/255")
    Budget('8/255')
    >>> round(Budget("8/255") * 255, 9)
    8.0

    Raises:
        SettingError: the text is no number or ratio, or the value is negative or not finite.
    """

    text: str

    def __new__(cls, value: str | float) -> Budget:
        try:
            if isinstance(value, str) and "/" in value:
                above, below = value.split("/")
                number = float(above) / float(below)
            else:
                number = math.nan if isinstance(value, bool) else float(value)
        except (ValueError, ZeroDivisionError, TypeError):
            number = math.nan
        if not math.isfinite(number) or number < 0:
            raise SettingError(
                "budget", repr(value), "a ratio such as 8/255 or a non-negative number such as 0.03"
            )
        self = super().__new__(cls, number)
        self.text = getattr(value, "text", None) or str(value)
        return self

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Budget({self.text!r})"

    def __reduce__(self) -> tuple[type[Budget], tuple[str]]:
        return Budget, (self.text,)


# Beyond these an l-inf ball covers the whole image range, and the others most small images: a unit mistake.
LARGEST = {"linf": 1.0, "l2": 20.0, "l1": 1000.0, "l0": 10000.0}
EXAMPLES = {"linf": "8/255", "l2": "128/255", "l1": "12", "l0": "24"}
"""A usual radius in each norm, for messages."""
SPARSE_STEP = 0.01
"""Share of an image's values that a step in l1 changes (Tramèr & Boneh, arXiv 1904.13000: all but the 99th
percentile of the gradient)."""


@dataclass(frozen=True)
class ThreatModel:
    """The set of images an adversary may show instead of ``image``: a norm ball cut with [0, 1].

    Args:
        norm: ``linf`` (largest change of a value), ``l2`` (Euclidean length of the change), ``l1`` (sum of
            the changes) or ``l0`` (how many of the c h w values change).
        eps: radius in pixel units of [0, 1]: ``8/255``, not ``8``; in l0 a number of values. Training and
            evaluation ask for less than half the image's range (0.5 for l-inf, half the diagonal for l2, half
            the values for l1 and l0), where all images can be made the same gray one, and for a tenth of a
            gray level at least.

    Raises:
        SettingError: unknown norm; ``eps`` not in (0, 1] for l-inf, (0, 20] for l2 or (0, 1000] for l1, or no
            whole number from 1 to 10,000 for l0.
    """

    norm: Norm = "linf"
    """linf, l2, l1 or l0."""
    eps: Budget = Budget("8/255")
    """Radius in pixel units of [0, 1], such as 8/255."""

    def __post_init__(self) -> None:
        if not isinstance(self.norm, str) or self.norm not in LARGEST:
            raise SettingError("threat.norm", repr(self.norm), "linf, l2, l1 or l0")
        eps = Budget(self.eps)
        object.__setattr__(self, "eps", eps)
        if not 0 < eps <= LARGEST[self.norm] or (self.norm == "l0" and not eps.is_integer()):
            most, example = LARGEST[self.norm], EXAMPLES[self.norm]
            accepted = f"a value in (0, {most:g}] in pixel units of [0, 1], such as {example}"
            if self.norm == "l0":
                accepted = f"a whole number of values from 1 to {most:g}, such as {example}"
            raise SettingError("threat.eps", eps, accepted)

    def random_start(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A point drawn uniformly from the ball around each image; NOT cut to [0, 1].

        Args:
            image: [b, c, h, w] float32 in [0, 1].
            generator: source of the draw, on the device of ``image``; torch's own when None.

        Raises:
            SettingError: in l0, where no attack starts in the ball.
        """
        self._refuse_l0()
        if self.norm == "linf":
            noise = torch.rand(image.shape, generator=generator, device=image.device, dtype=image.dtype)
            return image + (2 * noise - 1) * float(self.eps)
        if self.norm == "l1":
            shape = len(image), image[0].numel() + 1
            noise = torch.rand(shape, generator=generator, device=image.device, dtype=image.dtype)
            return image + float(self.eps) * uniform_in_l1(noise).view_as(image)
        noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
        radius = torch.rand(len(image), generator=generator, device=image.device, dtype=image.dtype)
        # The volume inside radius r grows as r^d, so uniform in the ball means r = eps * u^(1/d).
        radius = float(self.eps) * radius.pow(1 / image[0].numel())
        return image + _unit(noise) * radius.view(-1, 1, 1, 1)

    def ascend(self, adversarial: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """One steepest-ascent step of length ``step_size`` in this norm; not yet projected.

        In l1 the length is shared by the hundredth of the values with the largest gradients, of those that
        the box does not stop, and by no fewer than have room for it.

        Raises:
            SettingError: in l0, where no attack climbs.
        """
        self._refuse_l0()
        if self.norm == "l1":
            return adversarial + step_size * _sparse(adversarial, grad, math.ceil(step_size))
        direction = grad.sign() if self.norm == "linf" else _unit(grad)
        return adversarial + step_size * direction

    def project(self, image: Tensor, adversarial: Tensor) -> Tensor:
        """The nearest allowed image: into the ball around ``image``, then into [0, 1].

        For l-inf, l1 and l0 this is the exact projection onto the intersection. For l2 the two projections in
        this order land inside both sets (clamping moves no pixel away from ``image``), as the field does it;
        it is the exact projection wherever the box does not bind.
        """
        eps = float(self.eps)
        if self.norm == "linf":
            return torch.minimum(torch.maximum(adversarial, image - eps), image + eps).clamp(0, 1)
        if self.norm == "l0":
            return project_l0(image, adversarial, int(eps))
        delta = adversarial - image
        if self.norm == "l1":
            delta = delta + l1_correction(image, delta, eps)
            # The sums of a large image round by more than its ball may be exceeded.
            size = delta.abs().sum(dim=(1, 2, 3), keepdim=True)
            return (image + delta * (eps / size.clamp_min(1e-12)).clamp(max=1)).clamp(0, 1)
        return (image + delta * (eps / _length(delta)).clamp(max=1)).clamp(0, 1)

    def move(self, image: Tensor, adversarial: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """:meth:`ascend`, then :meth:`project`: one step of an attack."""
        return self.project(image, self.ascend(adversarial, grad, step_size))

    def distance(self, image: Tensor, adversarial: Tensor) -> Tensor:
        """Distance of each pair in this norm, [b], in pixel units; in l0 a number of values."""
        return length(adversarial - image, self.norm)

    def _refuse_l0(self) -> None:
        if self.norm == "l0":
            raise SettingError("threat.norm", self.norm, "linf, l2 or l1; in l0 only sigma-zero attacks")


def length(delta: Tensor, norm: Norm) -> Tensor:
    """Length of each sample of [b, ...], [b], in pixel units; in l0 how many values are not zero."""
    delta = delta.flatten(1)
    if norm == "linf":
        return delta.abs().amax(dim=1)
    size: Tensor = torch.linalg.vector_norm(delta, {"l2": 2, "l1": 1, "l0": 0}[norm], dim=1)
    return size


def diameter(norm: Norm, values: int) -> float:
    """Largest distance of two images of so many values, c h w."""
    return float({"linf": 1, "l2": values**0.5, "l1": values, "l0": values}[norm])


def _sparse(adversarial: Tensor, grad: Tensor, fewest: int) -> Tensor:
    """Signs of the largest gradients that the box leaves room for, each sample's together of length one."""
    free = torch.where(grad > 0, adversarial < 1, adversarial > 0)
    size = torch.where(free, grad.abs(), 0).flatten(1)
    values = size.shape[1]
    least = size.topk(min(max(round(SPARSE_STEP * values), fewest, 1), values), dim=1).values[:, -1:]
    chosen = ((size >= least) & (size > 0)).view_as(grad)
    return grad.sign() * chosen / chosen.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1)


def _unit(vector: Tensor) -> Tensor:
    """Each sample scaled to Euclidean length one; an all-zero sample stays zero."""
    return vector / _length(vector)


def _length(vector: Tensor) -> Tensor:
    """Euclidean length of each sample, [b, 1, 1, 1], never quite zero."""
    norm: Tensor = torch.linalg.vector_norm(vector, dim=(1, 2, 3), keepdim=True)
    return norm.clamp_min(1e-12)
