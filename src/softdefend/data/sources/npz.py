"""An .npz file with arrays of images and labels, as sets of generated images come."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softdefend.core.errors import SettingError
from softdefend.core.files import check_regular
from softdefend.core.memory import check_memory
from softdefend.data.base import split
from softdefend.data.raw import RawData, number_classes
from softdefend.data.settings import DataSettings
from softdefend.data.sources.base import SOURCES, Source

_IMAGES = ("images", "image", "data", "x")
_LABELS = ("labels", "label", "targets", "y")
_CHANNELS = (1, 3)


@SOURCES.register("npz")
class Npz(Source):
    """Images [n, h, w, c], [n, c, h, w] or [n, h, w], uint8 or floating point in [0, 1], and integer labels
    [n]; no test split. Nothing is unpickled."""

    address = "an .npz file of images and labels"

    def recognizes(self, address: str, path: Path) -> bool:
        return path.suffix == ".npz" and path.is_file()

    def read(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        try:
            check_regular(path)
            check_memory(_unpacked(path), "data.source", f"the arrays of {path.name}")
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                images, labels = (arrays[_choose(arrays, names)] for names in (_IMAGES, _LABELS))
            found = split(torch.from_numpy(_channels_first(images)), torch.from_numpy(labels))
        except SettingError as error:
            if error.setting.startswith("data."):
                raise
            raise SettingError(
                "data.source", f"{path}, {error.setting}: {error.given}", error.accepted
            ) from None
        except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise SettingError("data.source", f"{path} ({error})", self.address) from None
        return RawData(path.stem, found, None, number_classes(found, None))


def _unpacked(path: Path) -> int:
    """Bytes of all arrays."""
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def _choose(arrays: Any, names: tuple[str, ...]) -> str:
    """The first of the names that the file has.

    Raises:
        KeyError: none of them.
    """
    for name in names:
        if name in arrays:
            return name
    raise KeyError(f"no array {' or '.join(names)}; there is {', '.join(arrays) or 'none'}")


def _channels_first(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Images as [n, c, h, w]. Which side is that of channels shows by its length, 1 or 3."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] not in _CHANNELS and images.shape[3] in _CHANNELS:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images
