"""From the setting ``data.source`` to the data that it names."""

from __future__ import annotations

import logging
from pathlib import Path

from softdefend.core.errors import SettingError
from softdefend.core.files import cache_folder
from softdefend.core.memory import TooLargeError
from softdefend.data.raw import RawData
from softdefend.data.settings import DataSettings
from softdefend.data.sources.base import COLUMNS, DECODING, SOURCES, Source

_log = logging.getLogger(__name__)


def read(settings: DataSettings) -> RawData:
    """Read a source's data as they are.

    Raises:
        SettingError: a source that does not exist or cannot be read, in one line.
    """
    cache = _expand("data.cache", settings.cache) if settings.cache else cache_folder()
    path = _expand("data.source", settings.source)
    try:
        source = _find(settings.source, path)
        _refuse_unused(settings, source)
        raw = _read(source, settings, path, cache)
    except OSError as error:  # of any look at the files: a name too long, a folder that may not be entered
        name = error.filename or settings.source
        raise SettingError(
            "data.source", f"{name} ({error.strerror or error})", "a path that can be read"
        ) from None
    if "images" in raw.notes:
        _log.info("%s: %s", raw.name, raw.notes["images"])
    return raw


def _read(source: Source, settings: DataSettings, path: Path, cache: Path) -> RawData:
    """The data where ``data.residence`` has them, or where they fit."""
    if settings.residence == "stream" and not source.streams:
        accepted = f"auto, device or host for the source {settings.source}, which has no encoded images"
        raise SettingError("data.residence", "stream", accepted)
    if settings.residence == "stream":
        return source.read_encoded(settings, path, cache)
    try:
        return source.read(settings, path, cache)
    except TooLargeError as error:
        if settings.residence != "auto" or not source.streams:
            raise
        _log.info("the images stay on disk (data.residence stream): %s; %s", error.given, error.accepted)
        return source.read_encoded(settings, path, cache)


def _find(address: str, path: Path) -> Source:
    """The first source that recognizes an address."""
    sources = _sources()
    for source in sources:
        if source.recognizes(address, path):
            return source
    if not path.exists():
        accepted = "digits, hf:owner/name, or the path of a file or folder that exists"
        raise SettingError("data.source", address, accepted)
    *kinds, last = sorted((source.address for source in sources), key=len)  # the short ones first
    given = "which is not a Parquet file" if path.is_file() else "which is neither file nor folder"
    raise SettingError("data.source", f"{address}, {given}", f"{', '.join(kinds)}, or {last}")


def _sources() -> list[Source]:
    """One of each kind, in the order in which they are asked."""
    found = []
    for name in SOURCES.names():
        try:
            found.append(SOURCES[name]())
        except SettingError as error:  # somebody else's package, which this address may not need
            _log.warning("%s", error)
    return sorted(found, key=lambda source: -source.priority)


def _refuse_unused(settings: DataSettings, source: Source) -> None:
    """Refuse settings of columns and images where they would have no effect."""
    for name in COLUMNS:
        if name not in source.columns and (given := getattr(settings, name)) is not None:
            accepted = f"no column for the source {settings.source}, which has none"
            raise SettingError(f"data.{name}", given, accepted)
    for name in DECODING:
        given, default = (getattr(one, name) for one in (settings, DataSettings()))
        if not source.decodes and given != default:
            accepted = f"{default} for the source {settings.source}, which has no encoded images"
            raise SettingError(f"data.{name}", given, accepted)


def _expand(setting: str, path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise SettingError(setting, f"{path} (no such user)", "a path; ~ is your own home folder") from None
