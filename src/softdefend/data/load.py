"""From settings or tensors to the three splits of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softdefend.core.digest import checksum
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data import noise
from softdefend.data.base import DataBundle, Split, split
from softdefend.data.extra import read_extra, with_extra
from softdefend.data.holdout import complement, draw_by_class
from softdefend.data.raw import RawData, number_classes
from softdefend.data.settings import DataSettings
from softdefend.data.sources import read

_log = logging.getLogger(__name__)


def load(settings: DataSettings) -> DataBundle:
    """Read the source and make the splits of a run.

    In this order: the source's own test split is set aside (``test_fraction`` of the data, where it has
    none); ``validation`` images are held out of the rest; training keeps ``train_size`` of what remains;
    label noise is drawn for the training labels, and for the validation labels if ``noise_validation``, so
    that the rate is exact in each. Splits are drawn by class, by the source's own labels, from
    ``split_seed``: the same images with and without noise. Test images and labels never change and take
    part in no choice.

    Raises:
        SettingError: a source, label file or number that cannot be used.
    """
    raw = read(settings)
    if settings.residence != "auto":
        train, test = (one and replace(one, residence=settings.residence) for one in (raw.train, raw.test))
        assert train is not None
        raw = replace(raw, train=train, test=test)
    if settings.name is not None:
        raw = replace(raw, name=settings.name)
    bundle = _bundle(raw, settings, {"source": settings.source})
    return with_extra(bundle, read_extra(settings), settings.extra_fraction)


def from_tensors(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor | None = None,
    test_labels: Tensor | None = None,
    validation: int | None = None,
    split_seed: int = 0,
    name: str = "tensors",
    classes: Sequence[str] | None = None,
    *,
    test_fraction: float = 0.2,
    extra_images: Tensor | None = None,
    extra_labels: Tensor | None = None,
    extra_fraction: float = 0.7,
) -> DataBundle:
    """Make the splits of a run from tensors, by the rules of :func:`load`.

    Args:
        images: [n, c, h, w], uint8 or floating point in [0, 1].
        labels: [n], any integer type, 0..k - 1.
        test_images, test_labels: the test set, both or neither; without one, ``test_fraction`` is held out.
        validation: images to hold out of the training data; None: a tenth of them, at most 1000.
        split_seed: seed of the splits.
        name: what tables call the data.
        classes: class names; "0", "1", ... if not given.
        test_fraction: share of the images to hold out as the test set where there is none, in (0, 1).
        extra_images, extra_labels: further training images, both or neither.
        extra_fraction: their share of every batch, in (0, 1).

    Raises:
        SettingError: NaN, values outside [0, 1], wrong shapes or types, labels without a class.
    """
    train, test = split(images, labels), None
    if test_images is not None and test_labels is not None:
        test = split(test_images, test_labels, images_name="test_images", labels_name="test_labels")
    elif test_images is not None or test_labels is not None:
        raise SettingError("test_images", "only one of test_images and test_labels", "both or neither")
    names = number_classes(train, test, "test_labels") if classes is None else tuple(classes)
    settings = DataSettings(
        validation=max(1, min(1000, len(train) // 10)) if validation is None else validation,
        test_fraction=test_fraction,
        split_seed=split_seed,
    )
    bundle = _bundle(RawData(name, train, test, names), settings, {"source": "tensors"})
    if extra_images is None and extra_labels is None:
        return bundle
    if extra_images is None or extra_labels is None:
        raise SettingError("extra_images", "only one of extra_images and extra_labels", "both or neither")
    more = split(extra_images, extra_labels, images_name="extra_images", labels_name="extra_labels")
    return with_extra(bundle, RawData("tensors", more, None, number_classes(more, None)), extra_fraction)


def _bundle(raw: RawData, settings: DataSettings, notes: dict[str, object]) -> DataBundle:
    """Make the splits. They are lists of positions first: the images are copied once, at the end."""
    notes = {**notes, **raw.notes}
    labels, n, seed = raw.train.labels, len(raw.train), settings.split_seed
    if empty := sorted(set(range(len(raw.classes))) - set(labels.tolist())):
        named = ", ".join(raw.classes[i] for i in empty[:5]) + (", ..." if len(empty) > 5 else "")
        _log.info("%s: %d of %d classes without images: %s", raw.name, len(empty), len(raw.classes), named)
    test, pool = raw.test, torch.arange(n)
    if test is None:
        count = min(max(1, round(settings.test_fraction * n)), n - 1)
        held_out = draw_by_class(labels, count, stream(seed, "test"))
        test, pool = raw.train.subset(held_out), complement(held_out, n)
        _tell_missing_classes("test", test.labels, labels)
        notes["test_split"] = f"{count} images held out: the source has no test split"
        _check_classes("data.test_fraction", settings.test_fraction, labels[pool])
    if settings.validation >= len(pool):
        raise SettingError(
            "data.validation",
            settings.validation,
            f"fewer than the {len(pool)} images there are for training",
        )
    held_out = draw_by_class(labels[pool], settings.validation, stream(seed, "split"))
    validation_at, train_at = pool[held_out], pool[complement(held_out, len(pool))]
    _check_classes("data.validation", settings.validation, labels[train_at])
    _tell_missing_classes("validation", labels[validation_at], labels[pool])
    if settings.train_size is not None:
        if settings.train_size > len(train_at):
            raise SettingError(
                "data.train_size",
                settings.train_size,
                f"at most the {len(train_at)} images left for training",
            )
        train_at = train_at[draw_by_class(labels[train_at], settings.train_size, stream(seed, "subset"))]
        _check_classes("data.train_size", settings.train_size, labels[train_at])
        _tell_missing_classes("training", labels[train_at], labels[pool])
    train, validation = raw.train.subset(train_at), raw.train.subset(validation_at)
    if settings.noise != "none":
        train = _with_noise(train, train_at, raw, settings, "noise")
        if settings.noise_validation:
            validation = _with_noise(validation, validation_at, raw, settings, "noise-validation")
        notes["noise"] = settings.noise
        notes["noise_measured"] = {"train": _noise(train), "validation": _noise(validation)}
        _check_classes("data.noise", settings.noise, train.labels)
    return DataBundle(raw.name, train, validation, test, raw.classes, _fingerprint(train, validation), notes)


def _check_classes(setting: str, given: object, labels: Tensor) -> None:
    """Refuse a setting that leaves training with one class."""
    if labels.min() == labels.max():
        count = f"{len(labels)} image{'s' if len(labels) > 1 else ''} of one class"
        raise SettingError(
            setting, f"{given}, which leaves {count} for training", "training images of at least 2 classes"
        )


def _tell_missing_classes(name: str, part: Tensor, whole: Tensor) -> None:
    """Say that a split has too few images for one of each class; which classes it has is drawn. Of a single
    image, which some evaluations hold out to hold out nothing, that goes without saying."""
    classes = len(set(whole.tolist()))
    if 1 < len(part) < classes:
        missing = classes - len(set(part.tolist()))
        text = "the %s split has fewer images (%d) than there are classes (%d): it has none of %d of them"
        _log.info(text, name, len(part), classes, missing)


def _with_noise(part: Split, at: Tensor, raw: RawData, settings: DataSettings, name: str) -> Split:
    """The images at positions ``at`` of the source with noisy labels, drawn from the stream ``name``."""
    clean, generator = part.labels, stream(settings.noise_seed, name)
    if settings.noise_file is not None:
        whole = noise.from_file(
            settings.noise_file, settings.noise_key, raw.train.labels, len(raw.classes), raw.first_label
        )
        noisy = whole[at]
    elif settings.noise == "symmetric":
        noisy = noise.symmetric(clean, len(raw.classes), settings.noise_rate, generator)
    else:
        noisy = noise.asymmetric(clean, raw.classes, settings.noise_rate, generator)
    return Split(part.images, noisy, clean, part.residence)


def _noise(part: Split) -> float:
    """Share of labels that differ from the clean ones."""
    return 0.0 if part.clean_labels is None else (part.labels != part.clean_labels).double().mean().item()


def _fingerprint(train: Split, validation: Split) -> str:
    parts = (("train", train), ("validation", validation))
    return checksum(
        item
        for name, part in parts
        for item in ((f"{name}.images", part.identity), (f"{name}.labels", part.labels))
    )
