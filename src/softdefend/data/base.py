"""Data sets as the rest of the package sees them: batches, splits, and the three splits of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softdefend.core.digest import checksum
from softdefend.core.errors import SettingError
from softdefend.core.tensors import unusual_form
from softdefend.data.encoded import EncodedImages
from softdefend.data.settings import Residence

# The float error of k/255 in float32 is 3e-8; anything further off did not come from 8 bits.
_EIGHT_BIT_TOLERANCE = 1e-6
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as the training step sees it.

    Attributes:
        index: [b] int64, position in the split (for training: in the training set).
        image: [b, c, h, w] float32 in [0, 1].
        label: [b] int64.
    """

    index: Tensor
    image: Tensor
    label: Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels in host memory. Use :func:`split` for tensors from outside: it checks the values.

    Attributes:
        images: [n, c, h, w], uint8, or float32 in [0, 1] for images that are not multiples of 1/255; or
            encoded ones, which are decoded when they are taken.
        labels: [n] int64, what training sees.
        clean_labels: [n] int64, the labels before label noise, for measurement only; None without noise.
        residence: where tensors are kept for a run: device, host, or auto.

    Raises:
        SettingError: a wrong shape or dtype, or no images at all.
    """

    images: Tensor | EncodedImages
    labels: Tensor
    clean_labels: Tensor | None = None
    residence: Residence = "auto"

    def __post_init__(self) -> None:
        _check_images(self.images)
        _check_labels("labels", self.labels, len(self.images))
        if self.clean_labels is not None:
            _check_labels("clean_labels", self.clean_labels, len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: Tensor) -> Split:
        """The images at ``index`` [m] int64, in that order."""
        clean = None if self.clean_labels is None else self.clean_labels[index]
        images = self.images.subset(index) if isinstance(self.images, EncodedImages) else self.images[index]
        return Split(images, self.labels[index], clean, self.residence)

    @property
    def identity(self) -> Tensor:
        """What tells the images from others: themselves, or digests of encoded ones."""
        return self.images.identity if isinstance(self.images, EncodedImages) else self.images


@dataclass(frozen=True, eq=False)
class Extra:
    """Further training images, of which every batch has a fixed share. They are drawn with replacement.

    Attributes:
        split: images and labels, perhaps a network's.
        fraction: their share of a batch, in (0, 1), rounded down to whole images.
    """

    split: Split
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise SettingError("data.extra_fraction", self.fraction, "a share of a batch, in (0, 1)")

    def count(self, batch_size: int) -> int:
        """How many of a batch's images are extra."""
        return int(batch_size * self.fraction + 1e-9)


@dataclass(frozen=True, eq=False)
class DataBundle:
    """The three splits of one run. The validation split is held out of the training data; the test split
    takes part in no choice.

    Attributes:
        name: short name for tables.
        train, validation, test: disjoint splits with images of one shape.
        classes: name of each class; labels are positions in it.
        fingerprint: sha256 (hex) of the training, validation and extra images and labels.
        notes: plain values that describe where the data came from and what label noise was measured.
        extra: further training images, if any.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    fingerprint: str
    notes: Mapping[str, object] = field(default_factory=dict)
    extra: Extra | None = None


def split(
    images: Tensor, labels: Tensor, *, images_name: str = "images", labels_name: str = "labels"
) -> Split:
    """Check tensors from outside and bring them to the stored form.

    Args:
        images: [n, c, h, w], uint8 (0..255) or floating point in [0, 1]. Floating-point images that are
            multiples of 1/255 (to 1e-6) are stored as uint8, a quarter of the memory.
        labels: [n], any integer type, not negative.
        images_name, labels_name: what the caller's user knows them by, for messages.

    Raises:
        SettingError: naming the first wrong image or label.
    """
    _check_images(images, images_name, stored=False)
    _check_plain(labels_name, labels)
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        raise SettingError(labels_name, _kind(labels), "a tensor of integer labels [n]")
    labels = labels.detach().cpu().long()
    _check_labels(labels_name, labels, len(images))
    if bool((labels < 0).any()):
        row = int((labels < 0).nonzero()[0])
        raise SettingError(labels_name, f"label {int(labels[row])} at row {row}", "labels >= 0")
    images = images.detach().cpu()
    if images.is_floating_point():
        images = _eight_bit(_checked_pixels(images.float(), images_name))
    return Split(images.contiguous(), labels.contiguous())


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _check_plain(name: str, value: object) -> None:
    """Refuse a tensor without plain values; other things than tensors are refused by who looks further."""
    if isinstance(value, Tensor) and (form := unusual_form(value)):
        raise SettingError(name, form, "a plain tensor")


def _check_images(images: Tensor | EncodedImages, name: str = "images", *, stored: bool = True) -> None:
    if isinstance(images, EncodedImages) and len(images):
        return
    _check_plain(name, images)
    good = isinstance(images, Tensor) and images.ndim == 4 and images.numel() > 0
    if isinstance(images, Tensor) and images.dtype != torch.uint8:
        good &= images.dtype == torch.float32 if stored else images.is_floating_point()
    if not good:
        raise SettingError(
            name, _kind(images), "at least one image, [n, c, h, w], uint8 or floating point in [0, 1]"
        )


def _check_labels(name: str, labels: Tensor, n: int) -> None:
    _check_plain(name, labels)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (n,):
        raise SettingError(name, _kind(labels), f"one integer label per image, [{n}] int64")


def _checked_pixels(images: Tensor, name: str) -> Tensor:
    for start in range(0, len(images), _CHUNK):  # chunks: a mask of the whole set would double its memory
        part = images[start : start + _CHUNK]
        good = ((part >= 0) & (part <= 1)).flatten(1)  # NaN compares false
        if not bool(good.all()):
            row = int((~good.all(dim=1)).nonzero()[0])
            value = part[row].flatten()[~good[row]][0].item()
            raise SettingError(name, f"pixel {value:.6g} in image {start + row}", "finite pixels in [0, 1]")
    return images


def _eight_bit(images: Tensor) -> Tensor:
    """The images as uint8 where all pixels are multiples of 1/255, else as they are."""
    out = torch.empty(images.shape, dtype=torch.uint8)
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK]
        levels = (part * 255).round()
        if bool(((levels / 255 - part).abs() > _EIGHT_BIT_TOLERANCE).any()):
            return images
        out[start : start + _CHUNK] = levels.to(torch.uint8)
    return out


def fingerprint(split: Split) -> str:
    """sha256 (hex) of the images and labels of a split."""
    return checksum([("images", split.identity), ("labels", split.labels)])
