"""A folder of images: ``class/name.png``, or ``train/class/name.png`` and ``test/class/name.png``."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from softdefend.core.errors import SettingError
from softdefend.core.files import read_bytes
from softdefend.data.base import Split, split
from softdefend.data.cache import read_or_build, source_key
from softdefend.data.decode import LARGEST, decode
from softdefend.data.holdout import complement
from softdefend.data.raw import RawData
from softdefend.data.settings import DataSettings
from softdefend.data.sources import encoded as listed
from softdefend.data.sources.base import DECODING, LOOKING, SOURCES, Source
from softdefend.data.sources.walk import list_folder, walk_files
from softdefend.data.table import Row

_log = logging.getLogger(__name__)
_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".avif"),
    *(".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
}
_OUTSIDE = "images outside of the folders of classes"
_TEST_FOLDERS = ("test", "validation", "valid", "val")


@SOURCES.register("folder")
class ImageFolder(Source):
    """A folder of images, by class and perhaps by split."""

    address = "a folder of images (class/name.png)"
    decodes = True
    streams = True
    priority = -1

    def recognizes(self, address: str, path: Path) -> bool:
        return path.is_dir()

    def read(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        return read_folder(path, cache, settings)

    def read_encoded(self, settings: DataSettings, path: Path, cache: Path) -> RawData:
        return read_folder(path, cache, settings, encoded=True)


def read_folder(
    root: Path, cache: Path, settings: DataSettings | None = None, *, encoded: bool = False
) -> RawData:
    """Read images by folder.

    Classes and files are taken in the order of their names; files may lie deeper. If ``root`` has a ``train``
    folder, the test split is the first of ``test``, ``validation``, ``valid`` and ``val`` that has images by
    class, if any has; upper and lower case are the same. Hidden files and folders are passed over, and so are
    files that are no images by their names or lie in no class, which a line counts. Linked folders are
    followed.

    Args:
        root: the folder.
        cache: folder of decoded images.
        settings: say how images are decoded; as they are by default when None.
        encoded: leave the images encoded, and their pixels on the disk.

    Raises:
        SettingError: no images, a folder that cannot be read, a folder that may be a split or a class, a test
            class that training does not have, undecodable images.
    """
    how = settings or DataSettings()
    splits = _splits(root)
    train_folder = splits.get("train")
    other: Counter[str] = Counter()
    train_files = _by_class(train_folder or root, other)
    if not train_files:
        accepted = "class/name.png or train/class/name.png, or Parquet files"
        if train_folder is None:
            raise SettingError("data.source", f"{root} without images", accepted)
        raise SettingError(
            "data.source",
            f"{root}, whose folder {train_folder.name} was read as the training split, without images in "
            "folders of classes there",
            f"{accepted}; a class called train needs another name",
        )
    classes = tuple(train_files)
    present = [splits[name] for name in _TEST_FOLDERS if train_folder and name in splits]
    # ImageNet's test folder has images without labels.
    held_out = next((folder for folder in present if _by_class(folder, Counter())), next(iter(present), None))
    if train_folder and not held_out:
        _refuse_classes_beside(train_folder)
    test_files = _by_class(held_out, other) if held_out else {}
    unknown = [name for name in test_files if name not in classes]
    if unknown:
        raise SettingError(
            "data.source", f"test class {unknown[0]} in {root}", f"training's classes: {', '.join(classes)}"
        )
    files = [file for group in (train_files, test_files) for paths in group.values() for file in paths]

    def build() -> RawData:
        remarks: list[str] = []
        train = _read_split(train_files, classes, root, how, remarks)
        test = _read_split(test_files, classes, root, how, remarks) if test_files else None
        notes = {"images": "; ".join(remarks)} if remarks else {}
        return RawData(root.resolve().name, train, test, classes, notes)

    def describe() -> tuple[listed.Source, dict[str, listed.Listing]]:
        groups = {"train": train_files} | ({"test": test_files} if test_files else {})
        listings = {part: _listing(by_class, classes, root) for part, by_class in groups.items()}
        return listed.Source(root.resolve().name, classes, 0, {}), listings

    options = {name: getattr(how, name) for name in (LOOKING if encoded else DECODING)}
    reader = "encoded folder" if encoded else "folder"
    key = source_key(files, reader=reader, root=str(root.absolute()), **options)
    raw = listed.read_or_list(cache, key, how, describe) if encoded else read_or_build(cache, key, build)
    counts = _in_words(Counter(map(_suffix, files)))
    if left_out := _in_words(+other):
        _log.info("%s: files that are not read: %s", raw.name, left_out)
        counts += f"; not read: {left_out}"
    return replace(raw, notes={**raw.notes, "files": counts})


def class_folders(root: Path) -> list[Path]:
    """The folders of ``root``, or of its ``train`` folder, that hold images.

    Raises:
        SettingError: naming what cannot be read.
    """
    base = _splits(root).get("train", root)
    return [folder for folder in list_folder(base)[0] if any(_images(folder, base))]


def _splits(root: Path) -> dict[str, Path]:
    """Name of a split, in lower case, to its folder."""
    found: dict[str, Path] = {}
    for folder in list_folder(root)[0]:
        name = folder.name.lower()
        if name in ("train", *_TEST_FOLDERS) and (other := found.setdefault(name, folder)) != folder:
            raise SettingError(
                "data.source",
                f"{root} with {other.name} and {folder.name}, which are the same split",
                f"one folder called {name}, in upper or lower case",
            )
    return found


def _refuse_classes_beside(train: Path) -> None:
    """Refuse images that would be left out because one class of many is called train."""
    for folder in list_folder(train.parent)[0]:
        if folder != train and any(_images(folder, train.parent)):
            raise SettingError(
                "data.source",
                f"{train.parent} with images in {folder.name} beside {train.name}, which was read as the "
                "training split",
                f"a test folder beside it, or {train} alone; a class called train needs another name",
            )


def _images(folder: Path, root: Path) -> Iterator[Path]:
    return (path for path in walk_files(folder, root) if _suffix(path) in _SUFFIXES)


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _in_words(counts: Counter[str]) -> str:
    """How many files have each suffix, the most frequent first."""
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in counts.most_common())


def _by_class(root: Path, other: Counter[str]) -> dict[str, list[Path]]:
    """Class name to its image files; classes without images are left out, and what is not read counted."""
    found: dict[str, list[Path]] = {}
    folders, beside = list_folder(root)
    other[_OUTSIDE] += sum(_suffix(path) in _SUFFIXES for path in beside)
    for folder in folders:
        files = sorted(walk_files(folder, root))
        found[folder.name] = [path for path in files if _suffix(path) in _SUFFIXES]
        other.update(_suffix(path) for path in files if _suffix(path) not in _SUFFIXES)
    return {name: images for name, images in found.items() if images}


def _listing(by_class: dict[str, list[Path]], classes: tuple[str, ...], root: Path) -> listed.Listing:
    """The images of a split as they are listed: without their bytes."""

    def rows() -> Iterator[Row]:
        for name, paths in by_class.items():
            label = classes.index(name)
            yield from (Row(str(path.relative_to(root)), label, None) for path in paths)

    return listed.Listing(rows, sum(map(len, by_class.values())), root)


def _read_split(
    by_class: dict[str, list[Path]],
    classes: tuple[str, ...],
    root: Path,
    how: DataSettings,
    remarks: list[str],
) -> Split:
    files = [path for paths in by_class.values() for path in paths]
    labels = [classes.index(name) for name, paths in by_class.items() for _ in paths]

    def content(i: int) -> bytes:
        try:
            return read_bytes(files[i], LARGEST)
        except OSError as error:
            raise SettingError("data.source", f"{files[i]} ({error.strerror})", "readable images") from None

    def name(i: int) -> str:
        return str(files[i].relative_to(root))

    skipped: list[int] = []
    images = decode(len(files), content, name, "decoding", how, skipped, remarks)
    return split(
        images, torch.tensor(labels)[complement(torch.tensor(skipped, dtype=torch.int64), len(files))]
    )
