"""Where each image of an epoch is cropped and whether it is mirrored, drawn ahead for the whole epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from softdefend.errors import SettingError
from softdefend.rng import stream

Augment = Literal["none", "flip", "crop", "crop-flip"]
PadMode = Literal["zero", "reflect"]


@dataclass(frozen=True)
class AugmentSettings:
    """Random crops and flips of training images.

    Raises:
        SettingError: an unknown choice, or negative padding.
    """

    kind: Augment = "crop-flip"
    """none, flip (left-right), crop (a random crop of the padded image) or crop-flip."""
    pad: int = 4
    """Pixels of padding on each side before the random crop."""
    pad_mode: PadMode = "zero"
    """What the padding holds: zero (black) or reflect (the image mirrored at its border)."""

    @property
    def margin(self) -> int:
        """Pixels of padding that are used: none without a crop."""
        return self.pad if "crop" in self.kind else 0

    def __post_init__(self) -> None:
        for name, kind in (("kind", Augment), ("pad_mode", PadMode)):
            if getattr(self, name) not in get_args(kind):
                raise SettingError(f"augment.{name}", getattr(self, name), " or ".join(get_args(kind)))
        if self.pad < 0:
            raise SettingError("augment.pad", self.pad, "0 or more pixels")


def epoch_plan(
    n: int,
    *,
    seed: int,
    epoch: int,
    augment: str,
    pad: int,
    device: torch.device | str = "cpu",
    views: int = 1,
) -> Tensor:
    """The order and the augmentation of one epoch, [n, 1 + 3 views] int64 rows of (index, top, left, flip,
    and as many more (top, left, flip) as there are further views).

    A row says: take image ``index``, pad it by ``pad`` pixels on each side, cut out a window of the original
    size that starts at (``top``, ``left``) in the padded image, and mirror it left-right if ``flip`` is 1.
    Every index occurs once. Offsets are uniform on 0..2 ``pad``, flips are fair. Without cropping the window
    is the image itself (top = left = pad), so the same gather serves every choice.

    The numbers are drawn on the CPU and moved, so that they do not depend on the device. Settings that share
    a seed share their draws: ``flip`` mirrors the same images as ``crop-flip``.

    Args:
        n: number of images.
        seed, epoch: position in the run (see :mod:`softdefend.rng`).
        augment: ``none``, ``flip``, ``crop`` or ``crop-flip``.
        pad: padding in pixels, >= 0; must be the one that the :class:`Resident` split was made with.
        device: where the plan is used.
        views: independent augmentations of each image, >= 1; the first is the same for any number.
    """
    if augment not in get_args(Augment):
        raise SettingError("augment.kind", augment, " or ".join(get_args(Augment)))
    order = torch.randperm(n, generator=stream(seed, "order", epoch))
    columns = [order[:, None]]
    for view in range(views):
        draws = stream(seed, f"augment/{view}" if view else "augment", epoch)
        flip = torch.randint(0, 2, (n, 1), generator=draws)
        offsets = torch.randint(0, 2 * pad + 1, (n, 2), generator=draws)
        if "crop" not in augment:
            offsets.fill_(pad)
        if "flip" not in augment:
            flip.zero_()
        columns += [offsets, flip]
    return torch.cat(columns, dim=1).to(device)
