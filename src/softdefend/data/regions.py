"""Cutout, random erasing, CropShift and CutMix: rectangles of an image blackened, moved, or filled from
another image of the batch."""

from __future__ import annotations

import math

import torch
from scipy.special import betaincinv
from torch import Tensor


def partners(of: Tensor) -> Tensor:
    """The row that each row of a batch [b, ...] is mixed with: the one before it, the last for the first.

    A batch is in random order, so every pair of images is as likely as any other.
    """
    return of.roll(1, 0)


def box_mask(box: Tensor, h: int, w: int) -> Tensor:
    """Which pixels lie in the box, [b, 1, h, w] bool.

    Args:
        box: [b, 4] int64 (top, bottom, left, right), bottom and right not included; parts outside the image
            are allowed.
    """
    top, bottom, left, right = box[:, :, None].unbind(dim=1)  # [b, 1] each
    y, x = torch.arange(h, device=box.device), torch.arange(w, device=box.device)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return rows[:, None, :, None] & columns[:, None, None, :]


def boxes_around(center: Tensor, height: Tensor | int, width: Tensor | int) -> Tensor:
    """Boxes [n, 4] of a height and width around centers [n, 2] (y, x).

    Half of an even side lies before the center's pixel.
    """
    top, left = center[:, 0] - height // 2, center[:, 1] - width // 2
    return torch.stack([top, top + height, left, left + width], dim=1)


def cutout(image: Tensor, center: Tensor, side: int) -> Tensor:
    """Blacken a square of each image (DeVries & Taylor, arXiv 1708.04552); cut at the border, as theirs is.

    Args:
        image: [b, c, h, w].
        center: [b, 2] int64 (y, x).
        side: of the square, in pixels.
    """
    h, w = image.shape[2:]
    return image.masked_fill(box_mask(boxes_around(center, side, side), h, w), 0.0)


def erase(image: Tensor, box: Tensor) -> Tensor:
    """Blacken the box of each image (Zhong et al., arXiv 1708.04896).

    Args:
        image: [b, c, h, w].
        box: [b, 4] int64, as for :func:`box_mask`.
    """
    return image.masked_fill(box_mask(box, *image.shape[2:]), 0.0)


def keep(image: Tensor, box: Tensor) -> Tensor:
    """Blacken everything but the box of each image.

    Args:
        image: [b, c, h, w].
        box: [b, 4] int64, as for :func:`box_mask`.
    """
    return image * box_mask(box, *image.shape[2:])


def cutmix(image: Tensor, box: Tensor) -> Tensor:
    """Fill the box of each image from its partner's same place (Yun et al., arXiv 1905.04899).

    Args:
        image: [b, c, h, w].
        box: [b, 4] int64, as for :func:`box_mask`.
    """
    h, w = image.shape[2:]
    return torch.where(box_mask(box, h, w), partners(image), image)


def own_share(box: Tensor, h: int, w: int) -> Tensor:
    """The share of its own pixels that each image keeps, [b] float32: CutMix's lambda, by the box's area.

    Args:
        box: [b, 4] int64 inside the image.
    """
    top, bottom, left, right = box.unbind(dim=1)
    return 1 - ((bottom - top) * (right - left)).float() / (h * w)


def draw_centers(n: int, h: int, w: int, generator: torch.Generator) -> Tensor:
    """Draw uniformly random pixels, [n, 2] int64 (y, x)."""
    y = torch.randint(0, h, (n,), generator=generator)
    return torch.stack([y, torch.randint(0, w, (n,), generator=generator)], dim=1)


def draw_boxes(
    n: int, h: int, w: int, probability: float, alpha: float, generator: torch.Generator
) -> Tensor:
    """Draw CutMix boxes [n, 4] int64 inside the image; empty (all zero) where an image is not mixed.

    The box is about a random pixel and has the image's sides times sqrt(1 - lambda), rounded down, with
    lambda ~ Beta(alpha, alpha); it is cut at the border, so that images keep more than lambda on average.

    Args:
        n: number of boxes, each drawn for itself.
        h, w: of the images.
        probability: of mixing an image, in [0, 1].
        alpha: > 0; 1 makes lambda uniform.
        generator: on the CPU.
    """
    mixed = torch.rand(n, generator=generator) < probability
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    center = draw_centers(n, h, w, generator)
    # By the inverse of the distribution function: torch's own Beta takes no generator.
    kept = torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy()))
    ratio = (1 - kept).sqrt()
    box = boxes_around(center, (h * ratio).long(), (w * ratio).long())
    limits = torch.tensor([h, h, w, w])
    return box.clamp(min=torch.zeros_like(limits), max=limits) * mixed[:, None]


_TRIES, _LEAST, _RATIO = 10, 0.02, (0.3, 3.3)
"""Random erasing: draws until a box fits, its least share of the image, height over width."""


def draw_erasures(
    n: int, h: int, w: int, probability: float, largest: float, generator: torch.Generator
) -> Tensor:
    """Draw boxes [n, 4] int64 to blacken, as torchvision's ``RandomErasing`` does; empty where none is.

    A box has a share of the image's area, uniform between 0.02 and ``largest``, and a ratio of its sides,
    log-uniform between 0.3 and 3.3. The first of ten that is smaller than the image both ways is placed
    uniformly; if none is, nothing is erased.

    Args:
        n: number of boxes, each drawn for itself.
        h, w: of the images.
        probability: of erasing, in [0, 1].
        largest: share of the area, in [0.02, 1].
        generator: on the CPU.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    erased = uniform(n) < probability
    area = h * w * (_LEAST + (largest - _LEAST) * uniform(n, _TRIES))
    low, high = (math.log(ratio) for ratio in _RATIO)
    ratio = (low + (high - low) * uniform(n, _TRIES)).exp()
    height, width = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (height < h) & (width < w)
    first = fits.long().argmax(dim=1, keepdim=True)
    height, width = height.gather(1, first).squeeze(1), width.gather(1, first).squeeze(1)
    place = uniform(n, 2)
    top, left = (place[:, 0] * (h - height + 1)).long(), (place[:, 1] * (w - width + 1)).long()
    return torch.stack([top, top + height, left, left + width], dim=1) * (erased & fits.any(dim=1))[:, None]


def draw_shifts(n: int, h: int, w: int, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw CropShift (Li & Spratling, ICLR 2023): a random part of an image at a random place on black.

    Rows and columns that are cut away are ``most`` together at most: their number is uniform on 0..most, that
    of the columns uniform on 0..number. Which part is kept, and where it is put, is uniform.

    Args:
        n: number of images, each drawn for itself.
        h, w: of the images.
        most: of rows and columns, below both sides.
        generator: on the CPU.

    Returns:
        Offsets [n, 2] (y, x): the pixel at (r, c) shows the image's at (r + y, c + x); and the boxes [n, 4]
        where it shows any. Both int64.
    """

    def upto(limit: Tensor) -> Tensor:
        return (torch.rand(n, generator=generator, dtype=torch.float64) * (limit + 1)).long()

    total = upto(torch.full((n,), most))
    columns = upto(total)
    rows = total - columns
    from_y, from_x, up, to_left = upto(rows), upto(columns), upto(rows), upto(columns)
    box = torch.stack([rows - up, h - up, columns - to_left, w - to_left], dim=1)
    return torch.stack([from_y + up - rows, from_x + to_left - columns], dim=1), box
