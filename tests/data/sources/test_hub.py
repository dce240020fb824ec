from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.data import DataSettings, load
from softdefend.data.sources import read


@pytest.fixture
def asked(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    """Puts a local folder in place of the hub and collects what was asked of it."""
    calls: list[tuple[str, dict[str, object]]] = []

    def download(repo: str, **options: object) -> str:
        calls.append((repo, options))
        return str(hub_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_data_set_of_the_hub_is_read_like_a_local_one(
    asked: list[tuple[str, dict[str, object]]], hub_folder: Path
) -> None:
    bundle = load(DataSettings("hf:some-one/a_data.set", validation=2))
    assert asked == [("some-one/a_data.set", {"repo_type": "dataset", "allow_patterns": ["*.parquet"]})]
    local = load(DataSettings(str(hub_folder), validation=2))
    assert bundle.fingerprint == local.fingerprint
    assert bundle.name == "hf:some-one/a_data.set"
    assert torch.equal(bundle.test.images, local.test.images)


def test_one_configuration_of_several(asked: list[tuple[str, dict[str, object]]]) -> None:
    assert len(read(DataSettings("hf:owner/name/data")).train) == 9
    assert asked[0][1]["allow_patterns"] == ["data/*.parquet"]


@pytest.mark.parametrize(
    "source", ["hf:", "hf:name", "hf:owner/", "hf:owner/na me", "hf:owner/name/../../etc"]
)
def test_malformed_ids_are_refused_before_anything_is_asked(
    asked: list[tuple[str, dict[str, object]]], source: str
) -> None:
    with pytest.raises(SettingError, match="accepted: hf:owner/name or hf:owner/name/config"):
        read(DataSettings(source))
    assert asked == []


@pytest.mark.parametrize(
    "error", [OSError("cannot reach the hub\nand a long explanation"), ValueError("cannot reach the hub")]
)
def test_an_error_of_the_client_becomes_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(SettingError) as caught:
        read(DataSettings("hf:owner/name"))
    assert str(caught.value) == (
        "data.source: got hf:owner/name (cannot reach the hub); "
        "accepted: a data set of the hub that can be reached, or a local path"
    )


def test_a_data_set_without_parquet_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(tmp_path))
    with pytest.raises(SettingError, match="without Parquet files"):
        read(DataSettings("hf:owner/name"))
