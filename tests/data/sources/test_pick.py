from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from picture_tools import encode

from softdefend.data import DataSettings
from softdefend.data.sources import read
from softdefend.errors import SettingError


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


def test_the_user_folder_is_written_as_a_tilde(
    tmp_path: Path, hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = read(DataSettings(f"~/{hub_folder.name}", cache="~/own"))
    assert len(found.train) == 9
    assert len(list((tmp_path / "own").iterdir())) == 1
