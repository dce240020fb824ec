"""Extra training images: the setting ``data.extra``, and what they have to do with the other data."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from softdefend.core.digest import checksum
from softdefend.core.errors import SettingError
from softdefend.data.base import DataBundle, Extra, Split
from softdefend.data.raw import RawData
from softdefend.data.settings import DataSettings
from softdefend.data.sources import read


def read_extra(settings: DataSettings) -> RawData | None:
    """The data that ``data.extra`` names; None where it names none.

    Raises:
        SettingError: a source that does not exist or cannot be read.
    """
    if settings.extra is None:
        return None
    try:
        return read(DataSettings(settings.extra, cache=settings.cache))
    except SettingError as error:
        name = error.setting.replace("data.source", "data.extra")
        raise SettingError(name, error.given, error.accepted) from error


def with_extra(bundle: DataBundle, raw: RawData | None, fraction: float) -> DataBundle:
    """The bundle with extra training images: all of a source but its test split.

    Labels are matched by the names of classes; by number where one of the two has numbers for names.

    Raises:
        SettingError: images of another shape, or classes that the bundle does not have.
    """
    if raw is None:
        return bundle
    images = bundle.train.images, bundle.validation.images, raw.train.images
    if not all(isinstance(part, Tensor) for part in images):
        raise SettingError("data.extra", "extra images beside streamed ones", "data.residence auto or host")
    wanted, shape = bundle.train.images.shape[1:], raw.train.images.shape[1:]
    if shape != wanted:
        raise SettingError("data.extra", f"images of shape {list(shape)}", f"training's shape {list(wanted)}")
    extra = Split(raw.train.images, _matched(raw, bundle.classes))
    parts = zip(("train", "validation", "extra"), (bundle.train, bundle.validation, extra), strict=True)
    digest = checksum(
        (f"{name}.{what}", value)
        for name, part in parts
        for what, value in (("images", part.images), ("labels", part.labels))
        if isinstance(value, Tensor)
    )
    notes = {**bundle.notes, "extra": f"{len(extra)} images of {raw.name}, {fraction:g} of every batch"}
    return replace(bundle, extra=Extra(extra, fraction), fingerprint=digest, notes=notes)


def _matched(raw: RawData, classes: tuple[str, ...]) -> Tensor:
    """Labels of the source as positions in ``classes``."""
    labels = raw.train.labels
    if any(_are_numbers(names) for names in (raw.classes, classes)):
        if int(labels.max()) >= len(classes):
            given = f"label {int(labels.max())} in {raw.name}"
            raise SettingError("data.extra", given, f"labels in 0..{len(classes) - 1}")
        return labels
    for label in sorted(set(labels.tolist())):
        if raw.classes[label] not in classes:
            given = f"the class {raw.classes[label]} in {raw.name}"
            raise SettingError("data.extra", given, f"training's classes: {', '.join(classes)}")
    number = [classes.index(name) if name in classes else -1 for name in raw.classes]
    return torch.tensor(number)[labels]


def _are_numbers(names: tuple[str, ...]) -> bool:
    return all(name.isdigit() for name in names)
