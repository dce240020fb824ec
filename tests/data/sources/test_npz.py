from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.data import DataSettings
from softdefend.data.sources import npz, read

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, 5, 6), dtype=np.uint8)
LABELS = np.arange(12) % 3


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("image", "label"), ("data", "targets")]
)
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_images_are_read_in_either_order_of_sides(tmp_path: Path, images, labels, last) -> None:
    stored = IMAGES.transpose(0, 2, 3, 1) if last else IMAGES
    np.savez(tmp_path / "mine.npz", **{images: stored, labels: LABELS})
    raw = read(DataSettings(str(tmp_path / "mine.npz")))
    assert (raw.name, raw.classes, raw.test) == ("mine", ("0", "1", "2"), None)
    assert torch.equal(raw.train.images, torch.from_numpy(IMAGES))
    assert raw.train.labels.tolist() == LABELS.tolist()


def test_gray_images_may_have_no_side_of_channels(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "mine.npz", images=IMAGES[:, 0] / np.float32(255), labels=LABELS)
    raw = read(DataSettings(str(tmp_path / "mine.npz")))
    assert torch.equal(raw.train.images, torch.from_numpy(IMAGES[:, :1]))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": IMAGES}, "no array labels or label or targets or y; there is images"),
        ({"images": IMAGES, "labels": LABELS[:4]}, "labels: int64"),
        ({"images": IMAGES * 2.0, "labels": LABELS}, "pixel"),
        ({"images": np.array([{}] * 12), "labels": LABELS}, "allow_pickle"),
    ],
    ids=["absent", "fewer", "pixels", "objects"],
)
def test_what_is_no_data_set_is_one_line(tmp_path: Path, arrays, said) -> None:
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(SettingError, match=rf"^data\.source: got .*mine\.npz.*{said}"):
        read(DataSettings(str(tmp_path / "mine.npz")))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no archive"])
def test_damage_is_one_line(tmp_path: Path, content) -> None:
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(SettingError, match=r"^data\.source: got .*mine\.npz"):
        read(DataSettings(str(tmp_path / "mine.npz")))


def test_arrays_that_do_not_fit_into_memory_are_not_unpacked(tmp_path: Path, monkeypatch) -> None:
    np.savez(tmp_path / "mine.npz", images=IMAGES, labels=LABELS)
    asked = []

    def refuse(size: int, setting: str, what: str) -> None:
        asked.append(size)
        raise SettingError(setting, f"{what}, too large", "less")

    monkeypatch.setattr(npz, "check_memory", refuse)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(SettingError, match=r"^data\.source: got the arrays of mine\.npz, too large"):
        read(DataSettings(str(tmp_path / "mine.npz")))
    assert IMAGES.nbytes + LABELS.nbytes < asked[0] < IMAGES.nbytes + LABELS.nbytes + 1000
