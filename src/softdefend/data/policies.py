"""RandAugment, AutoAugment and ColorShape, batched: every image has its own operations, drawn ahead.

Plain tensor operations on images in [0, 1], so that a step with them can be captured. Each operation is
applied to the whole batch and kept where it was drawn. Libraries that augment batches on the device choose
one sequence of operations for a whole batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATIONS = (
    "identity",
    *("shear-x", "shear-y", "translate-x", "translate-y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize", "invert"),
    *("slant-x", "slant-y"),
)
"""An operation is its position here. The nine from ``shear-x`` to ``sharpness`` have a direction: a level
below zero is the other one. RandAugment draws from all before ``invert``. Slants are ColorShape's shears:
about the middle, by an angle."""

FULL = 90
"""The largest level; a common multiple of RandAugment's 30 and AutoAugment's 9 steps."""

_SHEAR, _TRANSLATE, _ROTATE, _ENHANCE, _BITS, _SLANT = 0.3, 150 / 331, math.radians(30), 0.9, 4, 0.45
"""What the largest level means: slope, share of the side, angle, change of the factor 1, bits lost, angle in
radians."""

_CIFAR10 = (
    "invert 1 0 contrast 2 6, rotate 7 2 translate-x 3 9, sharpness 8 1 sharpness 9 3,"
    "shear-y 5 8 translate-y 7 9, autocontrast 5 0 equalize 9 0, shear-y 2 7 posterize 3 7,"
    "color 4 3 brightness 6 7, sharpness 3 9 brightness 7 9, equalize 6 0 equalize 5 0,"
    "contrast 6 7 sharpness 6 5, color 7 7 translate-x 5 8, equalize 3 0 autocontrast 4 0,"
    "translate-y 4 3 sharpness 2 6, brightness 9 6 color 2 8, solarize 5 2 invert 0 0,"
    "equalize 2 0 autocontrast 6 0, equalize 2 0 equalize 6 0, color 9 9 equalize 6 0,"
    "autocontrast 8 0 solarize 2 8, brightness 1 3 color 7 0, solarize 4 5 autocontrast 9 0,"
    "translate-y 9 9 translate-y 7 9, autocontrast 9 0 solarize 8 3, equalize 8 0 invert 1 0,"
    "translate-y 7 9 autocontrast 9 0"
)
"""AutoAugment's 25 sub-policies for CIFAR-10 (arXiv 1805.09501, appendix): twice an operation, its
probability in tenths and its level of 9."""

COLOR_SHAPE: dict[str, tuple[tuple[str, float, int, int, int], ...]] = {
    "color": (
        ("color", 0.125, -90, 90, 1),
        ("brightness", 0.125, -50, 90, 1),
        ("contrast", 0.125, -50, 90, 1),
        ("sharpness", 0.125, -90, 90, 1),
        ("autocontrast", 0.125, 0, 0, 1),
        ("equalize", 0.125, 0, 0, 1),
        ("slant-x", 0.125, 10, 30, 1),
        ("rotate", 0.125, 3, 30, 3),
    ),
    "shape": (
        ("color", 0.08, -90, 90, 1),
        ("brightness", 0.08, -50, 90, 1),
        ("contrast", 0.04, -50, 90, 1),
        ("sharpness", 0.08, -90, 90, 1),
        ("autocontrast", 0.04, 0, 0, 1),
        ("equalize", 0.08, 0, 0, 1),
        ("slant-x", 0.3, 10, 70, 1),
        ("rotate", 0.3, 3, 90, 3),
    ),
}
"""ColorShape's two mixtures, color-biased (CIFAR-10) and shape-biased (SVHN): operation, probability, least
and largest level, and the step between levels. Factors from 0.1 (0.5) to 1.9 in steps of 0.01, slants of 0.05
to 0.15 (0.35) in steps of 0.005, rotations of 1 to 10 (30) whole degrees."""


def cifar10_policy() -> Tensor:
    """[25, 2, 3] int64: operation, probability in tenths, level of :data:`FULL`."""
    rows = [pair.split() for pair in _CIFAR10.split(",")]
    parts = [[words[:3], words[3:]] for words in rows]
    return torch.tensor(
        [[[OPERATIONS.index(op), int(p), int(level) * FULL // 9] for op, p, level in row] for row in parts]
    )


def draw_randaugment(n: int, layers: int, magnitude: int, generator: torch.Generator) -> Tensor:
    """Draw RandAugment (Cubuk et al., arXiv 1909.13719), [n, layers, 2] int64 (operation, level).

    Every layer is one of 14 operations, all equally likely, at one magnitude and in a random direction.

    Args:
        n: number of images.
        layers: the paper's N, >= 1.
        magnitude: the paper's M, in 0..30.
        generator: on the CPU.
    """
    operation = torch.randint(0, OPERATIONS.index("invert"), (n, layers), generator=generator)
    return _directed(operation, torch.full_like(operation, magnitude * FULL // 30), generator)


def draw_autoaugment(n: int, generator: torch.Generator) -> Tensor:
    """Draw AutoAugment's CIFAR-10 policy, [n, 2, 2] int64 (operation, level).

    Each image has a random sub-policy; each of its two operations is made with its probability.

    Args:
        n: number of images.
        generator: on the CPU.
    """
    policy = cifar10_policy()
    row = policy[torch.randint(0, len(policy), (n,), generator=generator)]
    made = torch.randint(0, 10, (n, 2), generator=generator) < row[:, :, 1]
    return _directed(row[:, :, 0] * made, row[:, :, 2], generator)


def draw_color_shape(n: int, mixture: str, generator: torch.Generator) -> Tensor:
    """Draw ColorShape (Li & Spratling, ICLR 2023): one operation per image, [n, 1, 2] int64.

    Slants are along either axis, slants and rotations to either side.

    Args:
        n: number of images.
        mixture: ``color`` or ``shape``, see :data:`COLOR_SHAPE`.
        generator: on the CPU.
    """
    rows = COLOR_SHAPE[mixture]
    ends = torch.tensor([share for _, share, *_ in rows], dtype=torch.float64).cumsum(0)
    uniform, place = torch.rand(2, n, generator=generator, dtype=torch.float64).unbind()
    row = torch.bucketize(uniform * ends[-1], ends, right=True).clamp(max=len(rows) - 1)
    operation = torch.tensor([OPERATIONS.index(name) for name, *_ in rows])[row]
    least, largest, step = torch.tensor([levels for _, _, *levels in rows])[row].unbind(dim=1)
    level = least + step * (place * ((largest - least) // step + 1)).long()
    side, axis = torch.randint(0, 2, (2, n), generator=generator).unbind()
    slanted = _is(operation, "slant-x")
    level = torch.where(slanted | _is(operation, "rotate"), (1 - 2 * side) * level, level)
    return torch.stack([operation + slanted * axis, level], dim=-1)[:, None]


def _directed(operation: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Operation and level, stacked; the level's sign is random where the operation has a direction."""
    sign = 1 - 2 * torch.randint(0, 2, operation.shape, generator=generator)
    first, last = OPERATIONS.index("shear-x"), OPERATIONS.index("sharpness")
    level = torch.where((operation >= first) & (operation <= last), sign * level, level)
    return torch.stack([operation, level], dim=-1)


def augment(image: Tensor, draws: Tensor) -> Tensor:
    """Apply drawn operations one after the other; the result is float32 in [0, 1], not rounded to 8 bits.

    Args:
        image: [b, c, h, w] float32 in [0, 1].
        draws: [b, layers, 2] int64 (operation, level), levels in -FULL..FULL.
    """
    for layer in draws.unbind(dim=1):
        operation, level = layer.unbind(dim=1)
        image = tones(enhance(warp(image, operation, level), operation, level), operation, level)
    return image


def _is(operation: Tensor, name: str) -> Tensor:
    return operation == OPERATIONS.index(name)


def _pick(operation: Tensor, name: str) -> Tensor:
    """Where to keep the result of an operation, [b, 1, 1, 1] bool."""
    return _is(operation, name)[:, None, None, None]


def warp(image: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """Shear, translate, rotate or slant each image whose operation says so; nearest neighbor, black outside.

    Shears are about the corner, rotations and slants about the middle; translations are of whole pixels.
    """
    b, c, h, w = image.shape
    strength = level.float() / FULL

    def amount(name: str, full: float) -> Tensor:
        return torch.where(_is(operation, name), full * strength, 0.0)

    angle = amount("rotate", _ROTATE)
    cos, sin = angle.cos(), angle.sin()
    across, down = amount("slant-x", _SLANT).tan(), amount("slant-y", _SLANT).tan()
    xy, yx = amount("shear-x", _SHEAR) - sin + across, amount("shear-y", _SHEAR) + sin + down
    # Pixel (x, y) shows the source at (cos x + xy y + dx, yx x + cos y + dy), in pixel centers.
    dx = amount("translate-x", _TRANSLATE * w).trunc() + torch.where(
        _is(operation, "rotate"), (w - cos * w - xy * h) / 2, -across * h / 2
    )
    dy = amount("translate-y", _TRANSLATE * h).trunc() + torch.where(
        _is(operation, "rotate"), (h - yx * w - cos * h) / 2, -down * w / 2
    )
    x = (torch.arange(w, device=image.device) + 0.5)[None, None, :]
    y = (torch.arange(h, device=image.device) + 0.5)[None, :, None]
    cos, xy, yx, dx, dy = (value[:, None, None] for value in (cos, xy, yx, dx, dy))
    from_x = (cos * x + xy * y + dx).floor().long()  # [b, h, w]
    from_y = (yx * x + cos * y + dy).floor().long()
    seen = (from_x >= 0) & (from_x < w) & (from_y >= 0) & (from_y < h)
    at = from_y.clamp(0, h - 1) * w + from_x.clamp(0, w - 1)
    moved = image.flatten(2).gather(2, at.flatten(1)[:, None].expand(b, c, h * w)).view(b, c, h, w)
    return moved * seen[:, None]


def enhance(image: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """Change brightness, color, contrast or sharpness of each image whose operation says so.

    The image is moved away from, or towards, a version without any: black, gray, evenly gray or blurred.
    """
    colorless = gray(image)
    dull = torch.where(_pick(operation, "brightness"), 0.0, image)
    dull = torch.where(_pick(operation, "color"), colorless, dull)
    dull = torch.where(_pick(operation, "contrast"), colorless.mean(dim=(2, 3), keepdim=True), dull)
    dull = torch.where(_pick(operation, "sharpness"), _blurred(image), dull)
    factor = (1 + _ENHANCE * level.float() / FULL)[:, None, None, None]
    return (dull + factor * (image - dull)).clamp(0, 1)


def tones(image: Tensor, operation: Tensor, level: Tensor) -> Tensor:
    """Posterize, solarize, autocontrast, equalize or invert each image whose operation says so.

    Where levels of brightness matter there are 256 of them.
    """
    steps = (255 * image).round()
    level = level[:, None, None, None].float()
    coarse = (_BITS * level.abs() / FULL).round().exp2()
    out = torch.where(_pick(operation, "posterize"), (steps / coarse).floor() * coarse / 255, image)
    # In whole numbers: the threshold 255 (1 - level / FULL) is often one of the 256 levels itself.
    bright = FULL * steps >= 255 * (FULL - level)
    out = torch.where(_pick(operation, "solarize") & bright, 1 - image, out)
    low, high = image.amin(dim=(2, 3), keepdim=True), image.amax(dim=(2, 3), keepdim=True)
    stretched = (image - low) / torch.where(high > low, high - low, 1.0)
    out = torch.where(_pick(operation, "autocontrast") & (high > low), stretched, out)
    out = torch.where(_pick(operation, "equalize"), _equalized(image, steps), out)
    return torch.where(_pick(operation, "invert"), 1 - image, out)


def gray(image: Tensor) -> Tensor:
    """Brightness [b, 1, h, w]: ITU-R 601 weights for three channels, the mean of any other number."""
    if image.shape[1] != 3:
        return image.mean(dim=1, keepdim=True)
    return 0.299 * image[:, 0:1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:3]


def _blurred(image: Tensor) -> Tensor:
    """Each pixel's mean with its neighbors, itself counted five times; the border as it is."""
    if min(image.shape[2:]) < 3:
        return image
    inner = (9 * F.avg_pool2d(image, 3, stride=1) + 4 * image[:, :, 1:-1, 1:-1]) / 13
    blurred = image.clone()
    blurred[:, :, 1:-1, 1:-1] = inner
    return blurred


def _equalized(image: Tensor, steps: Tensor) -> Tensor:
    """Spread the brightness of every channel evenly.

    A pixel becomes the number of darker ones, in units of a 255th of all but the brightest. As in Pillow,
    channels of too few pixels for that stay as they are.

    By sorting: a histogram would need scattered additions, whose order varies on a GPU.
    """
    flat = steps.flatten(2).contiguous()
    ordered = flat.sort(dim=2).values
    darker = torch.searchsorted(ordered, flat)  # [b, c, hw]
    unit = torch.searchsorted(ordered, ordered[:, :, -1:].contiguous()) // 255  # those below the brightest
    even = ((darker + unit // 2) // unit.clamp(min=1)).clamp(max=255) / 255
    return torch.where(unit > 0, even, image.flatten(2)).view_as(image)
