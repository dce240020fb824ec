from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.data import DataBundle, DataSettings, Split, from_tensors, load
from softdefend.data.sources import read


def numbered_images(n: int = 400, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that carry their own position, so that it can be told where each went."""
    position = torch.arange(n)
    images = torch.stack([position // 256, position % 256], dim=1).to(torch.uint8)
    return images.view(n, 1, 1, 2), position % classes


def positions(split: Split) -> list[int]:
    high, low = split.images.flatten(1).long().unbind(dim=1)
    return (high * 256 + low).tolist()


def same(one: DataBundle, other: DataBundle) -> bool:
    pairs = zip(
        (one.train, one.validation, one.test), (other.train, other.validation, other.test), strict=True
    )
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


def test_splits_are_disjoint_complete_and_by_class() -> None:
    bundle = from_tensors(*numbered_images(), validation=40, test_fraction=0.25)
    parts = (bundle.train, bundle.validation, bundle.test)
    assert [len(part) for part in parts] == [260, 40, 100]
    assert sorted(at for part in parts for at in positions(part)) == list(range(400))
    for part in parts:
        assert torch.equal(torch.tensor(positions(part)) % 4, part.labels)
        assert torch.bincount(part.labels).tolist() == [len(part) // 4] * 4


def test_a_given_test_set_is_left_as_it_is() -> None:
    images, labels = numbered_images()
    bundle = from_tensors(images[:300], labels[:300], images[300:], labels[300:], validation=20)
    assert positions(bundle.test) == list(range(300, 400))
    assert sorted(positions(bundle.train) + positions(bundle.validation)) == list(range(300))


def test_the_split_follows_its_seed() -> None:
    made = [from_tensors(*numbered_images(), split_seed=seed) for seed in (0, 0, 1)]
    assert same(made[0], made[1])
    assert made[0].fingerprint == made[1].fingerprint
    for part in ("validation", "test"):
        assert positions(getattr(made[0], part)) != positions(getattr(made[2], part))


@pytest.mark.parametrize(
    ("part", "first", "digest"),
    [
        ("train", [0, 2, 5, 7, 8, 19, 20, 21, 23, 27, 28, 29], "b64a928a7292901d"),
        ("validation", [4, 9, 33, 36, 39, 51, 60, 74, 80, 85, 89, 94], "6e9f25aad5064513"),
        ("test", [1, 3, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18], "439e77042ada20b2"),
    ],
)
def test_the_splits_of_the_demo_are_those_of_the_published_figures(
    part: str, first: list[int], digest: str
) -> None:
    settings = DataSettings(test_fraction=0.4435, validation=200, train_size=800)  # of digits_demo.yaml
    at = {image.numpy().tobytes(): i for i, image in enumerate(read(settings).train.images)}
    found = [at[image.numpy().tobytes()] for image in getattr(load(settings), part).images]
    assert found[:12] == first
    assert hashlib.sha256(repr(found).encode()).hexdigest().startswith(digest)


def test_held_out_splits_of_small_classes_follow_the_seed_and_say_which_classes_they_lack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images, labels = numbered_images(600, classes=300)
    with caplog.at_level(logging.INFO, "softdefend"):
        splits = [from_tensors(images, labels, validation=30, split_seed=seed) for seed in (0, 1)]
    for part, size in (("test", 120), ("validation", 30)):
        one, other = (set(getattr(bundle, part).labels.tolist()) for bundle in splits)
        assert len(one) == len(other) == size
        assert max(one) > 200
        assert len(one & other) < 0.7 * size  # 0.4 and 0.1 by chance
    assert caplog.messages[:2] == [
        "the test split has fewer images (120) than there are classes (300): it has none of 180 of them",
        "the validation split has fewer images (30) than there are classes (300): it has none of 270 of them",
    ]


def test_by_default_a_tenth_is_held_out_for_validation() -> None:
    images, labels = numbered_images()
    assert len(from_tensors(images, labels, images, labels).validation) == 40
    assert len(from_tensors(images[:8], labels[:8], images, labels).validation) == 1


def test_the_fingerprint_sees_every_training_label_and_pixel() -> None:
    images, labels = numbered_images()

    def fingerprint(images: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> str:
        return from_tensors(images, labels, *numbered_images(8), validation=40, split_seed=seed).fingerprint

    changed_label, changed_pixel = labels.clone(), images.clone()
    changed_label[7] = 2
    changed_pixel[7, 0, 0, 0] += 1
    prints = {
        fingerprint(images, labels),
        fingerprint(images, changed_label),
        fingerprint(changed_pixel, labels),
        fingerprint(images, labels, seed=1),
    }
    assert len(prints) == 4
    assert all(len(text) == 64 and int(text, 16) for text in prints)
    assert fingerprint(images.float() / 255, labels) == fingerprint(images, labels)


def test_a_smaller_training_set_leaves_the_other_splits_alone() -> None:
    whole, small = (load(DataSettings(validation=150, train_size=size)) for size in (None, 100))
    assert len(small.train) == 100
    assert torch.equal(whole.validation.images, small.validation.images)
    assert torch.equal(whole.test.images, small.test.images)
    known = {image.numpy().tobytes() for image in whole.train.images}
    assert all(image.numpy().tobytes() in known for image in small.train.images)
    counts = torch.bincount(small.train.labels, minlength=10)
    assert counts.min() >= 9
    assert counts.max() <= 11


def test_drawn_noise_is_exact_and_keeps_the_clean_labels_and_the_other_splits() -> None:
    clean = load(DataSettings(validation=100, train_size=500))
    noisy = load(DataSettings(validation=100, train_size=500, noise="symmetric", noise_rate=0.3))
    assert torch.equal(noisy.train.images, clean.train.images)
    assert noisy.train.clean_labels is not None
    assert torch.equal(noisy.train.clean_labels, clean.train.labels)
    assert int((noisy.train.labels != clean.train.labels).sum()) == 150
    assert torch.equal(noisy.validation.labels, clean.validation.labels)
    assert torch.equal(noisy.test.labels, clean.test.labels)
    assert noisy.notes["noise_measured"] == {"train": 0.3, "validation": 0.0}
    assert noisy.fingerprint != clean.fingerprint
    assert clean.train.clean_labels is None


def test_noisy_validation_labels_on_request() -> None:
    settings = {"validation": 100, "noise": "symmetric", "noise_rate": 0.3}
    one = load(DataSettings(**settings))
    both = load(DataSettings(**settings, noise_validation=True))
    assert torch.equal(one.train.labels, both.train.labels)
    assert both.validation.clean_labels is not None
    assert torch.equal(both.validation.clean_labels, one.validation.labels)
    assert int((both.validation.labels != one.validation.labels).sum()) == 30
    assert torch.equal(both.test.labels, one.test.labels)


def test_the_noise_follows_its_own_seed() -> None:
    def labels(noise_seed: int) -> torch.Tensor:
        return load(DataSettings(noise="symmetric", noise_rate=0.3, noise_seed=noise_seed)).train.labels

    assert torch.equal(labels(0), labels(0))
    assert not torch.equal(labels(0), labels(1))


def test_labels_from_a_file_are_in_the_order_of_the_source(hub_folder: Path, tmp_path: Path) -> None:
    clean = np.arange(9) % 3
    np.savez(tmp_path / "noise.npz", mine=(clean + (np.arange(9) >= 5)) % 3, clean_label=clean)
    settings = DataSettings(
        str(hub_folder), validation=3, noise="file", noise_file=str(tmp_path / "noise.npz"), noise_key="mine"
    )
    bundle = load(settings)
    plain = load(DataSettings(str(hub_folder), validation=3))
    order = {image.numpy().tobytes(): i for i, image in enumerate(_in_order(hub_folder))}
    at = [order[image.numpy().tobytes()] for image in bundle.train.images]
    assert bundle.train.labels.tolist() == [(i % 3 + (i >= 5)) % 3 for i in at]
    assert torch.equal(bundle.validation.labels, plain.validation.labels)
    assert torch.equal(bundle.test.labels, plain.test.labels)


def _in_order(folder: Path) -> torch.Tensor:
    return read(DataSettings(str(folder))).train.images


def test_asymmetric_noise_is_refused_on_digits() -> None:
    with pytest.raises(SettingError, match=r"data\.noise: got asymmetric with classes 0, 1, 2, 3, 4, \.\.\."):
        load(DataSettings(noise="asymmetric", noise_rate=0.4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DataSettings(validation=1438), "data.validation: got 1438; accepted: fewer than the 1438 images"),
        (
            DataSettings(validation=438, train_size=1001),
            "data.train_size: got 1001; accepted: at most the 1000",
        ),
        (DataSettings(train_size=1), "data.train_size: got 1, which leaves 1 image of one class"),
        (DataSettings(validation=1437), "data.validation: got 1437, which leaves 1 image of one class"),
        (
            DataSettings(validation=1, test_fraction=0.9995),
            r"data.test_fraction: got 0.9995, which leaves 1 image of one class .* of at least 2 classes",
        ),
    ],
)
def test_splits_that_do_not_fit_are_refused(settings: DataSettings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        load(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(8, dtype=torch.int64)}, "tensors with the only class 0"),
        (
            {"classes": ("a", "b")},
            "label 2 at row 2 of the training data of tensors; accepted: labels in 0..1",
        ),
        ({"labels": torch.arange(8) / 2}, "labels: got float32"),
        ({"images": torch.full((8, 1, 2, 2), float("nan"))}, "images: got pixel nan in image 0"),
        ({"images": torch.full((8, 1, 2, 2), 255.0)}, "images: got pixel 255 in image 0"),
        (
            {"test_images": torch.zeros(2, 1, 2, 2)},
            "test_images: got only one of test_images and test_labels",
        ),
        (
            {"test_images": torch.zeros(2, 1, 2, 2) - 1, "test_labels": torch.tensor([0, 1])},
            "test_images: got pixel -1 in image 0",
        ),
        (
            {"test_images": torch.zeros(2, 1, 2, 2), "test_labels": torch.tensor([0.0, 1.0])},
            "test_labels: got float32",
        ),
        (
            {"test_images": torch.zeros(2, 3, 2, 2), "test_labels": torch.tensor([0, 1])},
            r"test images of shape \[3, 2, 2\]",
        ),
        (
            {
                "test_images": torch.zeros(3, 1, 2, 2),
                "test_labels": torch.tensor([0, 1, 5]),
            },
            "test_labels: got label 5 at row 2 of the test data, which no training image has",
        ),
        ({"validation": 0}, "data.validation: got 0"),
        ({"validation": 6}, "data.validation: got 6; accepted: fewer than the 6 images"),
    ],
)
def test_tensors_that_cannot_be_used_are_refused(change: dict[str, object], message: str) -> None:
    good = {"images": torch.zeros(8, 1, 2, 2), "labels": torch.arange(8) % 4}
    with pytest.raises(SettingError, match=message):
        from_tensors(**{**good, **change})  # type: ignore[arg-type]


def test_cifar10_loads_and_comes_from_its_cache_the_second_time(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DataSettings(
        str(shared_data / "cifar10-jpeg"),
        noise="file",
        noise_file=str(shared_data / "cifar10-jpeg" / "cifar10n.npz"),
        noise_key="worse_label",
    )
    first = load(settings)
    monkeypatch.setattr("softdefend.data.sources.parquet.decode", None)  # nothing is decoded again
    second = load(settings)
    assert same(first, second)
    assert first.fingerprint == second.fingerprint
    assert [len(part) for part in (first.train, first.validation, first.test)] == [49_000, 1_000, 10_000]
    assert first.classes[:3] == ("airplane", "automobile", "bird")
    assert torch.bincount(first.validation.labels).tolist() == [100] * 10
    measured = first.notes["noise_measured"]
    assert isinstance(measured, dict)
    assert measured["train"] == pytest.approx(0.4021, abs=0.002)  # Wei et al., table 1: 40.21%
