"""What is in a data set, for people and for the network's normalization layer."""

from __future__ import annotations

import torch

from softdefend.core.errors import printable
from softdefend.data.base import DataBundle, Split
from softdefend.data.encoded import EncodedImages
from softdefend.data.subsets import subset

_CHUNK, _SHOWN = 1000, 2000


def channel_stats(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, in [0, 1] units, for normalization. Of
    encoded images, which would all have to be decoded, a stratified part of 2,000 stands for all.

    The deviation is the population's (divided by the number of pixels). A constant channel, which nothing
    can be learned from, gets 1 so that normalizing it does not divide by zero.
    """
    if isinstance(split.images, EncodedImages) and len(split) > _SHOWN:
        split = split.subset(subset(split.labels, _SHOWN))
    channels = split.images.shape[1]
    total, squares = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    # Chunks: the whole of CIFAR-10 in float64 would take 1.2 GB.
    for start in range(0, len(split), _CHUNK):
        pixels = split.images[start : start + _CHUNK].double()
        total += pixels.sum(dim=(0, 2, 3))
        squares += pixels.square().sum(dim=(0, 2, 3))
    pixels_per_channel = split.images.shape.numel() / channels
    mean = total / pixels_per_channel
    std = (squares / pixels_per_channel - mean.square()).clamp(min=0).sqrt()
    scale = 255.0 if split.images.dtype == torch.uint8 else 1.0
    # 1e-6 of the range: below what rounding in the difference of squares leaves of a constant.
    std = torch.where(std > 1e-6 * scale, std / scale, 1.0)
    return tuple((mean / scale).tolist()), tuple(std.tolist())


def describe(bundle: DataBundle) -> str:
    """Describe sizes, classes, pixels, label noise and fingerprint, in lines for a terminal."""
    train = bundle.train
    shape = "x".join(str(side) for side in train.images.shape[1:])
    mean, std = channel_stats(train)
    splits = (("train", train), ("validation", bundle.validation), ("test", bundle.test))
    facts = {
        "name": bundle.name,
        **{name: f"{len(part)} images" for name, part in splits},
        "image": f"{shape} (channels x height x width), {str(train.images.dtype).removeprefix('torch.')}",
        "mean": ", ".join(f"{value:.4f}" for value in mean),
        "std": ", ".join(f"{value:.4f}" for value in std),
        "fingerprint": bundle.fingerprint,
        **{key.replace("_", " "): _plain(value) for key, value in bundle.notes.items()},
    }
    lines = [f"{key:<{max(map(len, facts))}}  {value}" for key, value in facts.items()] + [""]
    width = max(len("class"), *(len(name) for name in bundle.classes))
    lines.append(f"{'class':<{width}}" + "".join(f" {name:>10}" for name, _ in splits))
    counts = [torch.bincount(part.labels, minlength=len(bundle.classes)).tolist() for _, part in splits]
    for name, *row in zip(bundle.classes, *counts, strict=True):
        lines.append(f"{name:<{width}}" + "".join(f" {count:>10}" for count in row))
    return "\n".join(lines)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))
