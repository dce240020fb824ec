from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from picture_tools import encode, planes

from softdefend.core.errors import SettingError
from softdefend.data import DataSettings, load
from softdefend.data.sources import RawData, read

WriteParquet = Callable[..., Path]


def raw(path: Path, **settings: Any) -> RawData:
    return read(DataSettings(str(path), **settings))


def test_a_hub_folder_gives_its_shards_in_order(hub_folder: Path, pictures: np.ndarray) -> None:
    found = raw(hub_folder)
    assert found.classes == ("ant", "bee", "cow")
    assert found.test is not None
    np.testing.assert_array_equal(found.train.images.numpy(), planes(pictures)[:9])
    np.testing.assert_array_equal(found.test.images.numpy(), planes(pictures)[9:])
    assert found.train.labels.tolist() == [0, 1, 2] * 3
    assert found.test.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("layout", ["root", "config", "split folders"])
def test_other_places_of_the_same_files(hub_folder: Path, layout: str) -> None:
    expected = raw(hub_folder)
    data = hub_folder / "data"
    if layout == "root":
        for file in list(data.iterdir()):
            file.rename(hub_folder / file.name)
        data.rmdir()
    elif layout == "config":
        data.rename(hub_folder / "plain_text")
    else:
        for i, file in enumerate(sorted(data.iterdir())):
            folder = data / file.name.split("-")[0]
            folder.mkdir(exist_ok=True)
            file.rename(folder / f"{i:04}.parquet")
    found = raw(hub_folder)
    assert torch.equal(found.train.images, expected.train.images)
    assert found.test is not None
    assert expected.test is not None
    assert torch.equal(found.test.images, expected.test.images)


def test_one_file_is_training_data_only(hub_folder: Path) -> None:
    found = raw(hub_folder / "data" / "train-00000-of-00002.parquet")
    assert len(found.train) == 5
    assert found.test is None


def test_a_validation_split_stands_in_for_a_missing_test_split(hub_folder: Path) -> None:
    test = hub_folder / "data" / "test-00000-of-00001.parquet"
    copy = test.with_name("validation-00000-of-00001.parquet")
    shutil.copy(hub_folder / "data" / "train-00000-of-00002.parquet", copy)
    with_both = raw(hub_folder)
    assert with_both.test is not None
    assert len(with_both.test) == 3
    assert len(with_both.train) == 9
    test.unlink()
    found = raw(hub_folder)
    assert found.test is not None
    assert len(found.test) == 5
    assert found.notes["test_split"] == "the source's validation split"


def test_plain_binary_and_jpeg_without_metadata(tmp_path: Path, pictures: np.ndarray) -> None:
    encoded = [encode(picture, "JPEG") for picture in pictures]
    table = pa.table(
        {"id": pa.array([f"n{i}" for i in range(12)]), "jpg": encoded, "cls": [i % 4 for i in range(12)]}
    )
    pq.write_table(table, tmp_path / "all.parquet")
    found = raw(tmp_path / "all.parquet")
    assert found.classes == ("0", "1", "2", "3")
    # JPEG at Pillow's default quality moves random noise a lot, but not to something unrelated.
    correlation = np.corrcoef(found.train.images.numpy().ravel(), planes(pictures).ravel())[0, 1]
    assert correlation > 0.5


def test_row_groups_are_read_one_after_the_other(tmp_path: Path, pictures: np.ndarray) -> None:
    table = pa.table(
        {"image": [encode(picture) for picture in pictures], "label": [i % 3 for i in range(12)]}
    )
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=5)
    np.testing.assert_array_equal(raw(tmp_path / "all.parquet").train.images.numpy(), planes(pictures))


def cifar100(folder: Path, pictures: np.ndarray, *, metadata: bool) -> Path:
    table = pa.table(
        {
            "img": [encode(picture) for picture in pictures],
            "coarse_label": [i % 2 for i in range(12)],
            "fine_label": [i % 6 for i in range(12)],
        }
    )
    if metadata:
        features = {
            "img": {"_type": "Image"},
            "coarse_label": {"_type": "ClassLabel", "names": ["x", "y"]},
            "fine_label": {"_type": "ClassLabel", "names": list("abcdef")},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / "all.parquet")
    return folder / "all.parquet"


@pytest.mark.parametrize("metadata", [True, False])
def test_of_fine_and_coarse_labels_the_fine_are_taken_unless_told(
    tmp_path: Path, pictures: np.ndarray, metadata: bool
) -> None:
    path = cifar100(tmp_path, pictures, metadata=metadata)
    assert raw(path).train.labels.tolist() == [i % 6 for i in range(12)]
    assert raw(path).classes == tuple("abcdef" if metadata else "012345")
    coarse = raw(path, label_column="coarse_label")
    assert coarse.train.labels.tolist() == [i % 2 for i in range(12)]
    assert coarse.classes == tuple("xy" if metadata else "01")


@pytest.mark.parametrize(
    "metadata", ["not json", "[]", '{"info": null}', '{"info": {"features": {"img": 3}}}']
)
def test_metadata_that_cannot_be_read_are_passed_over(
    tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet, metadata: str
) -> None:
    images = [encode(picture) for picture in pictures]
    path = write_parquet(tmp_path / "x.parquet", images, [0, 1] * 6, metadata=metadata)
    assert raw(path).classes == ("0", "1")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image_column": "picture"},
            "data.image_column: got picture; accepted: the name of a column of encoded",
        ),
        ({"image_column": "label"}, "data.image_column: got label"),
        (
            {"label_column": "target"},
            "data.label_column: got target; accepted: the name of a column of integer",
        ),
        ({"label_column": "img"}, "data.label_column: got img"),
    ],
)
def test_an_unknown_column_is_answered_with_those_present(
    hub_folder: Path, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        raw(hub_folder, **columns)
    assert "train-00000-of-00002.parquet has img (struct<" in str(caught.value)
    assert "label (int64)" in str(caught.value)


def test_columns_that_cannot_be_told_apart_have_to_be_named(tmp_path: Path, pictures: np.ndarray) -> None:
    images = [encode(picture) for picture in pictures]
    labels = [i % 3 for i in range(12)]
    path = tmp_path / "two.parquet"
    pq.write_table(pa.table({"left": images, "right": images, "label": labels}), path)
    with pytest.raises(SettingError, match=r"data.image_column: got 2 candidates \(left, right\)"):
        raw(path)
    assert len(raw(path, image_column="right").train) == 12
    pq.write_table(pa.table({"img": images, "age": labels, "year": labels}), path)
    with pytest.raises(SettingError, match=r"data.label_column: got 2 candidates \(age, year\)"):
        raw(path)
    pq.write_table(pa.table({"img": images, "name": ["x"] * 12}), path)
    with pytest.raises(SettingError, match=r"data\.label_column: got no such column"):
        raw(path)


def test_a_shard_without_the_columns_of_the_first_is_named(hub_folder: Path) -> None:
    pq.write_table(pa.table({"other": [1]}), hub_folder / "data" / "train-00002-of-00003.parquet")
    with pytest.raises(SettingError, match=re.escape("train-00002-of-00003.parquet has other (int64)")):
        raw(hub_folder)


@pytest.mark.parametrize("content", [b"", b"this is not a Parquet file", b"PAR1 and then nothing PAR1"])
def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    for path in (tmp_path, tmp_path / "x.parquet"):
        with pytest.raises(SettingError, match=r"x\.parquet \(.*accepted: an intact Parquet file") as caught:
            raw(path)
        assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_refused(hub_folder: Path) -> None:
    path = hub_folder / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SettingError, match=r"train-00001-of-00002\.parquet"):
        raw(hub_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 7, 2]}, "label 7 at row 2 of the training data"),
        ({"labels": [0, 1, -1, 2]}, "data.label_column: got label -1 at row 2"),
        ({"labels": [0, None, 1, 2]}, "data.label_column: got no label at row 1 of bad.parquet"),
        ({"labels": [1, 1, 1, 1]}, "only class bee"),
        ({"broken": b"no image"}, "row 3 of bad.parquet (not a known format)"),
        ({"broken": None}, "row 3 of bad.parquet (no bytes)"),
        ({"broken": "size"}, "row 3 of bad.parquet of 4x4 pixels; accepted: images of one size (7x5"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet, change: dict[str, object], message: str
) -> None:
    images: list[object] = [encode(picture) for picture in pictures[:4]]
    if "broken" in change:
        small = encode(np.zeros((4, 4, 3), np.uint8))
        images[3] = small if change["broken"] == "size" else change["broken"]
    names = '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["ant", "bee", "cow"]}}}}'
    path = write_parquet(tmp_path / "bad.parquet", images, change.get("labels", [0, 1, 2, 0]), metadata=names)
    with pytest.raises(SettingError, match=re.escape(message)):
        raw(path)


def test_rows_are_counted_within_their_shard(hub_folder: Path, write_parquet: WriteParquet) -> None:
    good = encode(np.zeros((5, 7, 3), np.uint8))
    write_parquet(hub_folder / "data" / "train-00001-of-00002.parquet", [good, good, b"bad"], [0, 1, 2])
    with pytest.raises(SettingError, match=r"got row 2 of train-00001-of-00002\.parquet"):
        raw(hub_folder)


def test_an_empty_table_is_refused(tmp_path: Path, write_parquet: WriteParquet) -> None:
    with pytest.raises(SettingError, match=r"empty\.parquet without rows; accepted: at least one image"):
        raw(write_parquet(tmp_path / "empty.parquet", [], []))


def test_a_folder_with_several_data_sets_is_answered_with_their_names(hub_folder: Path) -> None:
    shutil.copytree(hub_folder / "data", hub_folder / "more")
    with pytest.raises(
        SettingError, match="with several data sets; accepted: one of its folders: data, more"
    ):
        raw(hub_folder)


def test_a_folder_without_training_files_is_refused(hub_folder: Path) -> None:
    for file in (hub_folder / "data").glob("train-*"):
        file.unlink()
    with pytest.raises(SettingError, match="with only test files"):
        raw(hub_folder)


def test_the_cache_follows_files_and_columns(
    tmp_path: Path, pictures: np.ndarray, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cifar100(tmp_path, pictures, metadata=True)
    first = raw(path)

    def no_decoding(*args: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("softdefend.data.sources.parquet.decode", no_decoding)
    assert torch.equal(raw(path).train.images, first.train.images)
    assert len(list(own_cache.iterdir())) == 1
    with pytest.raises(AssertionError, match="decoded again"):
        raw(path, label_column="coarse_label")


def named(*classes: str) -> str:
    features = {"label": {"_type": "ClassLabel", "names": classes}}
    return json.dumps({"info": {"features": features}})


@pytest.mark.parametrize("shard", ["test-00000-of-00001", "train-00001-of-00002"])
@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("ant", "cow", "bee"), "whose class 1 is cow, not bee as in train-00000-of-00002.parquet"),
        (("ant", "bee"), "with 2 classes, not 3 as in train-00000-of-00002.parquet"),
    ],
)
def test_files_that_name_their_classes_otherwise_are_refused(
    hub_folder: Path,
    pictures: np.ndarray,
    write_parquet: WriteParquet,
    shard: str,
    classes: tuple[str, ...],
    message: str,
) -> None:
    images = [encode(picture) for picture in pictures[:2]]
    write_parquet(hub_folder / "data" / f"{shard}.parquet", images, [0, 1], metadata=named(*classes))
    with pytest.raises(
        SettingError, match=rf"{shard}\.parquet {message}; accepted: files with the same class"
    ):
        raw(hub_folder)


def test_files_without_class_names_take_those_of_the_others(
    hub_folder: Path, pictures: np.ndarray, write_parquet: WriteParquet
) -> None:
    images = [encode(picture) for picture in pictures[:2]]
    write_parquet(hub_folder / "data" / "train-00000-of-00002.parquet", images, [0, 1])
    assert raw(hub_folder).classes == ("ant", "bee", "cow")


def test_a_test_label_that_training_lacks_is_refused_where_classes_have_no_names(
    tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet
) -> None:
    images = [encode(picture) for picture in pictures]
    write_parquet(tmp_path / "train.parquet", images, [0, 1] * 6)
    write_parquet(tmp_path / "test.parquet", images[:3], [0, 1, 5])
    with pytest.raises(SettingError, match=r"data\.label_column: got label 5 at row 2 of the test data"):
        raw(tmp_path)


def test_split_folders_may_be_capitalised_and_hidden_files_are_passed_over(
    hub_folder: Path, pictures: np.ndarray
) -> None:
    data = hub_folder / "data"
    for i, file in enumerate(sorted(data.iterdir())):
        folder = data / file.name.split("-")[0].capitalize()
        folder.mkdir(exist_ok=True)
        file.rename(folder / f"{i:04}.parquet")
    (data / "Train" / "._0001.parquet").write_bytes(b"not Parquet")
    found = raw(hub_folder)
    assert found.test is not None
    assert (len(found.train), len(found.test)) == (9, 3)


def test_real_files_have_the_published_labels(shared_data: Path) -> None:
    found = raw(shared_data / "cifar10-jpeg" / "test-00000-of-00001.parquet")
    assert found.train.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(found.train.labels).tolist() == [1000] * 10
    assert [found.classes[i] for i in found.train.labels[:5]] == ["cat", "ship", "ship", "airplane", "frog"]


LABELS = ["dog", "cat", "owl", "dog", "cat", "owl"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_labels_that_are_names_are_classes_in_the_order_of_the_names(
    tmp_path: Path, pictures: np.ndarray, kind: pa.DataType
) -> None:
    def write(split: str, labels: list[str | None]) -> None:
        images = [encode(picture) for picture in pictures[: len(labels)]]
        columns = {"id": list(range(len(labels))), "img": images, "label": pa.array(labels, kind)}
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")

    write("train", LABELS)
    write("test", ["owl", "cat"])
    found = raw(tmp_path)
    assert found.classes == ("cat", "dog", "owl")
    assert found.train.labels.tolist() == [1, 0, 2, 1, 0, 2]
    assert found.test is not None
    assert found.test.labels.tolist() == [2, 0]
    assert raw(tmp_path, label_column="id").classes == tuple("012345")
    write("test", ["owl", "bee"])
    with pytest.raises(SettingError, match=r"got bee at row 1 of test\.parquet, which no .*: cat, dog, owl"):
        raw(tmp_path)
    write("test", ["owl", None])
    with pytest.raises(SettingError, match=r"data\.label_column: got no label at row 1 of test\.parquet"):
        raw(tmp_path)


def test_names_in_one_file_and_numbers_in_another_are_refused(tmp_path: Path, pictures: np.ndarray) -> None:
    images = [encode(picture) for picture in pictures[:6]]
    pq.write_table(pa.table({"img": images, "label": LABELS}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"img": images, "label": list(range(6))}), tmp_path / "train-1.parquet")
    with pytest.raises(SettingError, match=r"train-1\.parquet with labels of another type than train-0"):
        raw(tmp_path)


def test_labels_that_count_from_one_are_classes_of_these_numbers(
    tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet
) -> None:
    images = [encode(picture) for picture in pictures]
    write_parquet(tmp_path / "train.parquet", images, [1, 2, 3] * 4)
    write_parquet(tmp_path / "test.parquet", images[:2], [3, 2])
    np.savez(tmp_path / "noise.npz", worse=[1, 2, 3] * 3 + [3, 1, 2])
    for _ in range(2):  # decoded, and from the cache
        found = raw(tmp_path)
        assert found.classes == ("1", "2", "3")
        assert found.train.labels.tolist() == [0, 1, 2] * 4
        assert found.test is not None
        assert found.test.labels.tolist() == [2, 1]
        noisy = {"noise": "file", "noise_file": str(tmp_path / "noise.npz"), "validation": 3}
        train = load(DataSettings(str(tmp_path), **noisy)).train  # type: ignore[arg-type]
        assert train.clean_labels is not None
        moved = (train.labels - train.clean_labels)[train.labels != train.clean_labels]
        assert set((moved % 3).tolist()) <= {2}
    write_parquet(tmp_path / "test.parquet", images[:2], [3, 4])
    with pytest.raises(SettingError, match="label 4 at row 1 of the test data, which no training image has"):
        raw(tmp_path)


def test_labels_that_count_from_one_among_named_classes_are_said_to(
    tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet
) -> None:
    images = [encode(picture) for picture in pictures[:3]]
    path = write_parquet(tmp_path / "x.parquet", images, [1, 2, 3], metadata=named("ant", "bee", "cow"))
    with pytest.raises(
        SettingError, match=r"labels 1\.\.3 in the training data .*which count from one; .*0\.\.2"
    ):
        raw(path)


def test_classes_without_images_are_said(
    tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet, caplog: pytest.LogCaptureFixture
) -> None:
    images = [encode(picture) for picture in pictures]
    path = write_parquet(tmp_path / "x.parquet", images, [0, 3] * 6)
    with caplog.at_level(logging.INFO, "softdefend"):
        load(DataSettings(str(path), validation=2))
    assert "x.parquet: 2 of 4 classes without images: 1, 2" in caplog.messages


@pytest.mark.parametrize("name", ["img", "label"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, pictures: np.ndarray, name: str) -> None:
    images, labels = [encode(picture) for picture in pictures], [i % 2 for i in range(12)]
    columns = [("img", images), ("label", labels)]
    columns.append((name, images if name == "img" else labels))
    table = pa.Table.from_arrays([pa.array(values) for _, values in columns], [key for key, _ in columns])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SettingError, match=f"with several columns {name}; accepted: files whose columns"):
        raw(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "metadata",
    [
        "[" * 100_000,
        '{"info": {"features": {"label": {"names": [' + "[" * 500 + "]" * 500 + "]}}}}",
        '{"info": {"features": ' + '{"a":' * 900 + "1" + "}" * 900 + "}}",
        '{"info": {"features": {"label": {"names": [{}, null]}}}}',
    ],
    ids=["open", "deep name", "deep feature", "no text"],
)
def test_metadata_nested_deeply_are_passed_over(
    tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet, metadata: str
) -> None:
    images = [encode(picture) for picture in pictures]
    path = write_parquet(tmp_path / "x.parquet", images, [0, 1] * 6, metadata=metadata)
    assert raw(path).classes == ("0", "1")


def test_names_of_classes_are_printable(
    tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet
) -> None:
    images = [encode(picture) for picture in pictures]
    metadata = named("a\0b", "\ud800", "\x1b[1mcow")
    path = write_parquet(tmp_path / "x.parquet", images, [0, 1, 2] * 4, metadata=metadata)
    assert raw(path).classes == ("a\\x00b", "\\ud800", "\\x1b[1mcow")
    table = pq.read_table(path).replace_schema_metadata({b"huggingface": b'{"\xff": 1}', b"\xff": b"\xff"})
    pq.write_table(table, path)
    assert raw(path).classes == ("0", "1", "2")


def test_a_file_may_have_a_name_that_is_no_text(
    tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet
) -> None:
    images = [encode(picture) for picture in pictures]
    made = write_parquet(tmp_path / "x.parquet", images, [0, 1] * 6)
    path = made.rename(tmp_path / os.fsdecode(b"caf\xe9.parquet"))
    for _ in range(2):  # decoded, and from a cache that has such a name too
        found = raw(path, cache=str(tmp_path / os.fsdecode(b"\xff")))
        assert found.name == "caf\\xe9.parquet"
        np.testing.assert_array_equal(found.train.images.numpy(), planes(pictures))


def test_damaged_rows_may_be_left_out(
    tmp_path: Path, pictures: np.ndarray, write_parquet: WriteParquet
) -> None:
    images: list[bytes | None] = [encode(picture) for picture in pictures]
    images[1], images[7] = None, b"x"
    path = write_parquet(tmp_path / "x.parquet", images, [i % 3 for i in range(12)])
    with pytest.raises(SettingError, match=r"2 damaged images: row 1 of x\.parquet \(no bytes\), row 7 of"):
        raw(path)
    found = raw(path, skip_damaged=True)
    kept = [i for i in range(12) if i not in (1, 7)]
    assert found.train.labels.tolist() == [i % 3 for i in kept]
    np.testing.assert_array_equal(found.train.images.numpy(), planes(pictures)[kept])


def test_rows_beyond_memory_are_refused_before_they_are_read(
    tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary makes many rows of one image a small file."""
    image = encode(np.zeros((500, 500, 3), np.uint8))
    table = pa.table({"img": pa.array([image] * 100_000), "label": [0, 1] * 50_000})
    pq.write_table(table, tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 10**5
    monkeypatch.setattr("softdefend.data.decode.available_memory", lambda: 16 * 10**9)
    with pytest.raises(SettingError, match=r"got 100000 images of 500x500 pixels .* take 75 GB"):
        raw(tmp_path / "x.parquet", residence="device")
