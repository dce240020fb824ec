"""Decoded images on disk: one safetensors file per source, checked against a sha256 of its content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from softdefend.core.digest import checksum
from softdefend.core.files import parse_json
from softdefend.core.memory import check_memory
from softdefend.core.safetensors_files import open_safetensors
from softdefend.data.base import Split
from softdefend.data.raw import RawData

_log = logging.getLogger(__name__)
_FORMAT = 3
"""Part of every key: goes up where the same files are decoded or checked otherwise, so that nothing old is
taken for it."""


def source_key(files: Iterable[Path], **options: object) -> str:
    """sha256 of the paths, sizes and modification times of a source's files, and of the reader's options."""
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([_FORMAT, sorted(stats), options]).encode()).hexdigest()


def read_or_build(folder: Path, key: str, build: Callable[[], RawData]) -> RawData:
    """Read the data stored under ``key``; build and store them where they are absent or damaged.

    A cache never stops a run: a damaged file is rebuilt and a folder that cannot be written is done without;
    both are logged as warnings.
    """
    path = folder / f"{key}.safetensors"
    raw = _read(path)
    if raw is None:
        raw = build()
        _write(path, raw)
    return raw


def _read(path: Path) -> RawData | None:
    try:
        if not path.is_file():
            return None
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        _log.warning("cache file %s is rebuilt: %s", path, error)
        return None
    check_memory(2 * size, "data.source", "decoded images, with their copies in the splits,")
    try:
        with open_safetensors(path) as file:
            header = parse_json(file.metadata()["softdefend"])
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if checksum(tensors.items()) != header["checksum"]:
            raise ValueError("its content does not match its checksum")
        test = Split(tensors["test.images"], tensors["test.labels"]) if header["test"] else None
        train = Split(tensors["train.images"], tensors["train.labels"])
        classes, first_label = tuple(header["classes"]), int(header["first_label"])
        return RawData(header["name"], train, test, classes, header["notes"], first_label)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        _log.warning("cache file %s is rebuilt: %s", path, error)
        return None


def _write(path: Path, raw: RawData) -> None:
    assert isinstance(raw.train.images, Tensor)
    tensors = {"train.images": raw.train.images, "train.labels": raw.train.labels}
    if raw.test is not None:
        assert isinstance(raw.test.images, Tensor)
        tensors |= {"test.images": raw.test.images, "test.labels": raw.test.labels}
    header = {
        "checksum": checksum(sorted(tensors.items())),
        "name": raw.name,
        "test": raw.test is not None,
        "classes": raw.classes,
        "notes": raw.notes,
        "first_label": raw.first_label,
    }
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # its own: several runs may decode at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, {"softdefend": json.dumps(header)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        _log.warning("decoded images are not cached: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink()
