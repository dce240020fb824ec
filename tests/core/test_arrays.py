from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from softdefend.core.arrays import open_arrays


def header(shape: tuple[int, ...], dtype: str) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back_as_numpy_wrote_them(tmp_path: Path, save) -> None:
    arrays = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.asfortranarray(np.ones((2, 5), ">i4"))}
    save(tmp_path / "x.npz", **arrays)
    with open_arrays(tmp_path / "x.npz") as file:
        assert file.names == ["a", "b"]
        for name, array in arrays.items():
            assert file.header(name) == (array.dtype, array.shape)
            np.testing.assert_array_equal(file.read(name), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header((2**40,), "<i8"), "an array int64"),
        (header((2**20, 2**20, 2**20), "<i8"), "an array int64"),
        (header((5,), "<i8"), "."),
        (header((5,), "|O"), "[Oo]bject arrays"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 60_000, "."),
        (b"no array", "."),
        (b"", "."),
    ],
)
def test_arrays_that_are_none_or_too_large_take_no_memory(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message), open_arrays(tmp_path / "x.npz") as file:
            file.read("a")
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
