"""CIFAR-10 and CIFAR-100 as their authors publish them and torchvision unpacks them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.data.base import Split, split
from softdefend.data.raw import RawData
from softdefend.data.settings import DataSettings
from softdefend.data.sources.base import SOURCES, Source
from softdefend.data.sources.unpickle import load

_CIFAR10, _CIFAR100 = "cifar-10-batches-py", "cifar-100-python"


@SOURCES.register("cifar")
class Cifar(Source):
    """CIFAR-10 or CIFAR-100, in a folder of its published name or under any other."""

    address = f"a folder {_CIFAR10} or {_CIFAR100}"
    columns = ("label_column",)

    def recognizes(self, address: str, path: Path) -> bool:
        return path.is_dir() and find(path) is not None

    def read(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        return read_folder(find(path) or path, settings.label_column)


def find(path: Path) -> Path | None:
    """The folder with the batches: ``path``, or the one inside it that carries the published name."""
    for folder in (path, path / _CIFAR10, path / _CIFAR100):
        if (folder / "batches.meta").is_file() or (folder / "data_batch_1").is_file():
            return folder
        if (folder / "train").is_file() and (folder / "meta").is_file():
            return folder
    return None


def read_folder(folder: Path, label_column: str | None) -> RawData:
    """Read images [n, 3, 32, 32] uint8 and labels, in the published order.

    CIFAR-10 has the files ``data_batch_1..5``, ``test_batch`` and ``batches.meta``, CIFAR-100 ``train``,
    ``test`` and ``meta``.

    Args:
        folder: as :func:`find` gave it.
        label_column: CIFAR-100: ``fine_label`` (100 classes, the default) or ``coarse_label`` (20).

    Raises:
        SettingError: a missing, damaged or unsafe file.
    """
    if not (folder / "meta").is_file():
        if label_column not in (None, "label"):
            raise SettingError("data.label_column", label_column, "label, for CIFAR-10")
        train, test, meta, kind = (
            [f"data_batch_{i}" for i in range(1, 6)],
            "test_batch",
            "batches.meta",
            "label",
        )
        names_key = "label_names"
    else:
        kind = label_column or "fine_label"
        if kind not in ("fine_label", "coarse_label"):
            raise SettingError("data.label_column", label_column, "fine_label | coarse_label, for CIFAR-100")
        train, test, meta = ["train"], "test", "meta"
        names_key = f"{kind}_names"
    missing = [name for name in (*train, test, meta) if not (folder / name).is_file()]
    if missing:
        every = ", ".join([*train, test, meta])
        raise SettingError("data.source", f"{folder} without {missing[0]}", f"all of {every}")
    classes = _names(folder / meta, names_key)
    train_split = _split([folder / name for name in train], f"{kind}s")
    return RawData(folder.resolve().name, train_split, _split([folder / test], f"{kind}s"), classes)


def _names(path: Path, key: str) -> tuple[str, ...]:
    names = load(path).get(key)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise SettingError("data.source", f"{path} without {key}", "a list of class names")
    return tuple(os.fsdecode(name) for name in names)


def _split(files: list[Path], labels_key: str) -> Split:
    images: list[Tensor] = []
    labels: list[int] = []
    for path in files:
        content = load(path)
        pixels, own = content.get("data"), content.get(labels_key)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
            raise SettingError("data.source", f"{path} without image data", "data: a uint8 array [n, 3072]")
        own = own.tolist() if isinstance(own, np.ndarray) else own
        whole = isinstance(own, list) and all(type(x) is int and -(2**63) <= x < 2**63 for x in own)
        if not isinstance(own, list) or not whole or len(own) != len(pixels):
            raise SettingError("data.source", f"{path} without usable {labels_key}", "one integer per image")
        images.append(torch.from_numpy(pixels.copy()))  # the bytes of a pickle are not writable
        labels += own
    return split(torch.cat(images).view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64))
