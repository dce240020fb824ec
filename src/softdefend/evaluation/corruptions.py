"""Common corruptions, computed on the fly for images of any size, after CIFAR-10-C.

Ten corruptions at five severities (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", arXiv 1903.12261), with the constants of the authors'
``make_cifar_c.py`` (hendrycks/robustness, commit 8190fe3), which were chosen for 32x32 images; larger images
suffer relatively less from the blurs. The published data set has five more in its main list (glass, motion
and zoom blur, the weather, elastic), so a mean over these ten is comparable between networks evaluated
here, not with a leaderboard's. It is a plain mean of accuracies: the paper's mean corruption error, divided
by AlexNet's, has no baseline outside ImageNet.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

from softdefend import rng
from softdefend.data import Split
from softdefend.errors import SettingError
from softdefend.evaluation.evaluate import Rate
from softdefend.modes import attacked, tf32

SEVERITIES = (1, 2, 3, 4, 5)


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


def brightness(image: Tensor, level: float, _: object = None) -> Tensor:
    """``level`` added to the value of HSV, at most 1; hue and saturation stay.

    For a given hue and saturation every channel is proportional to the value (the largest channel), so this
    is a factor; black, which has no hue, becomes grey.
    """
    value = image.amax(1, keepdim=True)
    brighter = (value + level).clamp(max=1)
    return torch.where(value > 0, image * (brighter / value.clamp_min(1e-12)), brighter)


def contrast(image: Tensor, level: float, _: object = None) -> Tensor:
    """The distance from each channel's mean shrunk to a share ``level``."""
    mean = image.mean((2, 3), keepdim=True)
    return (image - mean) * level + mean


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


_Corruption = Callable[[Tensor, Any, Sequence[torch.Generator]], Tensor]

CORRUPTIONS: dict[str, tuple[_Corruption, tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (speckle_noise, (0.06, 0.10, 0.12, 0.16, 0.20)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (brightness, (0.05, 0.10, 0.15, 0.20, 0.30)),
    "contrast": (contrast, (0.75, 0.50, 0.40, 0.30, 0.15)),
    "pixelate": (pixelate, (0.95, 0.90, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}
"""Each corruption with its constant at severity 1 to 5, as in CIFAR-10-C."""


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0, *, first: int = 0) -> Tensor:
    """Corrupted copies of ``images``.

    The draws of image i depend on ``seed``, ``name`` and i alone: neither on the other images nor on the
    severity, so that a higher severity is the same noise, stronger. (The published data set drew anew.)

    Args:
        images: [n, c, h, w] on the CPU, uint8 or floating point in [0, 1]. With other than 1 or 3 channels,
            JPEG and pixelation treat each channel as a grey image.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the noise.
        first: position of ``images[0]`` in the data set, for images that come in batches.

    Returns:
        The same shape and dtype, in the same range. uint8 is cut to whole levels, not rounded, as the
        published code does; JPEG and pixelation work on 8-bit levels whatever the dtype.

    Raises:
        SettingError: an unknown name, another severity, or images of another form.
    """
    if name not in CORRUPTIONS:
        raise SettingError("corruption", repr(name), ", ".join(CORRUPTIONS))
    if severity not in SEVERITIES:
        raise SettingError("severity", severity, "1 to 5")
    if images.dim() != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        given = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise SettingError("images", given, "[n, c, h, w], uint8 or floating point in [0, 1]")
    eight_bit = images.dtype == torch.uint8
    image = images.float() / 255 if eight_bit else images.float()
    function, levels = CORRUPTIONS[name]
    generators = [rng.stream(seed, f"corrupt/{name}", step=first + i) for i in range(len(image))]
    damaged = function(image, levels[severity - 1], generators).clamp(0, 1)
    # 1e-3 of a level: k/255 times 255 must not fall to k - 1
    return (255 * damaged + 1e-3).to(torch.uint8) if eight_bit else damaged.to(images.dtype)


def evaluate_corruptions(
    net: nn.Module,
    data: Split,
    *,
    device: torch.device | str = "cpu",
    names: Sequence[str] = tuple(CORRUPTIONS),
    limit: int | None = None,
    batch_size: int = 500,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Accuracy under every corruption and severity, in eval mode and float32.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k], on ``device``.
        data: images and labels.
        device: where the network runs; the images are corrupted on the CPU.
        names: which corruptions.
        limit: only the first so many images.
        batch_size: images at once; no part of the result.
        seed: of the noise.
        progress: show a bar.

    Returns:
        For JSON: ``n``, ``seed``, ``clean`` (a :class:`Rate`), ``corruptions`` (by name, the ``Rate`` at each
        severity and their ``mean``), ``mean`` (over corruptions and severities, not normalised).

    Raises:
        SettingError: an unknown name.
    """
    n = min(len(data), limit or len(data))
    labels = data.labels[:n]

    @torch.no_grad()
    def rate(change: Callable[[Tensor, int], Tensor]) -> Rate:
        right = []
        for start in range(0, n, batch_size):
            image = change(data.images[start : min(start + batch_size, n)], start)
            image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
            right.append(net(image.to(device)).argmax(1).cpu() == labels[start : start + batch_size])
        return Rate.of(torch.cat(right))

    table: dict[str, Any] = {}
    with attacked(net, "eval"), tf32(False):
        clean = rate(lambda image, _: image)
        for name in tqdm(names, desc="corruptions", leave=False, disable=None if progress else True):
            rates = [rate(_corruptor(name, severity, seed)) for severity in SEVERITIES]
            mean = fmean(one.rate for one in rates)
            table[name] = {"mean": mean, "severities": [asdict(one) for one in rates]}
    return {
        "n": n,
        "seed": seed,
        "clean": asdict(clean),
        "corruptions": table,
        "mean": fmean(row["mean"] for row in table.values()),
        "mean_is": "plain mean of accuracies over corruptions and severities, no AlexNet normalisation",
    }


def _corruptor(name: str, severity: int, seed: int) -> Callable[[Tensor, int], Tensor]:
    return lambda image, start: corrupt(image, name, severity, seed, first=start)


def _each(
    image: Tensor, generators: Sequence[torch.Generator], draw: Callable[[torch.Generator], Tensor]
) -> Tensor:
    """One draw for each image, [n, c, h, w], from its own generator."""
    return torch.stack([draw(generator) for generator in generators]).view_as(image)


def _through_pillow(image: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """``change`` applied to every image as a picture of 8 bits: RGB for three channels, else grey planes."""
    n, c, h, w = image.shape
    levels = (255 * image).round().to(torch.uint8)
    planes = levels.permute(0, 2, 3, 1) if c == 3 else levels.reshape(n * c, h, w)
    changed = np.stack([np.asarray(change(Image.fromarray(plane))) for plane in planes.numpy()])
    result = torch.from_numpy(changed).float() / 255
    return result.permute(0, 3, 1, 2).contiguous() if c == 3 else result.view(n, c, h, w)
