"""Color jitter, batched: brightness, contrast and saturation of each image change by factors drawn ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from softdefend.data.policies import gray

STEPS = 2**20
"""A draw is a whole number from 0 to this."""


def draw_jitter(n: int, generator: torch.Generator) -> Tensor:
    """Draws for n images, [n, 3] int64 in 0..STEPS: brightness, contrast, saturation."""
    return torch.randint(0, STEPS + 1, (n, 3), generator=generator)


def jitter(image: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Change brightness, then contrast, then saturation, each by a factor uniform in 1 - s to 1 + s.

    Each moves the image away from, or towards, a version without any: black, its mean gray, its gray levels.
    The result is cut to [0, 1] after each. Colorless images keep their saturation.

    Args:
        image: [b, c, h, w] float32 in [0, 1].
        draws: [b, 3] int64 of :func:`draw_jitter`.
        strength: s, in [0, 1].
    """
    factors = 1 + strength * (2 * draws.float() / STEPS - 1)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(dim=1)
    image = (brightness * image).clamp(0, 1)
    level = gray(image).mean(dim=(2, 3), keepdim=True)
    image = (level + contrast * (image - level)).clamp(0, 1)
    colorless = gray(image)
    return (colorless + saturation * (image - colorless)).clamp(0, 1)
