"""From the source setting to the reader that understands it."""

from __future__ import annotations

from pathlib import Path

from softdefend.core.errors import SettingError
from softdefend.data.cache import default_folder
from softdefend.data.raw import Raw
from softdefend.data.settings import DataSettings
from softdefend.data.sources import cifar, digits, folder, hub, parquet

_KINDS = (
    "digits, hf:owner/name, a Parquet file or a folder of them, a folder of images (class/name.png), or a "
    "folder cifar-10-batches-py or cifar-100-python"
)


def read(settings: DataSettings) -> Raw:
    """The source's data as they are.

    Raises:
        SettingError: a source that does not exist or cannot be read, in one line.
    """
    cache = _expanded("data.cache", settings.cache) if settings.cache else default_folder()
    if settings.source == "digits":
        _without_columns(settings, "image_column", "label_column")
        return digits.read()
    if settings.source.startswith("hf:"):
        path = hub.download(settings.source)
        return parquet.read(path, settings.image_column, settings.label_column, cache, settings.source)
    path = _expanded("data.source", settings.source)
    try:
        return _read_path(path, settings, cache)
    except OSError as error:  # of any look at the files: a name too long, a folder that may not be entered
        name = error.filename or settings.source
        raise SettingError(
            "data.source", f"{name} ({error.strerror or error})", "a path that can be read"
        ) from None


def _expanded(setting: str, path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise SettingError(setting, f"{path} (no such user)", "a path; ~ is your own home folder") from None


def _read_path(path: Path, settings: DataSettings, cache: Path) -> Raw:
    if not path.exists():
        raise SettingError(
            "data.source",
            settings.source,
            "digits, hf:owner/name, or the path of a file or folder that exists",
        )
    columns = settings.image_column, settings.label_column
    if path.is_file():
        if path.suffix != ".parquet" and not _starts_as_parquet(path):
            raise SettingError("data.source", f"{settings.source}, which is not a Parquet file", _KINDS)
        return parquet.read(path, *columns, cache, path.resolve().name)
    if not path.is_dir():
        raise SettingError("data.source", f"{settings.source}, which is neither file nor folder", _KINDS)
    layout = cifar.find(path)
    if layout is not None:
        _without_columns(settings, "image_column")
        return cifar.read(layout, settings.label_column)
    if parquet.holds_files(path):
        _without_images(path)
        return parquet.read(path, *columns, cache, path.resolve().name)
    _without_columns(settings, "image_column", "label_column")
    return folder.read(path, cache)


def _starts_as_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _without_images(root: Path) -> None:
    """Refuses two data sets in one folder. One folder of images is none: it may hold a page's figures."""
    beside = folder.class_folders(root)
    if len(beside) > 1:
        raise SettingError(
            "data.source",
            f"{root} with Parquet files and with images in {beside[0].name} and {beside[1].name}",
            "a folder of Parquet files or of images, not both",
        )


def _without_columns(settings: DataSettings, *names: str) -> None:
    """Refuses column names where they would have no effect."""
    for name in names:
        if (given := getattr(settings, name)) is not None:
            raise SettingError(
                f"data.{name}", given, f"no column for the source {settings.source}, which has none"
            )
