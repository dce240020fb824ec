from __future__ import annotations

import re

import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.data import DataBundle, Split, split

LABELS = torch.tensor([0, 1, 0, 1])


def eight_bit() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multiples_of_one_255th_are_stored_as_uint8(dtype: torch.dtype) -> None:
    images = eight_bit()
    stored = split(images.to(dtype) / 255, LABELS).images
    assert stored.dtype == torch.uint8
    assert torch.equal(stored, images)


def test_one_pixel_between_levels_keeps_all_as_float() -> None:
    images = eight_bit().float() / 255
    images[3, 2, 4, 5] = 0.5 / 255
    stored = split(images, LABELS).images
    assert stored.dtype == torch.float32
    assert torch.equal(stored, images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type_become_int64(dtype: torch.dtype) -> None:
    labels = split(eight_bit(), LABELS.to(dtype)).labels
    assert labels.dtype == torch.int64
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.001, 1.001])
def test_bad_pixels_are_refused_by_position(value: float) -> None:
    images = eight_bit().float() / 255
    images[2, 1, 0, 3] = value
    with pytest.raises(SettingError, match=rf"pixel {value:.6g} in image 2; accepted: finite pixels"):
        split(images, LABELS)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 5, 6), LABELS, "images: got float32 [4, 5, 6]"),
        (torch.zeros(0, 3, 5, 6), LABELS[:0], "images: got float32 [0, 3, 5, 6]"),
        (torch.zeros(4, 3, 5, 6, dtype=torch.int64), LABELS, "images: got int64"),
        ("pictures", LABELS, "images: got str"),
        (torch.zeros(4, 3, 5, 6), LABELS.float(), "labels: got float32 [4]"),
        (torch.zeros(4, 3, 5, 6), LABELS.bool(), "labels: got bool [4]"),
        (torch.zeros(4, 3, 5, 6), [0, 1, 0, 1], "labels: got list"),
        (torch.zeros(4, 3, 5, 6), LABELS[:3], "labels: got int64 [3]; accepted: one integer label per image"),
        (torch.zeros(4, 3, 5, 6), LABELS[:, None], "labels: got int64 [4, 1]"),
        (torch.zeros(4, 3, 5, 6), LABELS - 1, "labels: got label -1 at row 0"),
    ],
)
def test_tensors_that_cannot_be_used_are_refused(images: object, labels: object, message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)) as caught:
        split(images, labels)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_split_checks_its_clean_labels() -> None:
    with pytest.raises(SettingError, match="clean_labels"):
        Split(eight_bit(), LABELS, LABELS[:2])


def test_subset_keeps_images_and_both_labels_together() -> None:
    images, clean = eight_bit(), torch.tensor([3, 2, 1, 0])
    part = Split(images, LABELS, clean).subset(torch.tensor([3, 0]))
    assert len(part) == 2
    assert torch.equal(part.images, torch.stack([images[3], images[0]]))
    assert part.labels.tolist() == [1, 0]
    assert part.clean_labels is not None
    assert part.clean_labels.tolist() == [0, 3]


def test_a_bundle_cannot_be_changed() -> None:
    part = split(eight_bit(), LABELS)
    bundle = DataBundle("x", part, part, part, ("a", "b"), "0")
    with pytest.raises(AttributeError):
        bundle.name = "y"  # type: ignore[misc]
