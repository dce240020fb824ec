from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.data import DataSettings
from softdefend.data.sources import RawData, read

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def python2(value: object) -> bytes:
    """The opcodes that Python 2.7's pickle.dumps(value, 2) writes, without the memo: what the published files
    consist of (byte strings as STRING, arrays by numpy.core.multiarray._reconstruct)."""
    if isinstance(value, dict):
        items = b"".join(python2(key) + python2(item) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list | tuple):
        close = b"t" if isinstance(value, tuple) else b"e"
        return (b"(" if isinstance(value, tuple) else b"](") + b"".join(map(python2, value)) + close
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if value is None:
        return b"N"
    if isinstance(value, str):
        return python2(value.encode())
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    assert isinstance(value, np.ndarray)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2((0,)) + python2(b"b") + b"tR"
    )
    dtype = (
        b"cnumpy\ndtype\n"
        + python2(("u1", 0, 1))
        + b"R"
        + python2((3, "|", None, None, None, -1, -1, 0))
        + b"b"
    )
    shape = python2(tuple(int(side) for side in value.shape))
    return array + b"(" + python2(1) + shape + dtype + python2(False) + python2(value.tobytes()) + b"tb"


def python3(value: object) -> bytes:
    return pickle.dumps(value)


def dump2(value: object) -> bytes:
    return b"\x80\x02" + python2(value) + b"."


def pixels(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def write_cifar10(folder: Path, dump: object = dump2) -> Path:
    assert callable(dump)
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = [(i + j) % 10 for j in range(4)]
        (folder / name).write_bytes(
            dump({"data": pixels(4, i), "labels": labels, "filenames": ["x.png"] * 4})
        )
    (folder / "batches.meta").write_bytes(dump({"label_names": NAMES, "num_vis": 3072}))
    return folder


def write_cifar100(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, n) in enumerate((("train", 6), ("test", 3))):
        content = {
            "data": pixels(n, seed),
            "fine_labels": list(range(n)),
            "coarse_labels": [i % 2 for i in range(n)],
        }
        (folder / name).write_bytes(dump2(content))
    meta = {"fine_label_names": list("abcdefgh"), "coarse_label_names": ["even", "odd"]}
    (folder / "meta").write_bytes(dump2(meta))
    return folder


def raw(folder: Path, label_column: str | None = None) -> RawData:
    return read(DataSettings(str(folder), label_column=label_column))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dump", [dump2, python3])
def test_cifar10_is_read_in_the_published_order(tmp_path: Path, dump: object, inside: bool) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py", dump)
    found = raw(tmp_path if inside else folder)
    assert found.name == "cifar-10-batches-py"
    assert found.classes == tuple(NAMES)
    assert found.train.images.shape == (20, 3, 32, 32)
    expected = np.concatenate([pixels(4, seed) for seed in range(5)])
    np.testing.assert_array_equal(found.train.images.flatten(1).numpy(), expected)
    assert found.train.labels.tolist() == [(i + j) % 10 for i in range(5) for j in range(4)]
    assert found.test is not None
    np.testing.assert_array_equal(found.test.images.flatten(1).numpy(), pixels(4, 5))
    found.train.images.add_(1)  # must be writable: the bytes of a pickle are not


def test_pixels_are_red_green_blue_planes_by_rows(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    image = np.zeros((4, 3072), np.uint8)
    image[0, 1024 + 32 * 5 + 7] = 200  # green, row 5, column 7
    (folder / "data_batch_1").write_bytes(dump2({"data": image, "labels": [0, 1, 2, 3]}))
    assert raw(folder).train.images[0].nonzero().tolist() == [[1, 5, 7]]


def test_cifar100_has_fine_and_coarse_labels(tmp_path: Path) -> None:
    folder = write_cifar100(tmp_path / "cifar-100-python")
    fine, coarse = raw(folder), raw(tmp_path, "coarse_label")
    assert fine.classes == tuple("abcdefgh")
    assert fine.train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert coarse.classes == ("even", "odd")
    assert coarse.train.labels.tolist() == [0, 1] * 3
    assert torch.equal(fine.train.images, coarse.train.images)
    np.testing.assert_array_equal(fine.train.images.flatten(1).numpy(), pixels(6, 0))


def test_labels_that_the_layout_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match=r"data\.label_column: got superclass; accepted: fine_label \| coarse_label"
    ):
        raw(write_cifar100(tmp_path / "100"), "superclass")
    with pytest.raises(
        SettingError, match=r"data\.label_column: got fine_label; accepted: label, for CIFAR-10"
    ):
        raw(write_cifar10(tmp_path / "10"), "fine_label")


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(SettingError, match="without data_batch_3; accepted: all of data_batch_1"):
        raw(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [0, 1]}, "data_batch_2 without image data"),
        ({"data": pixels(2, 0)[:, :100], "labels": [0, 1]}, "data_batch_2 without image data"),
        ({"data": b"bytes", "labels": [0, 1]}, "data_batch_2 without image data"),
        ({"data": pixels(2, 0)}, "data_batch_2 without usable labels"),
        ({"data": pixels(2, 0), "labels": [0, 1, 2]}, "data_batch_2 without usable labels"),
        ({"data": pixels(2, 0), "labels": ["0", "1"]}, "data_batch_2 without usable labels"),
        ({"data": pixels(2, 0), "labels": [0, 10]}, "label 10 at row 5 of the training data"),
        ({"data": pixels(2, 0), "labels": [0, -1]}, "got label -1 at row 5"),
        ([1, 2], "data_batch_2 (it holds a list, not a dictionary)"),
    ],
)
def test_content_that_cannot_be_used_is_refused(tmp_path: Path, content: object, message: str) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_2").write_bytes(dump2(content))
    with pytest.raises(SettingError) as caught:
        raw(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("meta", [{}, {"label_names": "abc"}, {"label_names": [1, 2]}])
def test_a_meta_file_without_names_is_refused(tmp_path: Path, meta: dict[str, object]) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "batches.meta").write_bytes(dump2(meta))
    with pytest.raises(SettingError, match=r"batches\.meta without label_names"):
        raw(folder)


def test_names_that_are_no_text_are_shown_as_bytes(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "batches.meta").write_bytes(dump2({"label_names": [b"caf\xe9", b"a\x00b", *NAMES[2:]]}))
    assert raw(folder).classes[:2] == ("caf\\xe9", "a\\x00b")


def test_a_label_beyond_64_bits_is_refused(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_2").write_bytes(python3({"data": pixels(2, 0), "labels": [0, 2**70]}))
    with pytest.raises(SettingError, match="data_batch_2 without usable labels"):
        raw(folder)
