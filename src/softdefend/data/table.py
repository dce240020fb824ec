"""Encoded images on disk that are read one by one: an Arrow file, mapped into memory, with a row for each.

Its pages are the system's, to be dropped whenever memory is short. The bytes of images from Parquet files,
whose compressed groups of rows allow no single one to be read, are copied into it; of images in files of
their own it has the names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from softdefend.core.errors import SettingError
from softdefend.core.files import read_bytes
from softdefend.data.decode import LARGEST, Look, all_damaged, look
from softdefend.data.settings import DataSettings

_CHUNK = 256
_ROOT = b"root"
_SCHEMA = pa.schema(
    {
        "name": pa.binary(),  # names of files may be no UTF-8
        "label": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "gray": pa.bool_(),
        "digest": pa.int64(),
        "data": pa.binary(),
    }
)


class Row(NamedTuple):
    """One image, as a source gives it."""

    name: str
    """What messages call it; for an image in a file of its own the path below the table's root."""
    label: int
    data: bytes | None
    """Encoded; None in a file of its own."""


class Table:
    """Rows of encoded images in a file that :func:`write_table` wrote. It is opened at its first use, and in
    another process anew.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}  # a mapping cannot be sent to another process

    @property
    def _file(self) -> Any:
        if self._opened is None:
            try:
                self._opened = pa.ipc.open_file(pa.memory_map(os.fspath(self.path)))
            except (pa.ArrowException, OSError) as error:
                given = f"{self.path} ({' '.join(str(error).split())})"
                raise SettingError("data.cache", given, "an intact file, or none: it is made again") from None
        return self._opened

    @cached_property
    def root(self) -> Path | None:
        """The folder of images in files of their own."""
        root = os.fsdecode(self._file.schema.metadata[_ROOT])
        return Path(root) if root else None

    def column(self, name: str) -> Tensor:
        """A column of numbers, [n] int64."""
        parts = (self._file.get_batch(i).column(name) for i in range(self._file.num_record_batches))
        values = [torch.tensor(part.cast(pa.int64()).to_numpy()) for part in parts]
        return torch.cat(values) if values else torch.empty(0, dtype=torch.int64)

    def name(self, row: int) -> str:
        """What messages call the image of a row."""
        return os.fsdecode(self._cell(row, "name").as_py())

    def content(self, row: int) -> Any:
        """The encoded image of a row: bytes, or a view of mapped ones.

        Raises:
            SettingError: its file cannot be read.
        """
        cell = self._cell(row, "data")
        if cell.is_valid:
            return cell.as_buffer()
        assert self.root is not None
        path = self.root / self.name(row)
        try:
            return read_bytes(path, LARGEST)
        except OSError as error:
            raise SettingError("data.source", f"{path} ({error.strerror})", "readable images") from None

    def _cell(self, row: int, column: str) -> Any:
        return self._file.get_batch(row // _CHUNK).column(column)[row % _CHUNK]


def write_table(
    path: Path,
    rows: Iterable[Row],
    count: int,
    how: DataSettings,
    root: Path | None = None,
) -> list[str]:
    """Look at every image once, and write the rows.

    No more than some hundred images are in memory. Of each are noted the size of the upright image, whether
    it is gray, and a digest of its bytes.

    Args:
        path: of the file, written whole or not at all.
        rows: of the images.
        count: how many, for the progress bar.
        how: has ``sixteen_bit`` and ``skip_damaged``. With the latter every image is decoded.
        root: the folder of images in files of their own.

    Returns:
        A sentence about images that were left out, if there are any.

    Raises:
        SettingError: images that cannot be read, or a disk that is full.
    """
    damaged: list[SettingError] = []
    temporary = path.with_suffix(f".{os.getpid()}.tmp")

    def looked(row: Row) -> Look | SettingError:
        try:
            data = row.data if root is None else read_bytes(root / row.name, LARGEST)
        except OSError as error:
            return SettingError("data.source", f"{root}/{row.name} ({error.strerror})", "readable images")
        if data is None:
            return SettingError("data.source", f"{row.name} (no bytes)", "images stored in the file")
        return look(data, row.name, how)

    def batches() -> Iterator[pa.RecordBatch]:
        waiting: list[tuple[Row, Look]] = []
        with (
            ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool,
            tqdm(total=count, desc="reading", unit="img", unit_scale=True, disable=None) as bar,
        ):
            source = iter(rows)
            while chunk := list(islice(source, _CHUNK)):
                for row, found in zip(chunk, pool.map(looked, chunk), strict=True):
                    if isinstance(found, SettingError):
                        damaged.append(found)
                    else:
                        waiting.append((row, found))
                bar.update(len(chunk))
                if len(waiting) >= _CHUNK:
                    yield _record(waiting[:_CHUNK])
                    waiting = waiting[_CHUNK:]
        if waiting:
            yield _record(waiting)

    schema = _SCHEMA.with_metadata({_ROOT: os.fsencode(root.absolute() if root else "")})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.ipc.new_file(os.fspath(temporary), schema) as file:
            for batch in batches():
                file.write_batch(batch)
        if damaged and not how.skip_damaged:
            raise all_damaged(damaged)
        temporary.replace(path)
    except (OSError, pa.ArrowException) as error:
        accepted = "a folder with space for a copy of the encoded images"
        raise SettingError("data.cache", f"{path.parent} ({error})", accepted) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if not damaged:
        return []
    named = ", ".join(str(error.given) for error in damaged[:10]) + (", ..." if len(damaged) > 10 else "")
    return [f"{len(damaged)} of {count} images are damaged and left out: {named}"]


def _record(rows: list[tuple[Row, Look]]) -> pa.RecordBatch:
    columns = {
        "name": [os.fsencode(row.name) for row, _ in rows],
        "label": [row.label for row, _ in rows],
        "width": [found.width for _, found in rows],
        "height": [found.height for _, found in rows],
        "gray": [found.gray for _, found in rows],
        "digest": [found.digest for _, found in rows],
        "data": [row.data for row, _ in rows],
    }
    return pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)
