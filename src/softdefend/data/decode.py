"""Encoded images (PNG, JPEG, ...) to one uint8 tensor."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from tqdm import tqdm

from softdefend.core.errors import SettingError

_CHUNK = 256
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


def decode(count: int, read: Callable[[int], bytes], name: Callable[[int], str], what: str) -> Tensor:
    """Decode ``count`` images of one size to [n, c, h, w] uint8, in parallel where that pays.

    All images are turned upright as their EXIF orientation says, and brought to the mode of the first: gray
    (c = 1) or RGB (c = 3; transparency is dropped). Sizes are those of the upright images.

    Args:
        count: number of images, >= 1.
        read: the encoded bytes of image i; called from several threads.
        name: how messages call image i.
        what: what the progress bar calls the images. It is only shown on a terminal.

    Raises:
        SettingError: naming the first image that cannot be decoded or has another size than the first.
    """
    first = _open(read(0), name(0))
    mode = "L" if first.mode in ("1", "L", "LA") else "RGB"
    if not first.mode.startswith(("I", "F")):
        first = _decoded(first, mode, name(0))
    width, height = first.size
    out = np.empty((count, len(mode), height, width), dtype=np.uint8)

    def chunk(start: int) -> int:
        stop = min(start + _CHUNK, count)
        for i in range(start, stop):
            image = _open(read(i), name(i))
            if image.mode.startswith(("I", "F")):  # Pillow would clip them to 8 bits
                raise SettingError(
                    "data.source", f"{name(i)} of mode {image.mode}", "images of 8 bits per channel"
                )
            if sorted(image.size) == sorted(first.size):  # a huge image is refused unread
                image = _decoded(image, mode, name(i))
            if image.size != first.size:
                raise SettingError(
                    "data.source",
                    f"{name(i)} of {_size(image)} pixels",
                    f"images of one size ({_size(first)}, as {name(0)})",
                )
            pixels = np.frombuffer(image.tobytes(), np.uint8)
            out[i] = pixels.reshape(height, width, len(mode)).transpose(2, 0, 1)
        return stop - start

    workers = min(os.cpu_count() or 1, 8) if width * height >= _THREADS_FROM_PIXELS else 1
    with ThreadPoolExecutor(workers) as pool, tqdm(total=count, desc=what, unit="img", disable=None) as bar:
        try:
            # In order, so that the error raised is that of the first bad image.
            for done in pool.map(chunk, range(0, count, _CHUNK)):
                bar.update(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(out)


def _open(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:
        raise _undecodable(name, error) from None


def _decoded(image: Image.Image, mode: str, name: str) -> Image.Image:
    try:
        image.load()
        if (turn := _UPRIGHT.get(_orientation(image))) is not None:
            image = image.transpose(turn)
        return image if image.mode == mode else image.convert(mode)
    except Exception as error:
        raise _undecodable(name, error) from None


def _orientation(image: Image.Image) -> int:
    """The EXIF tag of a loaded image; 1, upright, where there is none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged tags fail in any way, and say nothing about the pixels
        return 1


def _undecodable(name: str, error: Exception) -> SettingError:
    # Codecs fail on bad bytes with errors of many classes; whichever it is, the image is what is wrong.
    reason = "not a known format" if type(error).__name__ == "UnidentifiedImageError" else str(error)
    return SettingError("data.source", f"{name} ({reason})", "images that can be decoded")


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
