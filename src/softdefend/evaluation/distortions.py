"""What common corruptions do to images: noise, blur, weather and digital damage, after CIFAR-10-C.

Every function takes images [n, c, h, w] float32 in [0, 1], the constants of one severity, and one generator
for each image where it draws; it returns [n, c, h, w], not yet cut to [0, 1]. Randomness of an image comes
from its own generator alone. Written after Hendrycks and Dietterich, arXiv 1903.12261, and the authors'
``make_cifar_c.py`` (hendrycks/robustness, commit 8190fe3); from equal draws it makes the same images, but for
the levels that theirs cuts or rounds away between two operations (glass and motion blur, snow).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from softdefend.data.policies import gray


def gaussian_noise(image: Tensor, level: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Independent normal noise of standard deviation ``level`` on every value."""
    return image + level * _each(image, generators, lambda g: torch.randn(image.shape[1:], generator=g))


def shot_noise(image: Tensor, level: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Photon counting: Poisson with mean ``level`` times the value, divided by ``level`` again."""
    pairs = zip(image, generators, strict=True)
    return torch.stack([torch.poisson(level * one, generator=g) for one, g in pairs]) / level


def impulse_noise(image: Tensor, level: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Salt and pepper: a share ``level`` of all values becomes 0 or 1, each with probability one half."""
    # one draw decides both: [0, level/2) is pepper, [level/2, level) is salt
    draw = _each(image, generators, lambda g: torch.rand(image.shape[1:], generator=g))
    return torch.where(draw < level, (draw >= level / 2).to(image.dtype), image)


def speckle_noise(image: Tensor, level: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Normal noise of standard deviation ``level`` times the value."""
    noise = _each(image, generators, lambda g: torch.randn(image.shape[1:], generator=g))
    return image + level * image * noise


def gaussian_blur(image: Tensor, level: float, _: object = None) -> Tensor:
    """A Gaussian of standard deviation ``level`` pixels, cut at four; the border is continued."""
    blurred = ndimage.gaussian_filter(image.numpy(), (0, 0, level, level), mode="nearest", truncate=4.0)
    return torch.from_numpy(blurred)


def defocus_blur(image: Tensor, level: tuple[float, float], _: object = None) -> Tensor:
    """A disk (radius, in pixels) smoothed by a 3x3 Gaussian (standard deviation); mirrored at the border."""
    kernel = defocus_kernel(*level)
    blurred = ndimage.correlate(image.numpy(), kernel[None, None].astype(np.float32), mode="mirror")
    return torch.from_numpy(blurred)


def defocus_kernel(radius: float, alias: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The point-spread function of :func:`defocus_blur`, [m, m], summing to one."""
    reach = int(radius) + 1  # one more for the smoothing
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float64)
    tap = np.exp(-(np.array([-1.0, 0.0, 1.0]) ** 2) / (2 * alias**2))
    tap /= tap.sum()
    smooth = ndimage.correlate(disk / disk.sum(), np.outer(tap, tap), mode="constant")
    return np.asarray(smooth / smooth.sum())


def glass_blur(image: Tensor, level: tuple[float, int], generators: Sequence[torch.Generator]) -> Tensor:
    """Pixels in the place of their neighbors, between two Gaussian blurs (standard deviation, passes).

    In each pass a pixel becomes itself or its upper, left or upper left neighbor, equally likely; the first
    two rows and columns stay. (The published loop means to swap the two, but copies one over the other.)
    """
    sigma, passes = level
    h, w = image.shape[2:]
    moves = torch.stack([torch.randint(-1, 1, (passes, 2, h, w), generator=g) for g in generators])
    moves[..., :2, :] = 0
    moves[..., :, :2] = 0
    image = gaussian_blur(image, sigma)
    for dy, dx in zip(moves[:, :, 0].unbind(1), moves[:, :, 1].unbind(1), strict=True):
        image = _take(image, torch.arange(h)[:, None] + dy, torch.arange(w) + dx)
    return gaussian_blur(image, sigma)


def motion_blur(image: Tensor, level: tuple[int, float], generators: Sequence[torch.Generator]) -> Tensor:
    """A streak (radius, standard deviation) within 45 degrees of the horizontal."""
    return _streak(image, *level, _angles(generators, -45, 45))


def zoom_blur(image: Tensor, level: float, _: object = None) -> Tensor:
    """The mean of the image and of it enlarged about the middle by 1.00, 1.01, ... up to ``level``, which
    itself takes part or not as :func:`numpy.arange` rounds."""
    factors = np.arange(1, level, 0.01).tolist()
    return (image + sum(_enlarged(image, factor) for factor in factors)) / (len(factors) + 1)


def snow(image: Tensor, level: tuple[float, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """The image whitened, and flakes over it: noise (mean, standard deviation), enlarged, nothing below a
    threshold, streaked (radius, standard deviation) downwards; last the share that stays of the image."""
    mean, spread, size, threshold, radius, sigma, stays = level
    noise = [torch.randn(1, *image.shape[2:], generator=g) for g in generators]
    flakes = _enlarged(mean + spread * torch.stack(noise), size)
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    flakes = _streak(flakes, int(radius), sigma, _angles(generators, -135, -45))
    white = torch.maximum(image, 1.5 * gray(image) + 0.5)
    return stays * image + (1 - stays) * white + flakes + flakes.flip((2, 3))


def fog(image: Tensor, level: tuple[float, float], generators: Sequence[torch.Generator]) -> Tensor:
    """A share of plasma (with its decay) added, and the image's largest value restored."""
    share, decay = level
    h, w = image.shape[2:]
    side = 1 << (max(h, w) - 1).bit_length()
    noise = torch.stack([2 * torch.rand(side, side, generator=g) - 1 for g in generators])
    largest = image.amax((1, 2, 3), keepdim=True)
    return (image + share * plasma(noise, decay)[:, None, :h, :w]) * largest / (largest + share)


def plasma(noise: Tensor, decay: float) -> Tensor:
    """Diamond-square height maps on a torus, [n, side, side] in [0, 1].

    Middles of squares and then of edges become the mean of their four neighbors plus noise, whose
    amplitude falls by the square of ``decay`` with every halving.

    Args:
        noise: [n, side, side] uniform in [-1, 1]; the side is a power of two.
        decay: > 1; small ones make rough maps.
    """
    height, step, wobble = torch.zeros_like(noise), noise.shape[1], 100.0
    while step >= 2:
        half = step // 2
        at, between = slice(None, None, step), slice(half, None, step)
        corner = height[:, at, at]
        below, beside = (corner + corner.roll(-1, axis) for axis in (1, 2))
        middle = (below + below.roll(-1, 2)) / 4 + wobble**2 * noise[:, between, between]
        height[:, between, between] = middle
        for ends, axis, edge in ((beside, 1, (at, between)), (below, 2, (between, at))):
            height[:, *edge] = (ends + middle + middle.roll(1, axis)) / 4 + wobble**2 * noise[:, *edge]
        step, wobble = half, wobble / decay
    height = height - height.amin((1, 2), keepdim=True)
    return height / height.amax((1, 2), keepdim=True).clamp_min(1e-12)


def brightness(image: Tensor, level: float, _: object = None) -> Tensor:
    """``level`` added to the value of HSV, at most 1; hue and saturation stay.

    For a given hue and saturation every channel is proportional to the value (the largest channel), so this
    is a factor; black, which has no hue, becomes gray.
    """
    value = image.amax(1, keepdim=True)
    brighter = (value + level).clamp(max=1)
    return torch.where(value > 0, image * (brighter / value.clamp_min(1e-12)), brighter)


def contrast(image: Tensor, level: float, _: object = None) -> Tensor:
    """The distance from each channel's mean shrunk to a share ``level``."""
    mean = image.mean((2, 3), keepdim=True)
    return (image - mean) * level + mean


def saturate(image: Tensor, level: tuple[float, float], _: object = None) -> Tensor:
    """The saturation of HSV times a factor plus a summand, within [0, 1]; hue and value stay. Grey is taken
    for a red without saturation. Images of other than three channels have none and stay as they are."""
    if image.shape[1] != 3:
        return image
    factor, summand = level
    value, least = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    # how far each channel is below the value, as a share of the farthest; red's for gray
    below = torch.where(value > least, (value - image) / (value - least).clamp_min(1e-12), 1.0)
    below[:, :1] = torch.where(value > least, below[:, :1], 0.0)
    saturation = factor * (value - least) / value.clamp_min(1e-12) + summand
    return value * (1 - saturation.clamp(0, 1) * below)


def elastic_transform(
    image: Tensor, level: tuple[float, float, float], generators: Sequence[torch.Generator]
) -> Tensor:
    """Two moves in shares of the shorter side: three corners of a square about the middle by up to the third
    constant, the plane with them; then each pixel by noise times the first, smoothed by the second."""
    h, w = image.shape[2:]
    strength, smoothing, reach = (min(h, w) * share for share in level)
    draws = 2 * torch.stack([torch.rand(6 + 2 * h * w, generator=g) for g in generators]) - 1
    half = max(min(h, w) // 3, 1)
    square = half * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) + torch.tensor([w // 2, h // 2])
    moved = square + reach * draws[:, :6].view(-1, 3, 2)
    # the affine map that takes the moved corners back: where each pixel comes from
    back = torch.linalg.solve(F.pad(moved, (0, 1), value=1.0), square.expand_as(moved))  # [n, 3, 2]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    plane = torch.stack([x, y, torch.ones_like(x)], dim=-1).float()
    image = _sample(image, torch.einsum("hwi,nij->nhwj", plane, back), whole=False)
    noise = draws[:, 6:].view(-1, 2, h, w).numpy()
    wander = ndimage.gaussian_filter(noise, (0, 0, smoothing, smoothing), mode="reflect", truncate=3)
    return _sample(
        image, plane[..., :2] + strength * torch.from_numpy(wander).permute(0, 2, 3, 1), whole=True
    )


def pixelate(image: Tensor, level: float, _: object = None) -> Tensor:
    """Scaled down to a share ``level`` of height and width and up again, both with a box filter."""

    def rescale(picture: Image.Image) -> Image.Image:
        w, h = picture.size
        small = picture.resize((max(1, int(w * level)), max(1, int(h * level))), Image.Resampling.BOX)
        return small.resize((w, h), Image.Resampling.BOX)

    return _through_pillow(image, rescale)


def jpeg_compression(image: Tensor, level: int, _: object = None) -> Tensor:
    """Written as a JPEG of quality ``level`` and read again."""

    def compress(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=level)
        return Image.open(buffer)

    return _through_pillow(image, compress)


def _each(
    image: Tensor, generators: Sequence[torch.Generator], draw: Callable[[torch.Generator], Tensor]
) -> Tensor:
    """One draw for each image, [n, c, h, w], from its own generator."""
    return torch.stack([draw(generator) for generator in generators]).view_as(image)


def _through_pillow(image: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """``change`` applied to every image as a picture of 8 bits: RGB for three channels, else gray planes."""
    n, c, h, w = image.shape
    levels = (255 * image).round().to(torch.uint8)
    planes = levels.permute(0, 2, 3, 1) if c == 3 else levels.reshape(n * c, h, w)
    changed = np.stack([np.asarray(change(Image.fromarray(plane))) for plane in planes.numpy()])
    result = torch.from_numpy(changed).float() / 255
    return result.permute(0, 3, 1, 2).contiguous() if c == 3 else result.view(n, c, h, w)


def _angles(generators: Sequence[torch.Generator], low: float, high: float) -> Tensor:
    """One angle for each image, [n], in radians."""
    share = torch.cat([torch.rand(1, generator=g) for g in generators])
    return torch.deg2rad(low + (high - low) * share)


def _take(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The pixels at rows and columns that broadcast to [n, h, w]; beyond the border the last one."""
    (n, c, h, w), at = image.shape, row.clamp(0, image.shape[2] - 1) * image.shape[3]
    at = (at + column.clamp(0, w - 1)).expand(n, h, w)
    return image.flatten(2).gather(2, at.flatten(1)[:, None].expand(n, c, h * w)).view_as(image)


def _streak(image: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Each pixel smeared along a line: the mean, with the weights of half a Gaussian, of the pixels that lie
    up to twice the radius away at its angle [n] in radians (x to the right, y down), as in ImageMagick."""
    distance = torch.arange(2 * radius + 1)
    weight = torch.exp(-distance.square() / (2 * sigma**2))
    weight /= weight.sum()
    dy, dx = (
        (distance * along[:, None] - 0.5).ceil().long()[:, :, None, None]
        for along in (angle.sin(), angle.cos())
    )
    y, x = torch.arange(image.shape[2])[:, None], torch.arange(image.shape[3])
    return torch.stack([weight[i] * _take(image, y + dy[:, i], x + dx[:, i]) for i in distance]).sum(0)


def _enlarged(image: Tensor, factor: float) -> Tensor:
    """The middle, as large as the image, of the image enlarged by ``factor`` >= 1, linearly."""
    h, w = image.shape[2:]
    inner_h, inner_w = math.ceil(h / factor), math.ceil(w / factor)
    top, left = (h - inner_h) // 2, (w - inner_w) // 2
    inner = image[:, :, top : top + inner_h, left : left + inner_w]
    size = (round(inner_h * factor), round(inner_w * factor))
    large = F.interpolate(inner, size, mode="bilinear", align_corners=True)
    top, left = (large.shape[2] - h) // 2, (large.shape[3] - w) // 2
    return large[:, :, top : top + h, left : left + w]


def _sample(image: Tensor, place: Tensor, *, whole: bool) -> Tensor:
    """The image at places (x, y) [n, h, w, 2] in pixels, linearly; mirrored at its border, which is in the
    middle of the last pixels or, if ``whole``, at their outer edge."""
    h, w = image.shape[2:]
    side = torch.tensor([w, h])
    grid = (2 * place + 1) / side - 1 if whole else 2 * place / (side - 1).clamp_min(1) - 1
    return F.grid_sample(image, grid, "bilinear", "reflection", align_corners=not whole)
