from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from picture_tools import encode, planes

from softdefend.data import DataSettings
from softdefend.data.sources import Raw, read
from softdefend.errors import SettingError


def write(root: Path, pictures: np.ndarray, names: list[str]) -> Path:
    for picture, name in zip(pictures, names, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(picture))
    return root


def raw(root: Path) -> Raw:
    return read(DataSettings(str(root)))


def test_classes_and_files_are_taken_by_name(tmp_path: Path, pictures: np.ndarray) -> None:
    names = ["dog/b.png", "cat/z.PNG", "dog/a.png", "cat/deeper/a.png", "owl/x.png"]
    root = write(tmp_path / "pets", pictures, names)
    (root / "dog" / "notes.txt").write_text("not an image")
    (root / "dog" / ".hidden.png").write_text("not an image")
    (root / ".git").mkdir()
    (root / "empty").mkdir()
    found = raw(root)
    assert found.name == "pets"
    assert found.classes == ("cat", "dog", "owl")
    assert found.train.labels.tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_array_equal(found.train.images.numpy(), planes(pictures)[[3, 1, 2, 0, 4]])
    assert found.test is None


@pytest.mark.parametrize("held_out", ["test", "validation", "val"])
def test_train_and_test_folders(tmp_path: Path, pictures: np.ndarray, held_out: str) -> None:
    names = ["train/a/1.png", "train/b/2.png", f"{held_out}/b/3.png"]
    found = raw(write(tmp_path, pictures, names))
    assert found.train.labels.tolist() == [0, 1]
    assert found.test is not None
    assert found.test.labels.tolist() == [1]
    np.testing.assert_array_equal(found.test.images.numpy(), planes(pictures)[2:3])


def test_the_second_reading_is_from_the_cache_until_a_file_changes(
    tmp_path: Path, pictures: np.ndarray, own_cache: Path
) -> None:
    root = write(tmp_path / "pets", pictures, ["a/1.png", "b/2.png"])
    first = raw(root)
    (entry,) = own_cache.iterdir()
    before = entry.stat().st_mtime_ns
    assert raw(root).train.images.equal(first.train.images)
    assert entry.stat().st_mtime_ns == before
    write(root, pictures[5:], ["c/3.png"])
    assert raw(root).classes == ("a", "b", "c")
    assert len(list(own_cache.iterdir())) == 2


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "readme.txt").write_text("nothing here")
    with pytest.raises(
        SettingError, match=r"without images; accepted: class/name\.png or train/class/name\.png"
    ):
        raw(tmp_path)


def test_a_test_class_that_training_lacks_is_refused(tmp_path: Path, pictures: np.ndarray) -> None:
    write(tmp_path, pictures, ["train/a/1.png", "train/b/2.png", "test/c/3.png"])
    with pytest.raises(SettingError, match=r"test class c in .*; accepted: training's classes: a, b"):
        raw(tmp_path)


def test_one_class_only_is_refused(tmp_path: Path, pictures: np.ndarray) -> None:
    with pytest.raises(SettingError, match="only class a"):
        raw(write(tmp_path, pictures, ["a/1.png", "a/2.png"]))


def test_the_image_that_cannot_be_used_is_named(tmp_path: Path, pictures: np.ndarray) -> None:
    root = write(tmp_path, pictures, ["a/1.png", "a/2.png", "b/3.png"])
    (root / "a" / "2.png").write_bytes(encode(np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(SettingError, match=r"got a/2\.png of 9x9 pixels; accepted: images of one size \(7x5"):
        raw(root)
    (root / "a" / "2.png").write_bytes(b"broken")
    with pytest.raises(SettingError, match=r"got a/2\.png \(not a known format\)"):
        raw(root)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="nowhere; accepted: digits, hf:owner/name, or the path"):
        raw(tmp_path / "nowhere")
