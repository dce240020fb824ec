"""A look at a torch file before torch reads it: does it ask for no more time and memory than it is worth?

torch reads foreign files without executing them, but hashes and copies what they nest for ever, and unpacks
whatever their archive claims to hold.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import zipfile
from typing import Any, BinaryIO

from softdefend.core.memory import check_memory
from softdefend.core.pickles import BoundsError, UnreadableError, read_pickle

_MOST_PACKED = 200
"""Bytes that one byte of an archive may unpack to. torch packs nothing; its weights pack to about 0.9."""
_SMALL = 2**20
_LONGEST_PICKLE = 2**28
_LONGEST_DIRECTORY = 2**24
"""Bytes of an archive's list of records, which has about 60 for each tensor."""
_DICTIONARIES = {"collections.OrderedDict", "collections.Counter", "collections.defaultdict"}
_NEVER = {("builtins", "bytearray"), ("__builtin__", "bytearray")}
"""Names that torch calls, with which a few bytes make as much memory as they like."""


def check_torch_file(file: BinaryIO, name: str) -> None:
    """Refuse a torch file whose reading would take more than about a second and the memory that it needs.

    What else is wrong with it is left to torch to say.

    Args:
        file: at its beginning; it is left anywhere.
        name: what messages call it.

    Raises:
        BoundsError: its pickle or archive is beyond the bounds.
        PickleError, zipfile.BadZipFile: it is damaged.
        SettingError: its content does not fit into memory.
    """
    begins = file.read(4)
    with contextlib.suppress(UnreadableError):  # torch reads no more than we do
        if begins == b"PK\x03\x04":
            content, size = _archived_pickle(file, name)
            read_pickle(content, _Weights(size))
        elif begins:  # before torch 1.6: a magic number, versions, the machine, objects, keys of storages
            data = _whole(file)
            at, world = 0, _Weights(len(data))
            for _ in range(5):
                _, at = read_pickle(data, world, at)


def _whole(file: BinaryIO) -> bytes | mmap.mmap:
    """The content of a file, which need not fit into memory where it is one on disk."""
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except io.UnsupportedOperation:
        file.seek(0)
        return file.read()


def _archived_pickle(file: BinaryIO, name: str) -> tuple[bytes, int]:
    """The pickle in an archive, and the size of what the archive holds."""
    packed = file.seek(0, io.SEEK_END)
    if (listing := _directory_size(file, packed)) > _LONGEST_DIRECTORY:
        raise BoundsError(f"an archive whose list of records has {listing} bytes")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        size = sum(record.file_size for record in records)
        if size > _SMALL + _MOST_PACKED * packed:
            raise BoundsError(f"{size} bytes packed into {packed}")
        check_memory(size, name, "weights")
        pickles = [record for record in records if record.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _LONGEST_PICKLE:
            raise BoundsError("no record data.pkl of a usual size")
        return archive.read(pickles[0]), size


def _directory_size(file: BinaryIO, packed: int) -> int:
    """Bytes of a zip archive's list of records, which its last record tells; 0 where there is none."""
    start = max(0, packed - 22 - 2**16)  # 22 bytes, and a comment behind them
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    size = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    if size < 2**32 - 1:
        return size
    file.seek(int.from_bytes(tail[at - 12 : at - 4], "little"))  # of a second one, for large archives
    return int.from_bytes(file.read(48)[40:], "little")


class _Thing:
    """Stands for whatever torch makes of a name or a call."""

    def __init__(self, name: str, elements: int = 0) -> None:
        self.name, self.elements = name, elements


class _Weights:
    """The world of a pickle of torch, which makes nothing but its dictionaries.

    Args:
        size: bytes of what the storages lie in. Each of their elements takes one at least.
    """

    def __init__(self, size: int) -> None:
        self._to_store, self._to_encode = size, size
        self._storages: dict[str | bytes | int, _Thing] = {}

    def find(self, module: str, name: str) -> object:
        if (module, name) in _NEVER:
            raise BoundsError(f"a call of {module}.{name}")
        return _Thing(f"{module}.{name}")

    def call(self, function: object, arguments: tuple[Any, ...]) -> object:
        name = function.name if isinstance(function, _Thing) else ""
        if name in _DICTIONARIES:
            return {}
        if name == "_codecs.encode":
            self._to_encode -= sum(len(one) for one in arguments if isinstance(one, str))
            if self._to_encode < 0:
                raise BoundsError("one text encoded many times")
        if name.startswith("torch._utils._rebuild_tensor") and isinstance(arguments[0], _Thing):
            _check_extent(arguments[0].elements, *arguments[1:4])
        return _Thing(name)

    def build(self, item: object, state: object) -> None:
        if isinstance(state, tuple) and state and isinstance(state[0], _Thing):
            _check_extent(state[0].elements, *state[1:4])

    def persistent(self, name: object) -> object:
        match name:
            case ("storage" | b"storage", _, str() | bytes() | int() as key, _, int() as elements, *_):
                if key not in self._storages:
                    self._to_store -= abs(elements)
                    self._storages[key] = _Thing("storage", elements)
                if self._to_store < 0:
                    raise BoundsError("weights that are not in the file")
                return self._storages[key]
        return _Thing("")


def _check_extent(elements: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Refuse a tensor that reaches beyond its storage, which torch would enlarge for it."""
    if min(shape, default=1) > 0:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if last >= elements:
            raise BoundsError("a tensor larger than its weights in the file")
