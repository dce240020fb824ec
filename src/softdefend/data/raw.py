"""What a data source gives: its data as they are, before splits, label noise and subsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from softdefend.core.errors import SettingError, printable
from softdefend.data.base import Split


@dataclass(frozen=True, eq=False)
class RawData:
    """A source's own training and test data, in the source's order.

    Attributes:
        name: short name for tables.
        train: all data that are not the source's own test split.
        test: None where the source has no test split.
        classes: class names.
        notes: plain values for the run's record.
        first_label: what the source has for class 0 in its labels, and in files of labels in its order.

    Raises:
        SettingError: labels without a class, one class only, test images of another shape.
    """

    name: str
    train: Split
    test: Split | None
    classes: tuple[str, ...]
    notes: Mapping[str, object] = field(default_factory=dict)
    first_label: int = 0

    def __post_init__(self) -> None:
        # Names come from outside, and go into files, pages and terminals.
        object.__setattr__(self, "name", printable(self.name))
        object.__setattr__(self, "classes", tuple(map(printable, self.classes)))
        for part, split in (("training", self.train), ("test", self.test)):
            if split is not None:
                self._check_labels(part, split)
        if self.train.labels.min() == self.train.labels.max():
            only = self.classes[int(self.train.labels[0])]
            raise SettingError(
                "data.source",
                f"{self.name} with the only class {only}",
                "training images of at least 2 classes",
            )
        if self.test is not None and self.test.images.shape[1:] != self.train.images.shape[1:]:
            shapes = [list(split.images.shape[1:]) for split in (self.test, self.train)]
            raise SettingError(
                "data.source", f"test images of shape {shapes[0]}", f"training's shape {shapes[1]}"
            )

    def _check_labels(self, part: str, split: Split) -> None:
        outside = (split.labels < 0) | (split.labels >= len(self.classes))
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            if (int(split.labels.min()), int(split.labels.max())) == (1, len(self.classes)):
                raise SettingError(
                    "data.source",
                    f"labels 1..{len(self.classes)} in the {part} data of {self.name}, which count from one",
                    f"labels in 0..{len(self.classes) - 1}, one for each of {len(self.classes)} classes",
                )
            raise SettingError(
                "data.source",
                f"label {int(split.labels[row])} at row {row} of the {part} data of {self.name}",
                f"labels in 0..{len(self.classes) - 1}, one for each of {len(self.classes)} classes",
            )


class Labels(NamedTuple):
    """Labels [n] int64 of a split whose images have not been looked at."""

    labels: Tensor


def number_classes(
    train: Split | Labels, test: Split | Labels | None, labels_name: str = "data.label_column", first: int = 0
) -> tuple[str, ...]:
    """Class names "0", "1", ... up to the largest label, for data that come without names.

    Args:
        train, test: a source's own splits.
        labels_name: what the user knows the labels of the test split by.
        first: what the source calls label 0. Names and messages count from it.

    Raises:
        SettingError: a label that is not below the number of images, so is hardly a class; a test label that
            no training image has.
    """
    largest = max(int(split.labels.max()) for split in (train, test) if split is not None)
    n = sum(len(split.labels) for split in (train, test) if split is not None)
    if largest >= n:
        raise SettingError(
            "data.label_column", f"label {first + largest} among {n} images", "classes numbered from 0"
        )
    if test is not None:
        unknown = ~torch.isin(test.labels, train.labels)
        if bool(unknown.any()):
            row = int(unknown.nonzero()[0])
            label = first + int(test.labels[row])
            raise SettingError(
                labels_name,
                f"label {label} at row {row} of the test data, which no training image has",
                "test labels that training has, or named classes",
            )
    return tuple(str(first + i) for i in range(largest + 1))
