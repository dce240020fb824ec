"""Images that stay encoded on disk, and look like a tensor to who takes some of them."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.data.decode import centered, picture
from softdefend.data.settings import DataSettings
from softdefend.data.table import Table

_ATTEMPTS = 10
_MOST_WORKERS = 16


@dataclass(frozen=True)
class RandomCrop:
    """A random part of an image, brought to the size of all (Szegedy et al., arXiv 1409.4842): its share of
    the area is uniform in ``scale``, the logarithm of width by height in that of ``ratio``."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def box(self, width: int, height: int, draw: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the part of an image.

        Of ten draws the first that lies within the image; else the largest part in the middle whose ratio is
        allowed.

        Args:
            width, height: of the image.
            draw: seed of this image's draws in this epoch.
        """
        numbers = random.Random(draw)
        logs = [math.log(limit) for limit in self.ratio]
        for _ in range(_ATTEMPTS):
            area = width * height * numbers.uniform(*self.scale)
            ratio = math.exp(numbers.uniform(*logs))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = numbers.randint(0, width - w), numbers.randint(0, height - h)
                return left, top, left + w, top + h
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@dataclass(frozen=True)
class Decoder:
    """Decodes rows of a table. It can be sent to other processes.

    Attributes:
        table: of encoded images.
        mode: L or RGB, of all images.
        size: height and width of what is decoded.
        how: says how images are decoded.
    """

    table: Table
    mode: str
    size: tuple[int, int]
    how: DataSettings

    def middle(self, row: int) -> np.ndarray[Any, Any]:
        """The image of a row as evaluations see it, [c, h, w] uint8; see
        :func:`~softdefend.data.decode.centered`.

        Raises:
            SettingError: it cannot be decoded.
        """
        return self._pixels(centered(self._picture(row), self.how), row)

    def parts(self, row: int, crop: RandomCrop, draws: Iterable[int]) -> Iterator[np.ndarray[Any, Any]]:
        """Random parts of the image of a row, one a draw, each [c, h, w] uint8, by bilinear filtering.

        Raises:
            SettingError: it cannot be decoded.
        """
        image = self._picture(row)
        for draw in draws:
            box = crop.box(*image.size, draw)
            yield self._pixels(image.resize(self.size[::-1], Image.Resampling.BILINEAR, box), row)

    def _picture(self, row: int) -> Image.Image:
        return picture(self.table.content(row), self.table.name(row), self.mode, self.how)

    def _pixels(self, image: Image.Image, row: int) -> np.ndarray[Any, Any]:
        """[c, h, w], a view of [h, w, c]."""
        if image.size != self.size[::-1]:
            given = f"{self.table.name(row)} of {image.width}x{image.height} pixels"
            accepted = f"images of {self.size[1]}x{self.size[0]} pixels, or data.image_size"
            raise SettingError("data.source", given, accepted)
        pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(*self.size, len(self.mode))
        return pixels.transpose(2, 0, 1)


class EncodedImages:
    """Images [n, c, h, w] uint8 of rows of a table, decoded when they are taken.

    Args:
        decoder: of the table.
        rows: [n] int64.
    """

    dtype, ndim = torch.uint8, 4

    def __init__(self, decoder: Decoder, rows: Tensor) -> None:
        self.decoder, self.rows = decoder, rows

    @property
    def shape(self) -> torch.Size:
        """(n, c, h, w)."""
        return torch.Size((len(self.rows), len(self.decoder.mode), *self.decoder.size))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int | slice | Tensor) -> Tensor:
        """The images at some positions, decoded in several threads.

        Raises:
            SettingError: one cannot be decoded.
        """
        rows = self.rows[at.cpu() if isinstance(at, Tensor) else at]
        numbers = rows.reshape(-1).tolist()
        with ThreadPoolExecutor(max(self.workers, 1)) as pool:
            parts = [torch.from_numpy(np.array(part)) for part in pool.map(self.decoder.middle, numbers)]
        empty = torch.empty((0, *self.shape[1:]), dtype=torch.uint8)
        images = torch.stack(parts) if parts else empty
        return images if rows.ndim else images[0]

    @property
    def workers(self) -> int:
        """``data.workers``, or what it comes to for each process on this machine."""
        given = self.decoder.how.workers
        return min(max(_cores() - 1, 1), _MOST_WORKERS) if given is None else given

    def subset(self, index: Tensor) -> EncodedImages:
        """The images at ``index`` [m] int64, in that order; nothing is decoded."""
        return EncodedImages(self.decoder, self.rows[index])

    @property
    def identity(self) -> Tensor:
        """Digests of the encoded images and of how they are decoded, int64: equal ones are equal images."""
        how, digests = self.decoder.how, self.decoder.table.column("digest")[self.rows]
        share = round(how.center_share * 1e9) if how.image_size is not None else 0
        return torch.cat([digests, torch.tensor([*self.shape, share])])


def _cores() -> int:
    """Of this process: where torchrun or this package has started several, its share of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    started = os.environ.get("LOCAL_WORLD_SIZE", "") if "TORCHELASTIC_RUN_ID" in os.environ else ""
    return max(cores // int(started), 1) if started.isdecimal() and int(started) else cores
