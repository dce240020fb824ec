from __future__ import annotations

import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.data import Split
from softdefend.data.raw import RawData, number_classes


def part(*labels: int, size: int = 4) -> Split:
    return Split(torch.zeros(len(labels), 3, size, size, dtype=torch.uint8), torch.tensor(labels))


def test_a_label_without_a_class_is_named_by_row_and_split() -> None:
    with pytest.raises(
        SettingError, match=r"label 2 at row 1 of the training data of toy; accepted: labels in 0..1"
    ):
        RawData("toy", part(0, 2, 1), None, ("a", "b"))
    with pytest.raises(SettingError, match="label 3 at row 0 of the test data of toy"):
        RawData("toy", part(0, 1), part(3), ("a", "b"))


def test_one_class_only_is_refused() -> None:
    with pytest.raises(
        SettingError, match="toy with the only class b; accepted: training images of at least 2"
    ):
        RawData("toy", part(1, 1, 1), part(0, 1), ("a", "b"))


def test_test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(
        SettingError, match=r"test images of shape \[3, 5, 5\]; accepted: training's shape \[3, 4, 4\]"
    ):
        RawData("toy", part(0, 1), part(0, 1, size=5), ("a", "b"))


def test_classes_without_names_are_numbered_up_to_the_largest() -> None:
    assert number_classes(part(0, 1, 3), part(1)) == ("0", "1", "2", "3")
    assert number_classes(part(0, 1, 0), None) == ("0", "1")


def test_a_label_that_is_hardly_a_class_is_refused() -> None:
    with pytest.raises(SettingError, match="label 1000000000 among 2 images"):
        number_classes(part(0, 1_000_000_000), None)


def test_a_test_label_that_training_lacks_is_refused() -> None:
    with pytest.raises(SettingError, match="label 2 at row 1 of the test data, which no training image has"):
        number_classes(part(0, 1, 3), part(1, 2))
