"""The threat model: how far an adversary may move an image. Pixels are in [0, 1] everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softdefend.core.errors import SettingError

Norm = Literal["linf", "l2"]


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


# Beyond these an l-inf ball covers the whole image range and an l2 ball most small images: a unit mistake.
LARGEST = {"linf": 1.0, "l2": 20.0}


@dataclass(frozen=True)
class ThreatModel:
    """The set of images an adversary may show instead of ``image``: a norm ball cut with [0, 1].

    Args:
        norm: ``linf`` (largest change of a pixel) or ``l2`` (Euclidean length of the change).
        eps: radius in pixel units of [0, 1]: ``8/255``, not ``8``. Training and evaluation ask for less than
            half the image's range (0.5 for l-inf, half the diagonal for l2), where all images can be made
            the same gray one, and for a tenth of a gray level at least.

    Raises:
        SettingError: unknown norm; ``eps`` not in (0, 1] for l-inf or (0, 20] for l2.
    """

    norm: Norm = "linf"
    """linf or l2."""
    eps: Budget = Budget("8/255")
    """Radius in pixel units of [0, 1], such as 8/255."""

    def __post_init__(self) -> None:
        if not isinstance(self.norm, str) or self.norm not in LARGEST:
            raise SettingError("threat.norm", repr(self.norm), "linf or l2")
        eps = Budget(self.eps)
        object.__setattr__(self, "eps", eps)
        if not 0 < eps <= LARGEST[self.norm]:
            raise SettingError(
                "threat.eps",
                eps,
                f"a value in (0, {LARGEST[self.norm]:g}] in pixel units of [0, 1], such as "
                + ("8/255" if self.norm == "linf" else "128/255"),
            )

    def random_start(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A point drawn uniformly from the ball around each image; NOT cut to [0, 1].

        Args:
            image: [b, c, h, w] float32 in [0, 1].
            generator: source of the draw, on the device of ``image``; torch's own when None.
        """
        if self.norm == "linf":
            noise = torch.rand(image.shape, generator=generator, device=image.device, dtype=image.dtype)
            return image + (2 * noise - 1) * float(self.eps)
        noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
        radius = torch.rand(len(image), generator=generator, device=image.device, dtype=image.dtype)
        # The volume inside radius r grows as r^d, so uniform in the ball means r = eps * u^(1/d).
        radius = float(self.eps) * radius.pow(1 / image[0].numel())
        return image + _unit(noise) * radius.view(-1, 1, 1, 1)

    def ascend(self, adversarial: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """One steepest-ascent step of length ``step_size`` in this norm; not yet projected."""
        direction = grad.sign() if self.norm == "linf" else _unit(grad)
        return adversarial + step_size * direction

    def project(self, image: Tensor, adversarial: Tensor) -> Tensor:
        """The nearest allowed image: into the ball around ``image``, then into [0, 1].

        For l-inf this is the exact projection onto the intersection. For l2 the two projections in this
        order land inside both sets (clamping moves no pixel away from ``image``), as the field does it;
        it is the exact projection wherever the box does not bind.
        """
        eps = float(self.eps)
        if self.norm == "linf":
            return torch.minimum(torch.maximum(adversarial, image - eps), image + eps).clamp(0, 1)
        delta = adversarial - image
        return (image + delta * (eps / _length(delta)).clamp(max=1)).clamp(0, 1)

    def move(self, image: Tensor, adversarial: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """:meth:`ascend`, then :meth:`project`: one step of an attack."""
        return self.project(image, self.ascend(adversarial, grad, step_size))

    def distance(self, image: Tensor, adversarial: Tensor) -> Tensor:
        """Distance of each pair in this norm, [b], in pixel units."""
        delta = (adversarial - image).flatten(1)
        return delta.abs().amax(dim=1) if self.norm == "linf" else torch.linalg.vector_norm(delta, dim=1)


def _unit(vector: Tensor) -> Tensor:
    """Each sample scaled to Euclidean length one; an all-zero sample stays zero."""
    return vector / _length(vector)


def _length(vector: Tensor) -> Tensor:
    """Euclidean length of each sample, [b, 1, 1, 1], never quite zero."""
    norm: Tensor = torch.linalg.vector_norm(vector, dim=(1, 2, 3), keepdim=True)
    return norm.clamp_min(1e-12)
