"""From the source setting to the reader that understands it."""

from __future__ import annotations

from pathlib import Path

from softdefend.data.cache import default_folder
from softdefend.data.raw import Raw
from softdefend.data.settings import DataSettings
from softdefend.data.sources import cifar, digits, folder, hub, parquet
from softdefend.errors import SettingError


def read(settings: DataSettings) -> Raw:
    """The source's data as they are.

    Raises:
        SettingError: a source that does not exist or cannot be read, in one line.
    """
    cache = Path(settings.cache).expanduser() if settings.cache else default_folder()
    if settings.source == "digits":
        _without_columns(settings, "image_column", "label_column")
        return digits.read()
    if settings.source.startswith("hf:"):
        path = hub.download(settings.source)
        return parquet.read(path, settings.image_column, settings.label_column, cache, settings.source)
    path = Path(settings.source).expanduser()
    if not path.exists():
        raise SettingError(
            "data.source",
            settings.source,
            "digits, hf:owner/name, or the path of a file or folder that exists",
        )
    layout = cifar.find(path)
    if layout is not None:
        _without_columns(settings, "image_column")
        return cifar.read(layout, settings.label_column)
    if path.is_file() or next(path.rglob("*.parquet"), None) is not None:
        return parquet.read(path, settings.image_column, settings.label_column, cache, path.resolve().name)
    _without_columns(settings, "image_column", "label_column")
    return folder.read(path, cache)


def _without_columns(settings: DataSettings, *names: str) -> None:
    """Refuses column names where they would have no effect."""
    for name in names:
        if (given := getattr(settings, name)) is not None:
            raise SettingError(
                f"data.{name}", given, f"no column for the source {settings.source}, which has none"
            )
