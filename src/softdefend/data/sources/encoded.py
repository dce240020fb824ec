"""From a source's list of encoded images to data that are decoded when they are needed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.data.base import Split
from softdefend.data.encoded import Decoder, EncodedImages
from softdefend.data.raw import RawData
from softdefend.data.settings import DataSettings
from softdefend.data.table import Row, Table, write_table

_log = logging.getLogger(__name__)


class Listing(NamedTuple):
    """The images of one split."""

    rows: Callable[[], Iterable[Row]]
    """Gives them one by one, from the beginning."""
    size: int
    """How many."""
    root: Path | None
    """Folder of images in files of their own; None where rows bring the bytes."""


class Source(NamedTuple):
    """What there is to know of a source before its images are looked at."""

    name: str
    classes: tuple[str, ...]
    first_label: int
    notes: dict[str, Any]


def read_or_list(
    cache: Path,
    key: str,
    settings: DataSettings,
    describe: Callable[[], tuple[Source, dict[str, Listing]]],
) -> RawData:
    """A source's data with images that stay encoded; their table is made once.

    Args:
        cache: folder of the tables.
        key: which tells this source, and how it is read, from others.
        settings: say how images are decoded.
        describe: lists the source: ``train`` and perhaps ``test``.

    Raises:
        SettingError: images that cannot be read, or of different sizes without ``data.image_size``.
    """
    about = cache / f"{key}.json"
    with _alone(about):
        if not _is_whole(about):
            _list(about, settings, describe)
    known = json.loads(about.read_bytes())
    tables = {part: Table(about.with_suffix(f".{part}.arrow")) for part in known["parts"]}
    mode = _mode(tables["train"], settings)
    splits = {part: _split(table, mode, settings) for part, table in tables.items()}
    notes, classes, first = known["notes"], tuple(known["classes"]), known["first_label"]
    return RawData(known["name"], splits["train"], splits.get("test"), classes, notes, first)


@contextlib.contextmanager
def _alone(about: Path) -> Iterator[None]:
    """Let one process at a time make the tables; the others then find them.

    Raises:
        SettingError: the cache cannot be written.
    """
    try:
        about.parent.mkdir(parents=True, exist_ok=True)
        lock = open(about.with_suffix(".lock"), "w")  # noqa: SIM115 (held below)
    except OSError as error:
        given = f"{about.parent} ({error.strerror})"
        raise SettingError("data.cache", given, "a folder that can be written") from None
    with lock:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_whole(about: Path) -> bool:
    """Whether the tables are there."""
    if not about.is_file():
        return False
    parts = json.loads(about.read_bytes())["parts"]
    return all(about.with_suffix(f".{part}.arrow").is_file() for part in parts)


def _list(
    about: Path, settings: DataSettings, describe: Callable[[], tuple[Source, dict[str, Listing]]]
) -> None:
    """Write the tables of a source, and last what says that they are there."""
    source, listings = describe()
    _log.info("%s: its images are looked at once, and listed in %s", source.name, about.parent)
    remarks: list[str] = []
    for part, (rows, size, root) in listings.items():
        remarks += write_table(about.with_suffix(f".{part}.arrow"), rows(), size, settings, root)
    notes = {**source.notes, "residence": "stream"}
    if remarks:
        notes["images"] = "; ".join(remarks)
    content = {**source._asdict(), "notes": notes, "parts": list(listings)}
    write_atomic(about, json.dumps(content).encode())


def _mode(table: Table, settings: DataSettings) -> str:
    """L or RGB."""
    if settings.channels == "first":
        gray = table.column("gray")
        return "L" if len(gray) and gray[0] else "RGB"
    return {"gray": "L", "rgb": "RGB"}[settings.channels]


def _split(table: Table, mode: str, settings: DataSettings) -> Split:
    widths, heights = table.column("width"), table.column("height")
    if not len(widths):
        raise SettingError("data.source", f"{table.path} without images", "at least one image")
    side, size = settings.image_size, (int(heights[0]), int(widths[0]))
    others = (widths != widths[0]) | (heights != heights[0])
    if side is None and bool(others.any()):
        row = int(others.nonzero()[0])
        given = f"{table.name(row)} of {int(widths[row])}x{int(heights[row])} pixels"
        accepted = f"images of one size ({size[1]}x{size[0]}, as {table.name(0)}), or data.image_size"
        raise SettingError("data.source", given, accepted)
    decoder = Decoder(table, mode, size if side is None else (side, side), settings)
    return Split(EncodedImages(decoder, torch.arange(len(widths))), table.column("label"))
