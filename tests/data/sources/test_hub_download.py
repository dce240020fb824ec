"""Data sets from a stand-in of the hub: downloads resume, and what is damaged is not used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hub_server import Hub, stand_in
from softdefend.core.errors import SettingError
from softdefend.core.hub_files import damaged_files
from softdefend.data import DataSettings, load
from softdefend.data.sources.hub import download

ADDRESS = "hf:some-one/a_data.set"


@pytest.fixture
def hub(hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in(tmp_path / "hub-cache", monkeypatch) as made:
        files = {path.relative_to(hub_folder): path.read_bytes() for path in hub_folder.rglob("*.parquet")}
        made.files["datasets/some-one/a_data.set"] = {str(path): content for path, content in files.items()}
        yield made


def settings(tmp_path: Path, cache: str = "cache") -> DataSettings:
    return DataSettings(ADDRESS, validation=2, cache=str(tmp_path / cache))


def test_a_download_that_breaks_off_goes_on_and_gives_the_same_images(
    hub: Hub, hub_folder: Path, tmp_path: Path
) -> None:
    name = max(hub.files["datasets/some-one/a_data.set"], key=len)
    hub.cut.add(name)
    bundle = load(settings(tmp_path))
    first, second = hub.downloads(name)
    assert first is None
    assert second is not None
    local = load(DataSettings(str(hub_folder), validation=2))
    assert bundle.fingerprint == local.fingerprint
    assert torch.equal(bundle.test.images, local.test.images)


def test_finished_files_of_a_download_that_was_killed_stay(hub: Hub, tmp_path: Path) -> None:
    """Of two files the second is missing, as after a kill: only it is asked for."""
    root = download(ADDRESS)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.parquet"))
    assert len(names) > 1
    (root / names[-1]).resolve().unlink()
    (root / names[-1]).unlink()
    load(settings(tmp_path))
    assert [len(hub.downloads(name)) for name in names] == [1] * (len(names) - 1) + [2]


def test_a_damaged_file_is_downloaded_again(hub: Hub, hub_folder: Path, tmp_path: Path) -> None:
    root = download(ADDRESS)
    path = sorted(root.rglob("*.parquet"))[0]
    content = path.read_bytes()
    for damage in (content[: len(content) // 2], content[:-200] + bytes(200), b""):
        path.resolve().write_bytes(damage)
        assert damaged_files(root) == [path]
        bundle = load(settings(tmp_path, f"cache-{len(damage)}"))
        assert bundle.fingerprint == load(DataSettings(str(hub_folder), validation=2)).fingerprint
        assert damaged_files(root) == []


def test_a_hub_that_serves_other_bytes_is_refused(hub: Hub, tmp_path: Path) -> None:
    name = min(hub.files["datasets/some-one/a_data.set"])
    content = hub.files["datasets/some-one/a_data.set"][name]
    hub.altered[name] = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    with pytest.raises(SettingError, match="does not have the hash that the hub gives; accepted: the files"):
        load(settings(tmp_path))


def test_links_to_nothing_known_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "somewhere").write_bytes(b"anything")
    (tmp_path / "link").symlink_to(tmp_path / "somewhere")
    (tmp_path / "hash").symlink_to(tmp_path / ("0" * 64))
    assert damaged_files(tmp_path) == [tmp_path / "hash"]
