from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from picture_tools import encode, planes

from softdefend.core.errors import SettingError
from softdefend.data import DataSettings
from softdefend.data.sources import RawData, read


def write(root: Path, pictures: np.ndarray, names: list[str]) -> Path:
    for picture, name in zip(pictures, names, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(picture))
    return root


def raw(root: Path) -> RawData:
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


@pytest.mark.parametrize("unreadable", ["pets", "dog", "deeper"])
def test_a_folder_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    root = write(tmp_path / "pets", pictures, ["cat/1.png", "owl/1.png", "dog/2.png", "dog/deeper/3.png"])
    scan = os.scandir

    def refuse(path: Path) -> object:
        if os.path.basename(path) == unreadable:
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        SettingError, match=rf"{unreadable} \(Permission denied\); accepted: folders and files"
    ):
        raw(root)


def test_hidden_folders_are_passed_over(tmp_path: Path, pictures: np.ndarray) -> None:
    names = ["a/1.png", "b/2.png", "b/.thumbnails/2.png", "b/deeper/.ipynb_checkpoints/x/3.png"]
    assert len(raw(write(tmp_path, pictures, names)).train) == 2


def test_linked_folders_are_followed_and_each_is_read_once(tmp_path: Path, pictures: np.ndarray) -> None:
    root = write(tmp_path / "pets", pictures, ["cat/own/1.png", "dog/5.png"])
    elsewhere = write(tmp_path / "elsewhere", pictures[2:], ["z/2.png", "z/inner/3.png"])
    for link in ("a", "x"):
        (root / "cat" / link).symlink_to(elsewhere / "z")
    (root / "cat" / "again").symlink_to(root / "cat" / "own")
    found = raw(root)
    assert found.train.labels.tolist() == [0, 0, 0, 1]
    # In the order of the paths by which they are reached: a/2, a/inner/3, own/1.
    np.testing.assert_array_equal(found.train.images.numpy(), planes(pictures)[[2, 3, 0, 1]])


def test_links_in_a_circle_bring_nothing(tmp_path: Path, pictures: np.ndarray) -> None:
    root = write(tmp_path / "pets", pictures, ["cat/deep/1.png", "dog/2.png"])
    (root / "cat" / "deep" / "up").symlink_to(root / "cat")
    (root / "cat" / "top").symlink_to(root)
    (root / "cat" / "itself").symlink_to(root / "cat" / "itself")
    (root / "cat" / "nowhere.png").symlink_to(root / "gone.png")
    (root / "whole").symlink_to(root)
    found = raw(root)
    assert found.classes == ("cat", "dog")
    assert found.train.labels.tolist() == [0, 1]


def test_files_are_in_the_order_of_their_paths(tmp_path: Path, pictures: np.ndarray) -> None:
    names = ["a/b/1.png", "a/b-/2.png", "a/b.png", "a/B/3.png", "a/10.png", "a/9.png"]
    root = write(tmp_path, pictures, [*names, "z/0.png"])
    expected = [names.index(str(path.relative_to(root))) for path in sorted(root / name for name in names)]
    np.testing.assert_array_equal(raw(root).train.images[:6].numpy(), planes(pictures)[expected])


def test_split_folders_may_be_capitalised(tmp_path: Path, pictures: np.ndarray) -> None:
    found = raw(write(tmp_path, pictures, ["Train/a/1.png", "Train/b/2.png", "TEST/b/3.png"]))
    assert found.classes == ("a", "b")
    assert found.test is not None
    assert found.test.labels.tolist() == [1]


def test_two_folders_of_one_split_are_refused(tmp_path: Path, pictures: np.ndarray) -> None:
    write(tmp_path, pictures, ["Train/a/1.png", "train/b/2.png"])
    with pytest.raises(
        SettingError, match=r"with (Train and train|train and Train), which are the same split"
    ):
        raw(tmp_path)


@pytest.mark.parametrize("name", ["train", "Train"])
def test_a_class_called_train_is_said_to_be_read_as_a_split(
    tmp_path: Path, pictures: np.ndarray, name: str
) -> None:
    write(tmp_path, pictures, [f"{name}/1.png", "test/2.png", "walk/3.png"])
    with pytest.raises(
        SettingError, match=f"whose folder {name} was read as the training split.* a class called train needs"
    ):
        raw(tmp_path)


def test_classes_beside_a_train_folder_are_not_left_out_unsaid(tmp_path: Path, pictures: np.ndarray) -> None:
    write(tmp_path, pictures, ["Bus/1.png", "Car/2.png", "Train/steam/3.png", "Train/diesel/4.png"])
    with pytest.raises(
        SettingError, match="with images in Bus beside Train, which was read as the training split"
    ):
        raw(tmp_path)
    assert raw(tmp_path / "Train").classes == ("diesel", "steam")
