"""Auto-PGD in l1 (Croce & Hein, arXiv 2103.01208, "Mind the box"): sparse steps in a ball that shrinks.

The search begins in balls of three and two times eps. Its steps change only the values of largest gradient,
as many as two thirds of those in which the best image so far differs from the clean one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softdefend.core.projections import l1_correction

FIRST_SHARE = 0.2
"""Share of the values that a step changes where a search begins at random in the ball."""
SPARSER = 0.95
"""The step is long again where the changed values have become fewer than this share of those before."""
SHORTER = 1.5
"""Elsewhere it is divided by this."""
SHORTEST = 10.0
"""A step is not shorter than eps divided by this."""


def stages(steps: int, multi_eps: bool) -> list[tuple[int, int]]:
    """Multiples of eps, each with how many of the steps are made in a ball so large.

    >>> stages(100, True), stages(100, False)
    ([(3, 30), (2, 30), (1, 40)], [(1, 100)])
    """
    wide = min(math.ceil(0.3 * steps), (steps - 1) // 2) if multi_eps else 0
    return [(factor, count) for factor, count in ((3, wide), (2, wide), (1, steps - 2 * wide)) if count]


def reviews(steps: int) -> list[int]:
    """The steps after which a step's length and sparsity are reviewed."""
    every = max(int(0.04 * steps), 1)
    return list(range(every, steps + 1, every))


def project(image: Tensor, x_adv: Tensor, radius: float) -> Tensor:
    """The nearest point in ball and box, up to rounding.

    A vanished change may be off by the rounding of the sums here, as in the authors' code, whose verdicts
    depend on it: :func:`changed` counts such values.
    """
    delta = x_adv - image
    return image + delta + l1_correction(image, delta, radius)


def pull(image: Tensor, x_adv: Tensor, radius: float) -> Tensor:
    """As :func:`project`, with the sums in the order in which a search begins: it decides on the rounding."""
    return x_adv + l1_correction(image, x_adv - image, radius)


def changed(image: Tensor, x_adv: Tensor) -> Tensor:
    """How many values of each sample differ, [m] int64."""
    return (x_adv != image).flatten(1).sum(dim=1)


def share_of(count: Tensor, image: Tensor) -> Tensor:
    """The share of an image's values that a step changes where ``count`` [m] of them differ."""
    return count / image[0].numel() / 1.5


def move(
    image: Tensor, x_adv: Tensor, grad: Tensor, share: Tensor, step_size: Tensor, radius: float
) -> Tensor:
    """A step of length ``step_size`` [m, 1, 1, 1] in l1 along the signs of the ``share`` [m] of the largest
    gradients, projected."""
    values, size = image[0].numel(), grad.abs()
    place = ((1 - share) * values).clamp(0, values - 1).long()
    least = size.flatten(1).sort(dim=1).values.gather(1, place[:, None])
    signs = (grad * (size >= least.view(-1, 1, 1, 1))).sign()
    step = step_size * signs / (signs.abs().sum(dim=(1, 2, 3), keepdim=True) + 1e-10)
    return project(image, x_adv + step, radius)


def next_step_size(step_size: Tensor, sparser: Tensor, radius: float) -> Tensor:
    """Long again where ``sparser`` [m], shorter elsewhere."""
    longer = torch.where(sparser.view(-1, 1, 1, 1), radius, step_size / SHORTER)
    return longer.clamp(radius / SHORTEST, radius)
