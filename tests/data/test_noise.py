from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from softdefend.core.errors import SettingError
from softdefend.data.noise import CIFAR10_CLASSES, asymmetric, from_file, symmetric

LABELS = torch.arange(10).repeat(500)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4567, 0.999])
def test_symmetric_noise_changes_exactly_its_share(rate: float) -> None:
    before = LABELS.clone()
    noisy = symmetric(LABELS, 10, rate, generator())
    assert int((noisy != LABELS).sum()) == round(rate * 5000)
    assert torch.equal(LABELS, before)


def test_symmetric_noise_is_uniform_over_the_other_classes_and_over_samples() -> None:
    noisy = symmetric(LABELS, 10, 0.6, generator())
    wrong = noisy != LABELS
    shifts = torch.bincount((noisy - LABELS)[wrong] % 10, minlength=10)
    assert shifts[0] == 0
    assert chisquare(shifts[1:].numpy()).pvalue > 1e-3
    assert chisquare(torch.bincount(LABELS[wrong], minlength=10).numpy()).pvalue > 1e-3


def test_noise_follows_its_generator() -> None:
    assert torch.equal(symmetric(LABELS, 10, 0.3, generator(1)), symmetric(LABELS, 10, 0.3, generator(1)))
    assert not torch.equal(symmetric(LABELS, 10, 0.3, generator(1)), symmetric(LABELS, 10, 0.3, generator(2)))


def test_two_classes_are_swapped() -> None:
    labels = torch.tensor([0, 1] * 10)
    noisy = symmetric(labels, 2, 0.5, generator())
    assert torch.equal(noisy[noisy != labels], 1 - labels[noisy != labels])


def test_asymmetric_noise_confuses_the_usual_pairs_by_exact_counts() -> None:
    noisy = asymmetric(LABELS, CIFAR10_CLASSES, 0.4, generator())
    moves = np.zeros((10, 10), dtype=int)
    np.add.at(moves, (LABELS.numpy(), noisy.numpy()), 1)
    expected = np.diag([500] * 10)
    pairs = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for source, confused in pairs.items():
        row = names.index(source)
        expected[row, row] = 300
        expected[row, names.index(confused)] = 200
    np.testing.assert_array_equal(moves, expected)


def test_asymmetric_noise_goes_by_name_not_by_position() -> None:
    classes = tuple(name.upper() for name in reversed(CIFAR10_CLASSES))
    noisy = asymmetric(LABELS, classes, 0.4, generator())
    labels, truck, automobile = LABELS, classes.index("TRUCK"), classes.index("AUTOMOBILE")
    assert set(noisy[labels == truck].tolist()) == {truck, automobile}


@pytest.mark.parametrize("classes", [tuple("0123456789"), CIFAR10_CLASSES[:9], (*CIFAR10_CLASSES, "tram")])
def test_asymmetric_noise_needs_the_classes_of_cifar10(classes: tuple[str, ...]) -> None:
    with pytest.raises(SettingError, match=r"data\.noise: got asymmetric with classes"):
        asymmetric(LABELS, classes, 0.4, generator())


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_outside_zero_to_one_are_refused(rate: float) -> None:
    with pytest.raises(SettingError, match=r"data\.noise_rate"):
        symmetric(LABELS, 10, rate, generator())
    with pytest.raises(SettingError, match=r"data\.noise_rate"):
        asymmetric(LABELS, CIFAR10_CLASSES, rate, generator())


CLEAN = torch.tensor([0, 1, 2, 0, 1])
WORSE = np.array([0, 2, 2, 1, 1], dtype=np.uint8)


def saved(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "noise.npz", **arrays)
    return str(folder / "noise.npz")


def test_a_file_gives_its_labels_by_key_or_as_its_only_array(tmp_path: Path) -> None:
    path = saved(tmp_path, worse_label=WORSE, aggre_label=CLEAN.numpy(), clean_label=CLEAN.numpy())
    assert from_file(path, "worse_label", CLEAN, 3).tolist() == WORSE.tolist()
    assert from_file(saved(tmp_path, only=WORSE), None, CLEAN, 3).tolist() == WORSE.tolist()


@pytest.mark.parametrize(
    ("arrays", "key", "message"),
    [
        ({"a": WORSE, "b": WORSE}, "c", "data.noise_key: got c; accepted: one of a, b"),
        ({"a": WORSE, "b": WORSE}, None, "data.noise_key: got None; accepted: one of a, b"),
        ({"a": WORSE[:4]}, "a", "got uint8 [4]"),
        ({"a": WORSE.astype(float)}, "a", "got float64 [5]"),
        ({"a": WORSE[:, None]}, "a", "got uint8 [5, 1]"),
        ({"a": WORSE + 1}, "a", "got label 3 at row 1"),
        ({"a": WORSE.astype(int) - 1}, "a", "got label -1 at row 0"),
        ({"a": WORSE, "clean_label": WORSE}, "a", "clean_label differs from the source's for 2 of 5 images"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], key: str | None, message: str
) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        from_file(saved(tmp_path, **arrays), key, CLEAN, 3)


def test_arrays_of_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    path = saved(tmp_path, a=np.array([Payload()] * 5, dtype=object))
    with pytest.raises(SettingError, match=r"accepted: an \.npz file of plain integer arrays"):
        from_file(path, "a", CLEAN, 3)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_files_that_are_no_archive_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "noise.npz").write_bytes(content)
    with pytest.raises(SettingError, match=r"data\.noise_file"):
        from_file(str(tmp_path / "noise.npz"), None, CLEAN, 3)


def test_a_single_array_file_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "noise.npy", WORSE)
    with pytest.raises(SettingError, match=r"an \.npz file"):
        from_file(str(tmp_path / "noise.npy"), None, CLEAN, 3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nowhere\.npz; accepted: an existing \.npz file"):
        from_file(str(tmp_path / "nowhere.npz"), None, CLEAN, 3)


def test_a_name_that_is_too_long_for_a_file_is_refused_in_one_line() -> None:
    with pytest.raises(SettingError, match=r"data\.noise_file: got x+ \(File name too long\); accepted"):
        from_file("x" * 300, None, CLEAN, 3)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "noise.npz"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(SettingError, match=r"data\.noise_file: got .*noise\.npz.*; accepted: an .*\.npz"):
        from_file(str(path), None, CLEAN, 3)
