"""Files of NumPy arrays (.npz, .npy): nothing is unpickled, and nothing unpacked before its size is known."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from softdefend.core.files import check_regular

_LARGEST = 2**30
"""Bytes of a file, and of an array unpacked."""


class ArrayFile:
    """The arrays in an .npz file; see :func:`open_arrays`."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.names = [name.removesuffix(".npy") for name in archive.namelist()]
        """Of the arrays, in the order of the file."""

    def header(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape of an array, which is not read."""
        with self._open(name) as file:
            return _read_header(file)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """An array.

        Raises:
            ValueError: it is none, holds Python objects, or is too large.
        """
        dtype, shape = self.header(name)
        if math.prod(shape) * dtype.itemsize > _LARGEST:
            raise ValueError(f"an array {dtype} {list(shape)}, larger than {_LARGEST} bytes")
        with self._open(name) as file:
            array: np.ndarray[Any, Any] = np.lib.format.read_array(file, allow_pickle=False)
        return array

    def _open(self, name: str) -> IO[bytes]:
        return self._archive.open(f"{name}.npy")


@contextmanager
def open_arrays(path: Path) -> Iterator[ArrayFile]:
    """Open an .npz file.

    Raises:
        OSError: no such file, one that is no regular file, or a large one.
        ValueError: damage, on opening or on reading an array.
    """
    check_regular(path, _LARGEST)
    try:
        with zipfile.ZipFile(path) as archive:
            yield ArrayFile(archive)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged archive makes its reader fail in any way
        raise ValueError(f"{error or type(error).__name__}") from error


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """The array in a .npy file.

    Raises:
        OSError: no such file, one that is no regular file, or a large one.
        ValueError: it is none, holds Python objects, or is shorter than it says.
    """
    size = check_regular(path, _LARGEST)
    try:
        with open(path, "rb") as file:
            dtype, shape = _read_header(file)
            if math.prod(shape) * dtype.itemsize > size:
                raise ValueError(f"an array {dtype} {list(shape)}, larger than its file")
            file.seek(0)
            array: np.ndarray[Any, Any] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged header makes its reader fail in any way
        raise ValueError(f"{error or type(error).__name__}") from error
    return array


def _read_header(file: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return dtype, shape
