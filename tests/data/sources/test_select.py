from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from picture_tools import encode

from softdefend.core.errors import SettingError
from softdefend.data import DataSettings
from softdefend.data.raw import RawData
from softdefend.data.sources import SOURCES, Source, read


@pytest.mark.parametrize("name", ["image_column", "label_column"])
def test_columns_are_refused_where_they_have_no_effect(
    tmp_path: Path, pictures: np.ndarray, name: str
) -> None:
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "a.png").write_bytes(encode(pictures[i]))
    assert len(read(DataSettings(str(tmp_path))).train) == 2
    for source in ("digits", str(tmp_path)):
        with pytest.raises(SettingError, match=rf"data\.{name}: got x; accepted: no column for the source"):
            read(DataSettings(source, **{name: "x"}))  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", [{"skip_damaged": True}, {"channels": "rgb"}, {"sixteen_bit": "scale"}])
def test_how_images_are_decoded_is_refused_where_none_are(setting: dict[str, object]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(SettingError, match=rf"data\.{name}: got {value}; accepted: .* for the source digits"):
        read(DataSettings(**setting))  # type: ignore[arg-type]


def test_the_user_folder_is_written_as_a_tilde(
    tmp_path: Path, hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = read(DataSettings(f"~/{hub_folder.name}", cache="~/own"))
    assert len(found.train) == 9
    assert len(list((tmp_path / "own").iterdir())) == 1


def write_images(root: Path, pictures: np.ndarray, names: list[str]) -> None:
    for picture, name in zip(pictures, names, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(picture))


def test_a_parquet_file_somewhere_below_does_not_hide_the_images(
    tmp_path: Path, pictures: np.ndarray, hub_folder: Path
) -> None:
    root = tmp_path / "photos"
    write_images(root, pictures, ["ant/1.png", "bee/2.png"])
    (root / "ant" / "notes").mkdir()
    (hub_folder / "data" / "test-00000-of-00001.parquet").rename(root / "ant" / "notes" / "test.parquet")
    assert read(DataSettings(str(root))).classes == ("ant", "bee")


@pytest.mark.parametrize("images", [["ant/1.png", "bee/2.png"], ["train/ant/1.png", "train/bee/2.png"]])
def test_parquet_files_beside_classes_of_images_are_refused(
    hub_folder: Path, pictures: np.ndarray, images: list[str]
) -> None:
    write_images(hub_folder, pictures, images)
    with pytest.raises(SettingError, match="hub with Parquet files and with images in ant and bee; accepted"):
        read(DataSettings(str(hub_folder)))


def test_one_folder_of_pictures_beside_parquet_files_is_no_data_set(
    hub_folder: Path, pictures: np.ndarray
) -> None:
    write_images(hub_folder, pictures, ["assets/logo.png"])
    assert len(read(DataSettings(str(hub_folder))).train) == 9


@pytest.mark.parametrize("name", ["picture.png", "labels.csv"])
def test_a_file_that_is_no_source_is_answered_with_the_kinds_of_source(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no Parquet")
    with pytest.raises(SettingError, match=r"which is not a Parquet file; accepted: digits, .*a Parquet f"):
        read(DataSettings(str(tmp_path / name)))


def test_all_kinds_of_source_are_listed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingError) as caught:
        read(DataSettings(str(tmp_path / "file")))
    ours = ["digits", "hf:owner/name", "a Parquet file or a folder of them"]
    ours += ["a folder of images (class/name.png)"]
    assert [kind for kind in re.split(r", (?:or )?", caught.value.accepted) if kind in ours] == ours
    assert "a folder cifar-10-batches-py or cifar-100-python" in caught.value.accepted


def test_a_folder_called_digits_does_not_hide_the_digits(
    tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "digits", pictures, ["ant/1.png", "bee/2.png"])
    (tmp_path / "digits" / "batches.meta").touch()
    monkeypatch.chdir(tmp_path)
    assert len(read(DataSettings("digits")).train) == 1797
    with pytest.raises(SettingError, match=r"digits without data_batch_1"):
        read(DataSettings("./digits"))


def test_files_of_cifar_are_recognized_beside_parquet_files(hub_folder: Path) -> None:
    (hub_folder / "batches.meta").touch()
    with pytest.raises(SettingError, match=r"hub without data_batch_1"):
        read(DataSettings(str(hub_folder)))


class Anything(Source):
    """Takes every address that nobody else does."""

    address = "anything"
    priority = -2

    def recognizes(self, address: str, path: Path) -> bool:
        return True

    def read(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        raise SettingError("data.source", settings.source, "nothing")


def test_a_source_of_another_package_is_asked_by_its_priority(
    tmp_path: Path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SOURCES, "_foreign", {"anything": lambda: Anything})
    write_images(tmp_path / "photos", pictures, ["ant/1.png", "bee/2.png"])
    try:
        assert read(DataSettings(str(tmp_path / "photos"))).classes == ("ant", "bee")
        with pytest.raises(SettingError, match=r"data\.source: got s3://bucket; accepted: nothing"):
            read(DataSettings("s3://bucket"))
    finally:
        SOURCES.unregister("anything")


def test_a_package_that_cannot_be_imported_stops_no_other_source(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> type[Source]:
        raise ImportError("no module named cloud")

    monkeypatch.setattr(SOURCES, "_foreign", {"cloud": fail})
    assert len(read(DataSettings("digits")).train) == 1797
    assert "'cloud' (ImportError: no module named cloud)" in caplog.text


def test_a_parquet_file_may_have_any_name(hub_folder: Path) -> None:
    file = hub_folder / "data" / "train-00000-of-00002.parquet"
    assert len(read(DataSettings(str(file.rename(hub_folder / "some.data")))).train) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            DataSettings("~nosuchuser/x"),
            r"data\.source: got ~nosuchuser/x \(no such user\); accepted: a path",
        ),
        (DataSettings(cache="~nosuchuser/x"), r"data\.cache: got ~nosuchuser/x \(no such user\)"),
        (DataSettings("x" * 300), r"data\.source: got x+ \(File name too long\); accepted"),
        (DataSettings(os.devnull), "data.source: got /dev/null, which is neither file nor folder; accepted"),
    ],
)
def test_paths_that_lead_nowhere_are_refused_in_one_line(settings: DataSettings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read(settings)


@pytest.mark.parametrize("name", ["photos", "batches.meta"])
def test_a_source_that_may_not_be_looked_at_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stat = Path.stat
    (tmp_path / "photos").mkdir()

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(
        SettingError, match=rf"{name} \(Permission denied\); accepted: a path that can be read"
    ):
        read(DataSettings(str(tmp_path / "photos")))
