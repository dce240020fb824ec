"""Settings of augmentation; crops and flips, drawn ahead for a whole epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from softdefend.core.errors import SettingError, check_values
from softdefend.core.hints import check_fields
from softdefend.core.rng import stream

Augment = Literal["none", "flip", "crop", "crop-flip", "resized-crop", "resized-crop-flip"]
PadMode = Literal["zero", "reflect"]
Policy = Literal["none", "randaugment", "autoaugment", "color", "shape"]
_PADDED = ("crop", "crop-flip")


@dataclass(frozen=True)
class AugmentSettings:
    """Random changes to training images, in this order: crop or CropShift, flip, jitter, policy, cutout,
    erasing, CutMix.

    Raises:
        SettingError: an unknown choice, or a number outside its range.
    """

    kind: Augment = "crop-flip"
    """none, flip (left-right), crop (a random crop of the padded image), crop-flip, or, of streamed images,
    resized-crop (a random part, brought to data.image_size) and resized-crop-flip."""
    pad: int = 4
    """Pixels of padding on each side before the random crop."""
    pad_mode: PadMode = "zero"
    """What the padding holds: zero (black) or reflect (the image mirrored at its border)."""
    crop_shift: float = 0
    """CropShift in place of the crop: rows and columns together, at most, that are cut away before the rest
    is put at a random place on black. Pixels, or below 1 a share of the image's shorter side; 0 for none."""
    scale: tuple[float, float] = (0.08, 1.0)
    """resized-crop: least and largest share of the image's area, in (0, 1]."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """resized-crop: least and largest width divided by height, > 0."""
    jitter: float = 0.0
    """Brightness, contrast and saturation change by factors from 1 - jitter to 1 + jitter, in [0, 1]; 0 for
    none."""
    policy: Policy = "none"
    """Operations on colors and geometry: none, randaugment, autoaugment (its CIFAR-10 policy), or one of
    ColorShape's mixtures, color (for CIFAR-10) and shape (for SVHN)."""
    randaugment_n: int = 2
    """RandAugment's operations per image, 1 to 100."""
    randaugment_m: int = 9
    """RandAugment's magnitude, 0 to 30."""
    cutout: float = 0
    """Side of a square that is blackened at a random place: pixels, or below 1 a share of the image's shorter
    side; 0 for none."""
    erasing: float = 0.0
    """Probability, in [0, 1], that a random rectangle is blackened."""
    erasing_area: float = 0.33
    """Largest share of the image that erasing blackens, in [0.02, 1]."""
    start: float = 0.0
    """Share of the epochs, in [0, 1), that pass before policy, cutout and erasing begin."""
    plain_first: bool = False
    """Leave policy, cutout and erasing out of the first of several views."""
    cutmix: float = 0.0
    """Probability, in [0, 1], that a box of an image is filled from another one, and the label with it."""
    cutmix_alpha: float = 1.0
    """Lambda ~ Beta(alpha, alpha) is the share an image keeps, before its box is cut at the border; > 0."""

    def is_strong(self, epoch: int, epochs: int) -> bool:
        """Whether policy, cutout and erasing are applied in a zero-based epoch of a run of ``epochs``."""
        return epoch >= math.floor(self.start * epochs + 1e-9)

    @property
    def margin(self) -> int:
        """Pixels of padding that are used: none without a crop."""
        return self.pad if self.kind in _PADDED else 0

    @property
    def resizes(self) -> bool:
        """Whether random parts of images are brought to one size."""
        return self.kind.startswith("resized-crop")

    def pixels(self, name: str, h: int, w: int) -> int:
        """``cutout`` or ``crop_shift`` in pixels of an image of h x w."""
        value = float(getattr(self, name))
        return int(value * min(h, w) if value < 1 else value)

    def __post_init__(self) -> None:
        check_fields(self, "augment")
        for name in ("scale", "ratio"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, kind in (("kind", Augment), ("pad_mode", PadMode), ("policy", Policy)):
            if getattr(self, name) not in get_args(kind):
                raise SettingError(f"augment.{name}", getattr(self, name), " or ".join(get_args(kind)))
        lengths = "0 or more pixels, or a share below 1"
        checks = (
            ("pad", self.pad >= 0, "0 or more pixels"),
            ("scale", 0 < self.scale[0] <= self.scale[1] <= 1, "two shares in (0, 1], the least first"),
            ("ratio", 0 < self.ratio[0] <= self.ratio[1] < math.inf, "two positive numbers, the least first"),
            ("jitter", 0 <= self.jitter <= 1, "a number in [0, 1]"),
            ("randaugment_n", 1 <= self.randaugment_n <= 100, "a whole number from 1 to 100"),
            ("randaugment_m", 0 <= self.randaugment_m <= 30, "a whole number from 0 to 30"),
            ("crop_shift", _is_length(self.crop_shift), lengths),
            ("cutout", _is_length(self.cutout), lengths),
            ("erasing", 0 <= self.erasing <= 1, "a number in [0, 1]"),
            ("erasing_area", 0.02 <= self.erasing_area <= 1, "a number in [0.02, 1]"),
            ("start", 0 <= self.start < 1, "a number in [0, 1)"),
            ("cutmix", 0 <= self.cutmix <= 1, "a number in [0, 1]"),
            ("cutmix_alpha", 0 < self.cutmix_alpha < math.inf, "a positive number"),
        )
        check_values("augment", self, checks)
        if self.crop_shift and "crop" in self.kind:
            given = f"{self.crop_shift} with augment.kind {self.kind}"
            raise SettingError("augment.crop_shift", given, "it with augment.kind flip or none")


def _is_length(value: float) -> bool:
    """Whether it is a number of pixels, or a share."""
    return value >= 0 and (value < 1 or value % 1 == 0)


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
    """Draw the order and the augmentation of one epoch.

    The plan has [n, 1 + 3 views] int64 rows of (index, top, left, flip), with three more columns (top, left,
    flip) for each further view.

    A row says: take image ``index``, pad it by ``pad`` pixels on each side, cut out a window of the original
    size that starts at (``top``, ``left``) in the padded image, and mirror it left-right if ``flip`` is 1.
    Every index occurs once. Offsets are uniform on 0..2 ``pad``, flips are fair. Without cropping the window
    is the image itself (top = left = pad), so the same gather serves every choice.

    The numbers are drawn on the CPU and moved, so that they do not depend on the device. Settings that share
    a seed share their draws: ``flip`` mirrors the same images as ``crop-flip``.

    Args:
        n: number of images.
        seed, epoch: position in the run (see :mod:`softdefend.core.rng`).
        augment: as ``augment.kind``. The columns of a resized crop are not among these.
        pad: padding in pixels, >= 0; must be the one that the :class:`Resident` split was made with.
        device: where the plan is used.
        views: independent augmentations of each image, >= 1; the first is the same for any number.
    """
    order = torch.randperm(n, generator=stream(seed, "order", epoch))
    window = windows(n, seed=seed, epoch=epoch, augment=augment, pad=pad, views=views)
    return torch.cat([order[:, None], window], dim=1).to(device)


def windows(rows: int, *, seed: int, epoch: int, augment: str, pad: int, views: int) -> Tensor:
    """The columns of :func:`epoch_plan` after the first, [rows, 3 views] int64 on the CPU."""
    if augment not in get_args(Augment):
        raise SettingError("augment.kind", augment, " or ".join(get_args(Augment)))
    columns = []
    for view in range(views):
        draws = stream(seed, f"augment/{view}" if view else "augment", epoch)
        flip = torch.randint(0, 2, (rows, 1), generator=draws)
        offsets = torch.randint(0, 2 * pad + 1, (rows, 2), generator=draws)
        if augment not in _PADDED:
            offsets.fill_(pad)
        if "flip" not in augment:
            flip.zero_()
        columns += [offsets, flip]
    return torch.cat(columns, dim=1)
