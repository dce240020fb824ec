"""Data sets of the Hugging Face hub: only their Parquet files are downloaded, once, and checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import huggingface_hub

from softdefend.core import hub_files
from softdefend.core.errors import SettingError
from softdefend.data.raw import RawData
from softdefend.data.settings import DataSettings
from softdefend.data.sources import parquet
from softdefend.data.sources.base import COLUMNS, SOURCES, Source

_ADDRESS = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w./-]+))?")


def download(address: str) -> Path:
    """Download ``hf:owner/name``, or one configuration of it, ``hf:owner/name/config``; its local folder.

    Raises:
        SettingError: a malformed id, or any reason for which the client could not get the files.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or ".." in address:
        raise SettingError("data.source", address, "hf:owner/name or hf:owner/name/config")
    repo, config = match["repo"], match["config"]
    pattern = f"{config}/*.parquet" if config else "*.parquet"
    root = hub_files.download(
        lambda: huggingface_hub.snapshot_download(repo, repo_type="dataset", allow_patterns=[pattern]),
        address,
        "data.source",
        "a data set of the hub that can be reached, or a local path",
    )
    return root / config if config else root


@SOURCES.register("hub")
class Hub(Source):
    """A data set of the hub."""

    address = "hf:owner/name"
    columns = COLUMNS
    decodes = True
    streams = True
    priority = 1

    def recognizes(self, address: str, path: Path) -> bool:
        return address.startswith("hf:")

    def read(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        return _checked(settings, cache, parquet.read_files)

    def read_encoded(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        return _checked(settings, cache, parquet.read_encoded)


def _checked(settings: DataSettings, cache: Path, read: Callable[..., RawData]) -> RawData:
    """Downloaded files, checked before they are read; damaged ones are downloaded again."""
    root = download(settings.source)
    try:
        return _read(root, settings, cache, read)
    except SettingError:
        if not (damaged := hub_files.damaged_files(root)):
            raise
    hub_files.discard(damaged)
    return _read(download(settings.source), settings, cache, read)


def _read(root: Path, settings: DataSettings, cache: Path, read: Callable[..., RawData]) -> RawData:
    check = partial(hub_files.check_hashes, root, settings.source, "data.source")
    return read(root, settings, cache, settings.source, check=check)
