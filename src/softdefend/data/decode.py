"""Encoded images (PNG, JPEG, ...) to one uint8 tensor."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from tqdm import tqdm

from softdefend.core.errors import SettingError
from softdefend.core.memory import TooLargeError, available_memory, in_words
from softdefend.data.settings import DataSettings

LARGEST = 2**28
"""Bytes of one encoded image."""
_CHUNK = 256
_COPIES = 2
"""How often the images are in memory while they are split."""
_MOST_NAMED = 100
# Below this many pixels Python's own work outweighs the codec's, and threads only queue for the interpreter:
# 50,000 JPEGs of 32x32 take 3.6 s on one thread and 5 s on two. At 224x224 two threads are twice as fast.
_THREADS_FROM_PIXELS = 64 * 64
# Not ImageOps.exif_transpose: it also writes the other tags anew, and fails on some that cameras write.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    count: int,
    read: Callable[[int], bytes],
    name: Callable[[int], str],
    what: str,
    how: DataSettings | None = None,
    skipped: list[int] | None = None,
    remarks: list[str] | None = None,
) -> Tensor:
    """Decode ``count`` images of one size to [n, c, h, w] uint8, in parallel where that pays.

    All images are turned upright as their EXIF orientation says, and brought to one mode: gray (c = 1) or RGB
    (c = 3; transparency is dropped). Sizes are those of the upright images. With ``how.image_size`` the
    middle of each is cut out, see :func:`centered`.

    Args:
        count: number of images, >= 1.
        read: the encoded bytes of image i; called from several threads. A :class:`SettingError` counts as
            damage of the image.
        name: how messages call image i.
        what: what the progress bar calls the images. It is only shown on a terminal.
        how: has the settings of :data:`~softdefend.data.sources.base.DECODING`; all as they are by default
            when None.
        skipped: takes the numbers of the damaged images that are left out; n is the number of the others.
        remarks: takes a sentence about images that were left out or changed their mode.

    Raises:
        SettingError: naming all images that cannot be decoded, or the first one of another size than the rest
            or of more bits; or images that do not fit into memory.
    """
    images = _Images(read, name, how or DataSettings())
    first = images.first(count)
    width, height = first.size
    out = _empty((count, len(images.mode), height, width))
    damaged: dict[int, SettingError] = {}
    converted = 0

    def chunk(start: int) -> tuple[range, dict[int, SettingError], int]:
        numbers = range(start, min(start + _CHUNK, count))
        wrong, changed = dict[int, SettingError](), 0
        for i in numbers:
            try:
                image, was_gray = images.image(i, first)
            except _DamagedError as error:
                wrong[i] = error.reason
                continue
            if image.size != first.size:
                raise SettingError(
                    "data.source",
                    f"{name(i)} of {_size(image)} pixels",
                    f"images of one size ({_size(first)}, as {images.first_name}), or data.image_size",
                )
            changed += was_gray != (images.mode == "L")
            pixels = np.frombuffer(image.tobytes(), np.uint8)
            out[i] = pixels.reshape(height, width, len(images.mode)).transpose(2, 0, 1)
        return numbers, wrong, changed

    workers = min(os.cpu_count() or 1, 8) if width * height >= _THREADS_FROM_PIXELS else 1
    with ThreadPoolExecutor(workers) as pool, tqdm(total=count, desc=what, unit="img", disable=None) as bar:
        try:
            # In order, so that the error raised is that of the first bad image.
            for numbers, wrong, changed in pool.map(chunk, range(0, count, _CHUNK)):
                bar.update(len(numbers))
                damaged |= wrong
                converted += changed
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if damaged and not (images.how.skip_damaged and skipped is not None):
        raise all_damaged(list(damaged.values()))
    if skipped is not None:
        skipped.extend(damaged)
    out = _without(out, damaged)
    if remarks is not None:
        remarks += _remarks(images, [name(i) for i in damaged], count, converted)
    return torch.from_numpy(out)


def check_size(count: int, data: bytes, how: DataSettings) -> None:
    """Refuse ``count`` images of the size of an encoded one where they do not fit into memory.

    Raises:
        SettingError: how much they would take, and how much there is.
    """
    try:
        image = Image.open(io.BytesIO(data))
    except Exception:  # it is damaged, as will be said
        return
    gray = how.channels == "gray" or (how.channels == "first" and _is_gray(image))
    side = how.image_size
    _check_fits((count, 1 if gray else 3, side or image.height, side or image.width))


class Look(NamedTuple):
    """What an encoded image says of itself."""

    width: int
    """Of the upright image."""
    height: int
    gray: bool
    digest: int
    """64 bits of a hash of its bytes."""


def look(data: bytes, name: str, how: DataSettings) -> Look | SettingError:
    """Look at an encoded image, or say why it cannot be read.

    Args:
        data: encoded.
        name: how messages call it.
        how: has ``sixteen_bit``, and ``skip_damaged``, with which the image is decoded too.

    Raises:
        SettingError: more bits than are allowed.
    """
    images = _Images(lambda _: data, lambda _: name, how)
    try:
        image = images.opened(0)
        gray, turned = _is_gray(image), _orientation(image) >= 5
        if how.skip_damaged:
            images.decoded(image, 0, "L" if gray else "RGB")
    except _DamagedError as error:
        return error.reason
    width, height = image.size[::-1] if turned else image.size
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return Look(width, height, gray, int.from_bytes(digest, "little", signed=True))


def picture(data: bytes, name: str, mode: str, how: DataSettings) -> Image.Image:
    """An encoded image, upright and of a mode (L or RGB).

    Raises:
        SettingError: it cannot be decoded.
    """
    images = _Images(lambda _: data, lambda _: name, how)
    try:
        return images.decoded(images.opened(0), 0, mode)
    except _DamagedError as error:
        raise error.reason from None


def centered(image: Image.Image, how: DataSettings) -> Image.Image:
    """The square in the middle of an image whose side is ``how.center_share`` of the shorter one, brought to
    ``how.image_size`` pixels by bilinear filtering; the image as it is where no size is given."""
    if how.image_size is None:
        return image
    side, size = how.center_share * min(image.size), (how.image_size, how.image_size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize(size, Image.Resampling.BILINEAR, (left, top, left + side, top + side))


class _DamagedError(Exception):
    """An image that cannot be read, and why."""

    def __init__(self, reason: SettingError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Images:
    """The encoded images of one data set, which become images of one mode."""

    def __init__(self, read: Callable[[int], bytes], name: Callable[[int], str], how: DataSettings) -> None:
        self._read, self._name, self.how = read, name, how
        self.mode = {"gray": "L", "rgb": "RGB"}.get(how.channels, "")
        """L or RGB; as the first image has it, where it is not set."""
        self.first_name = ""

    def first(self, count: int) -> Image.Image:
        """The first image that can be decoded."""
        damaged = []
        for i in range(count):
            try:
                image = self.opened(i)
                mode = self.mode or ("L" if _is_gray(image) else "RGB")
                image = centered(self.decoded(image, i, mode), self.how)
            except _DamagedError as error:
                damaged.append(error.reason)
                continue
            self.mode, self.first_name = mode, self._name(i)
            return image
        raise all_damaged(damaged)

    def image(self, i: int, first: Image.Image) -> tuple[Image.Image, bool]:
        """Image i, and whether it was gray; unread where its size cannot be that of the first."""
        image = self.opened(i)
        was_gray = _is_gray(image)
        if self.how.image_size is not None or sorted(image.size) == sorted(first.size):
            image = centered(self.decoded(image, i, self.mode), self.how)
        return image, was_gray

    def opened(self, i: int) -> Image.Image:
        """Image i, unread."""
        try:
            data = self._read(i)
        except SettingError as error:
            raise _DamagedError(error) from None
        try:
            image = Image.open(io.BytesIO(data))
            bits = _bits(image, data)
        except Exception as error:  # codecs fail on bad bytes with errors of many classes
            raise _DamagedError(_undecodable(self._name(i), error)) from None
        if bits > (16 if self.how.sixteen_bit == "scale" else 8):
            kind = f"mode {image.mode}" if image.mode.startswith(("I", "F")) else f"{bits} bits per channel"
            accepted = "images of 8 bits per channel; of 16 with data.sixteen_bit scale"
            raise SettingError("data.source", f"{self._name(i)} of {kind}", accepted)
        return image

    def decoded(self, image: Image.Image, i: int, mode: str) -> Image.Image:
        """Image i of :meth:`opened`, upright and of a mode."""
        try:
            image.load()
            if image.mode.startswith(
                "I"
            ):  # Pillow would clip 16 bits; those of other modes it scales so itself
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if (turn := _UPRIGHT.get(_orientation(image))) is not None:
                image = image.transpose(turn)
            return image if image.mode == mode else image.convert(mode)
        except Exception as error:
            raise _DamagedError(_undecodable(self._name(i), error)) from None


def _is_gray(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per channel of an image that is not loaded, from which Pillow may make 8 without a word."""
    tiles = [(tile[0], tile[3]) for tile in getattr(image, "tile", ())]
    if image.mode.startswith("I;16") or any(";16" in str(args) for _, args in tiles):
        return 16
    if image.mode in ("I", "F"):
        return 32
    if any(codec == "ppm" and isinstance(args, tuple) and args[-1] > 255 for codec, args in tiles):
        return 16
    marks = {"JPEG2000": (b"\xff\x4f\xff\x51", 42, 1), "AVIF": (b"pixi", 9, 0)}
    mark, behind, below = marks.get(image.format or "", (b"", 0, 0))
    at = data.find(mark) if mark else -1
    return (data[at + behind] & 0x7F) + below if at >= 0 else 8


def _empty(shape: tuple[int, int, int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Room for all images.

    Raises:
        SettingError: there is not enough memory for them.
    """
    _check_fits(shape)
    try:
        return np.empty(shape, dtype=np.uint8)
    except MemoryError:
        raise _too_large(shape, 0) from None


def _check_fits(shape: tuple[int, int, int, int]) -> None:
    available = available_memory()
    if available is not None and _COPIES * math.prod(shape) > available:
        raise _too_large(shape, available)


def _too_large(shape: tuple[int, int, int, int], available: int) -> TooLargeError:
    count, channels, height, width = shape
    given = (
        f"{count} images of {width}x{height} pixels and {channels} channel{'s' * (channels > 1)}, which take "
        f"{in_words(math.prod(shape))} of memory, and as much again when they are split"
    )
    accepted = f"images that fit into the {in_words(available)} that are free: fewer or smaller ones"
    return TooLargeError("data.source", given, accepted)


def _without(out: np.ndarray[Any, Any], damaged: Container[int]) -> np.ndarray[Any, Any]:
    """The images that are not damaged, in the same memory."""
    if not damaged:
        return out
    kept = [i for i in range(len(out)) if i not in damaged]
    for place, i in enumerate(kept):
        out[place] = out[i]
    return out[: len(kept)]


def all_damaged(errors: list[SettingError]) -> SettingError:
    """One error for all damaged images."""
    if len(errors) == 1:
        return errors[0]
    named = ", ".join(str(error.given) for error in errors[:_MOST_NAMED])
    more = f" and {len(errors) - _MOST_NAMED} more" if len(errors) > _MOST_NAMED else ""
    accepted = "images that can be decoded; data.skip_damaged true leaves the others out"
    return SettingError("data.source", f"{len(errors)} damaged images: {named}{more}", accepted)


def _remarks(images: _Images, damaged: list[str], count: int, converted: int) -> Iterator[str]:
    if damaged:
        more = ", ..." if len(damaged) > 10 else ""
        yield f"{len(damaged)} of {count} images are damaged and left out: {', '.join(damaged[:10])}{more}"
    if converted and images.how.channels == "first":
        was, made = ("in color", "gray") if images.mode == "L" else ("gray", "in color")
        yield f"{converted} of {count} images are {was} and were made {made}, as {images.first_name} is"


def _orientation(image: Image.Image) -> int:
    """The EXIF tag of an image; 1, upright, where there is none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged tags fail in any way, and say nothing about the pixels
        return 1


def _undecodable(name: str, error: Exception) -> SettingError:
    reason = "not a known format" if type(error).__name__ == "UnidentifiedImageError" else str(error)
    return SettingError("data.source", f"{name} ({reason})", "images that can be decoded")


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
