"""scikit-learn's handwritten digits: 1,797 real 8x8 images that need no download."""

from __future__ import annotations

from pathlib import Path

import torch

from softdefend.data.base import split
from softdefend.data.raw import RawData
from softdefend.data.settings import DataSettings
from softdefend.data.sources.base import SOURCES, Source


def read_digits() -> RawData:
    """Read images [1797, 1, 8, 8] uint8 and labels; there is no test split.

    Gray levels v in 0..16 of the source become round(v 255 / 16). The source is the test part of Alpaydin and
    Kaynak, "Optical Recognition of Handwritten Digits", UCI (1998).
    """
    from sklearn.datasets import load_digits  # takes a second to import: only where it is used

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    classes = tuple(str(digit) for digit in range(10))
    return RawData("digits", split(images, torch.from_numpy(labels)), None, classes)


@SOURCES.register("digits")
class Digits(Source):
    """scikit-learn's digits."""

    address = "digits"
    priority = 1

    def recognizes(self, address: str, path: Path) -> bool:
        return address == self.address

    def read(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        return read_digits()
