"""Encoded images (PNG, JPEG, ...) to one uint8 tensor."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from softdefend.errors import SettingError

_CHUNK = 256
# Below this many pixels Python's own work outweighs the codec's, and threads only queue for the interpreter:
# 50,000 JPEGs of 32x32 take 3.6 s on one thread and 5 s on two. At 224x224 two threads are twice as fast.
_THREADS_FROM_PIXELS = 64 * 64


def decode(count: int, read: Callable[[int], bytes], name: Callable[[int], str], what: str) -> Tensor:
    """Decodes ``count`` images of one size to [n, c, h, w] uint8, in parallel where that pays.

    All images are brought to the mode of the first: grey (c = 1) or RGB (c = 3; transparency is dropped).

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
            if image.size != first.size:  # before decoding: a huge image is refused unread
                raise SettingError(
                    "data.source",
                    f"{name(i)} of {_size(image)} pixels",
                    f"images of one size ({_size(first)}, as {name(0)})",
                )
            pixels = np.frombuffer(_decoded(image, mode, name(i)), np.uint8)
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


def _decoded(image: Image.Image, mode: str, name: str) -> bytes:
    try:
        return (image if image.mode == mode else image.convert(mode)).tobytes()
    except Exception as error:
        raise _undecodable(name, error) from None


def _undecodable(name: str, error: Exception) -> SettingError:
    # Codecs fail on bad bytes with errors of many classes; whichever it is, the image is what is wrong.
    reason = "not a known format" if type(error).__name__ == "UnidentifiedImageError" else str(error)
    return SettingError("data.source", f"{name} ({reason})", "images that can be decoded")


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
