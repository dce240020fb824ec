from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from softdefend.core.digest import checksum
from softdefend.core.errors import SettingError
from softdefend.data import Split
from softdefend.data.cache import read_or_build, source_key
from softdefend.data.raw import RawData


class Build:
    """Counts how often the data had to be built."""

    def __init__(self, *, test: bool = True) -> None:
        self.calls = 0
        self.test = test

    def __call__(self) -> RawData:
        self.calls += 1
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=generator)
        part = Split(images, torch.arange(50) % 5)
        test = part.subset(torch.arange(7)) if self.test else None
        return RawData("toy", part, test, ("a", "b", "ü", "d", "e"), {"remark": "x"})


def assert_same(one: RawData, other: RawData) -> None:
    assert (one.name, one.classes, dict(one.notes)) == (other.name, other.classes, dict(other.notes))
    assert torch.equal(one.train.images, other.train.images)
    assert torch.equal(one.train.labels, other.train.labels)
    assert (one.test is None) == (other.test is None)
    if one.test is not None and other.test is not None:
        assert torch.equal(one.test.images, other.test.images)
        assert torch.equal(one.test.labels, other.test.labels)


@pytest.mark.parametrize("test", [True, False])
def test_the_second_time_the_data_come_from_disk(tmp_path: Path, test: bool) -> None:
    build = Build(test=test)
    first = read_or_build(tmp_path / "new" / "cache", "key", build)
    second = read_or_build(tmp_path / "new" / "cache", "key", build)
    assert build.calls == 1
    assert_same(first, second)
    assert [path.name for path in (tmp_path / "new" / "cache").iterdir()] == ["key.safetensors"]
    read_or_build(tmp_path / "new" / "cache", "other", build)
    assert build.calls == 2


@pytest.mark.parametrize("damage", ["flip", "label", "cut", "empty", "foreign", "header"])
def test_a_damaged_file_is_rebuilt_and_logged(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    build = Build()
    good = read_or_build(tmp_path, "key", build)
    path = tmp_path / "key.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-100] ^= 1
    elif damage == "label":
        content[int.from_bytes(content[:8], "little") + 8] ^= 1
    elif damage == "header":
        content[40] ^= 0xFF
    elif damage == "cut":
        del content[-5:]
    else:
        content = bytearray(b"" if damage == "empty" else b"something else altogether")
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = read_or_build(tmp_path, "key", build)
    assert build.calls == 2
    assert "is rebuilt" in caplog.text
    assert_same(good, again)
    read_or_build(tmp_path, "key", build)
    assert build.calls == 2


def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    build = Build()
    with caplog.at_level(logging.WARNING):
        raw = read_or_build(tmp_path / "file" / "cache", "key", build)
    assert_same(raw, build())
    assert "not cached" in caplog.text


def test_a_write_that_fails_halfway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("softdefend.data.cache.save_file", full)
    read_or_build(tmp_path, "key", Build())
    assert list(tmp_path.iterdir()) == []


def test_the_key_follows_files_and_options(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(b"123")
    keys = {source_key(files, column="x")}
    assert source_key(reversed(files), column="x") in keys
    keys.add(source_key(files, column="y"))
    keys.add(source_key(files[:1], column="x"))
    files[0].write_bytes(b"1234")
    keys.add(source_key(files, column="x"))
    os.utime(files[1], ns=(1, 1))
    keys.add(source_key(files, column="x"))
    assert len(keys) == 5


def test_the_key_follows_the_way_of_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"123")
    now = source_key([file])
    monkeypatch.setattr("softdefend.data.cache._FORMAT", 1)  # of images that were not turned upright
    assert source_key([file]) != now


def test_the_checksum_sees_values_shapes_types_and_names() -> None:
    x = torch.arange(6, dtype=torch.int32)
    variants = [
        [("x", x)],
        [("y", x)],
        [("x", x.view(2, 3))],
        [("x", x.view(torch.float32))],
        [("x", x.flip(0))],
        [("x", x), ("y", x)],
    ]
    assert len({checksum(variant) for variant in variants}) == len(variants)
    half, scalar = x.bfloat16(), torch.tensor(3)
    assert checksum([("x", half)]) != checksum([("x", half + 1)])
    assert checksum([("x", scalar)]) != checksum([("x", scalar + 1)])
    assert checksum([("x", x.view(2, 3).t())]) == checksum([("x", x.view(2, 3).t().contiguous())])


def test_a_cache_beyond_memory_is_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_or_build(tmp_path, "key", Build())
    monkeypatch.setattr("softdefend.core.memory.available_memory", lambda: 10_000)
    with pytest.raises(SettingError, match=r"^data\.source: got decoded images, .* at most the 10 kB"):
        read_or_build(tmp_path, "key", Build())


def test_a_header_nested_beyond_reading_is_rebuilt(tmp_path: Path) -> None:
    header = b'{"__metadata__":{"softdefend":"' + b"[" * 100_000 + b'"}}'
    (tmp_path / "key.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    build = Build()
    read_or_build(tmp_path, "key", build)
    assert build.calls == 1
