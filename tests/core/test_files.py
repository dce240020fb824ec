from __future__ import annotations

import os
from pathlib import Path

import pytest

from softdefend.core.digest import file_digest
from softdefend.core.files import cache_folder, check_regular, parse_json, read_bytes


def test_a_regular_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert check_regular(tmp_path / name) == 7
        assert read_bytes(tmp_path / name, 7) == b"content"
        with pytest.raises(OSError, match="7 bytes, where 6 are the most"):
            read_bytes(tmp_path / name, 6)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "loop", "nothing", "long", "NUL", "surrogate"])
@pytest.mark.parametrize("read", [check_regular, file_digest, lambda path: read_bytes(path, 10)])
def test_all_else_is_an_error_of_the_system(tmp_path: Path, kind: str, read) -> None:
    names = {"long": "x" * 300, "NUL": "a\0b", "surrogate": "\ud800"}
    path = tmp_path / names.get(kind, "file")
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(OSError, match=r"\[Errno \d+\] .+") as caught:
        read(path)
    assert caught.value.strerror


def test_json_nested_beyond_reading_is_a_value_error() -> None:
    assert parse_json('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000 + "]" * 100_000)


def test_the_cache_folder_follows_the_desktop_standard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/softdefend")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/softdefend")
