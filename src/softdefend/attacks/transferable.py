"""What makes images fool networks that they were not made on: diverse inputs, and smoothed gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 0.9
"""Side of the smallest image that a network is shown, as a share of the whole."""
SPREAD = 3.0
"""Standard deviations from the center of a smoothing window to its border."""


def diverse(image: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Images shrunk to a random size and padded with black to the old one at a random place, all alike, or as
    they are (Xie et al., arXiv 1803.06978, who enlarge them instead).

    Args:
        image: [b, c, h, w].
        probability: of being shrunk, in [0, 1].
        generator: of the draws; torch's own when None.
    """
    device = image.device if generator is None else generator.device
    drawn = torch.rand(4, generator=generator, device=device).tolist()
    if drawn[0] >= probability:
        return image
    height, width = image.shape[2:]
    least = [max(int(SMALLEST * side), 1) for side in (height, width)]
    share = drawn[1]
    h, w = (low + int(share * (side - low + 1)) for low, side in zip(least, (height, width), strict=True))
    top, left = int(drawn[2] * (height - h + 1)), int(drawn[3] * (width - w + 1))
    small = F.interpolate(image, size=(h, w), mode="bilinear", align_corners=False)
    return F.pad(small, (left, width - w - left, top, height - h - top))


def window(side: int) -> Tensor:
    """A Gaussian window [side, side] that sums to one."""
    line = torch.linspace(-SPREAD, SPREAD, side).square().div(-2).exp()
    return torch.outer(line, line) / line.sum() ** 2


def smooth_gradient(image: Tensor, side: int) -> Tensor:
    """The images [b, c, h, w] as they are, whose gradient is convolved with a Gaussian window, as if it were
    taken over shifted images (Dong et al., arXiv 1904.02884).

    Args:
        image: [b, c, h, w].
        side: of the window, odd.
    """
    seen = image.view_as(image)
    if seen.requires_grad:
        channels = image.shape[1]
        kernel = window(side).to(image).expand(channels, 1, side, side)

        def smooth(grad: Tensor) -> Tensor:
            return F.conv2d(grad, kernel, padding=side // 2, groups=channels)

        seen.register_hook(smooth)  # type: ignore[no-untyped-call]
    return seen
