from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_tools import encode, planes

from softdefend.core.errors import SettingError
from softdefend.data import DataSettings
from softdefend.data.sources import RawData, read


def write(root: Path, pictures: np.ndarray, names: list[str]) -> Path:
    for picture, name in zip(pictures, names, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(picture))
    return root


def raw(root: Path, **settings: Any) -> RawData:
    return read(DataSettings(str(root), **settings))


def test_a_test_folder_without_labels_gives_way_to_one_with_them(
    tmp_path: Path, pictures: np.ndarray
) -> None:
    """As in ImageNet."""
    names = ["train/a/1.png", "train/b/2.png", "test/3.png", "val/a/4.png", "val/b/5.png"]
    test = raw(write(tmp_path / "net", pictures, names)).test
    assert test is not None
    np.testing.assert_array_equal(test.images.numpy(), planes(pictures)[3:5])


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


def test_every_usual_suffix_is_read_and_the_rest_is_counted(
    tmp_path: Path, pictures: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "pets"
    kinds = {"1.jfif": "JPEG", "2.JPE": "JPEG", "3.avif": "AVIF", "4.jp2": "JPEG2000", "5.png": "PNG"}
    for name, kind in kinds.items():
        for folder in ("a", "b"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_bytes(encode(np.zeros((64, 64, 3), np.uint8), kind))
    for name in ("a/list.txt", "b/list.txt", "b/6.heic", "b/README"):
        (root / name).write_text("nothing")
    (root / "7.png").write_bytes(encode(pictures[0]))
    with caplog.at_level(logging.INFO, "softdefend"):
        found = raw(root)
    assert torch.bincount(found.train.labels).tolist() == [5, 5]
    left_out = "2 .txt, 1 images outside of the folders of classes, 1 .heic, 1 without a suffix"
    assert f"pets: files that are not read: {left_out}" in caplog.messages
    assert found.notes["files"] == f"2 .jfif, 2 .jpe, 2 .avif, 2 .jp2, 2 .png; not read: {left_out}"


def test_all_damaged_files_are_named_or_left_out(
    tmp_path: Path, pictures: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    root = write(tmp_path / "pets", pictures, ["a/1.png", "a/2.png", "b/3.png", "b/4.png"])
    for name in ("a/1.png", "b/4.png"):
        (root / name).write_bytes((root / name).read_bytes()[:-40])
    with pytest.raises(SettingError, match=r"got 2 damaged images: a/1\.png \(.*, b/4\.png \(.*skip_damaged"):
        raw(root)
    remark = "pets: 2 of 4 images are damaged and left out: a/1.png, b/4.png"
    for _ in range(2):  # decoded, and from the cache
        with caplog.at_level(logging.INFO, "softdefend"):
            found = raw(root, skip_damaged=True)
        assert found.train.labels.tolist() == [0, 1]
        np.testing.assert_array_equal(found.train.images.numpy(), planes(pictures)[1:3])
        assert remark in caplog.messages
        caplog.clear()
    with pytest.raises(SettingError, match="got 2 damaged images"):
        raw(root)  # not from the cache of the others


def test_how_images_are_decoded_is_a_setting(tmp_path: Path, pictures: np.ndarray) -> None:
    root = write(tmp_path, pictures, ["a/2.png", "b/3.png"])
    (root / "a" / "1.png").write_bytes(encode(pictures[0, :, :, 0]))
    shapes = {how: raw(root, channels=how).train.images.shape[1] for how in ("first", "gray", "rgb")}
    assert shapes == {"first": 1, "gray": 1, "rgb": 3}
    assert raw(root).notes["images"] == "2 of 3 images are in color and were made gray, as a/1.png is"
    (root / "a" / "1.png").write_bytes(encode(np.full((5, 7), 40_000, np.uint16)))
    assert raw(root, sixteen_bit="scale").train.images[0].unique().tolist() == [40_000 >> 8]
    with pytest.raises(SettingError, match="of mode I;16"):
        raw(root)


def test_names_that_are_no_text_are_shown_as_bytes(tmp_path: Path, pictures: np.ndarray) -> None:
    names = [os.fsdecode(name) for name in (b"caf\xe9/\xff.png", b"a\nb/1.png", "käfer/2.png".encode())]
    root = write(tmp_path / os.fsdecode(b"p\xe9ts"), pictures, names)
    found = raw(root)
    assert (found.name, found.classes) == ("p\\xe9ts", ("a\\nb", "caf\\xe9", "käfer"))
    assert raw(root).train.images.equal(found.train.images)
    (root / names[0]).write_bytes(b"broken")
    with pytest.raises(SettingError, match=r"got caf\\xe9/\\xff\.png \(not a known format\)") as caught:
        raw(root)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["too large", "device"])
def test_files_are_read_to_a_bound(
    tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    root = write(tmp_path, pictures, ["a/1.png", "b/2.png"])
    if kind == "device":
        (root / "b" / "3.png").symlink_to("/dev/zero")
        os.mkfifo(root / "b" / "4.png")
        assert len(raw(root).train) == 2
    else:
        with (root / "b" / "2.png").open("ab") as file:
            file.truncate(10**6)
        monkeypatch.setattr("softdefend.data.sources.folder.LARGEST", 10**6 - 1)
        with pytest.raises(SettingError, match=r"2\.png \(1000000 bytes, where 999999 are the most\)"):
            raw(root)


def test_a_folder_that_is_a_loop_of_links_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "inner"):
        with pytest.raises(SettingError, match=r"^data\.source: got .*loop"):
            raw(path)


def test_paths_longer_than_the_system_allows_are_one_line(tmp_path: Path) -> None:
    for path in ("x" * 300, "/".join(["x" * 200] * 30), "a\0b", "\ud800"):
        with pytest.raises(SettingError, match=r"^data\.source: got ") as caught:
            raw(tmp_path / path)
        assert str(caught.value).isprintable()
