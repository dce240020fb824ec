"""A folder of images: ``class/name.png``, or ``train/class/name.png`` and ``test/class/name.png``."""

from __future__ import annotations

from pathlib import Path

import torch

from softdefend.data.base import Split, split
from softdefend.data.cache import cached, source_key
from softdefend.data.decode import decode
from softdefend.data.raw import Raw
from softdefend.errors import SettingError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_TEST_FOLDERS = ("test", "validation", "valid", "val")


def read(root: Path, cache: Path) -> Raw:
    """Images by folder. Classes and files are taken in the order of their names; files may lie deeper.

    If ``root`` has a ``train`` folder, the test split is ``test``, else ``validation``, ``valid`` or ``val``,
    else there is none. Hidden files and files that are not images are passed over.

    Raises:
        SettingError: no images, a test class that training does not have, undecodable images.
    """
    has_train = (root / "train").is_dir()
    train_files = _by_class(root / "train" if has_train else root)
    if not train_files:
        raise SettingError(
            "data.source",
            f"{root} without images",
            "class/name.png or train/class/name.png, or Parquet files",
        )
    classes = tuple(train_files)
    held_out = [name for name in _TEST_FOLDERS if has_train and (root / name).is_dir()]
    test_files = _by_class(root / held_out[0]) if held_out else {}
    unknown = [name for name in test_files if name not in classes]
    if unknown:
        raise SettingError(
            "data.source", f"test class {unknown[0]} in {root}", f"training's classes: {', '.join(classes)}"
        )
    files = [file for group in (train_files, test_files) for paths in group.values() for file in paths]

    def build() -> Raw:
        test = _read_split(test_files, classes, root) if test_files else None
        return Raw(root.resolve().name, _read_split(train_files, classes, root), test, classes)

    return cached(cache, source_key(files, reader="folder", root=str(root.absolute())), build)


def _by_class(root: Path) -> dict[str, list[Path]]:
    """Class name to its image files; classes without images are left out."""
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
        if images := sorted(path for path in files if path.is_file() and not path.name.startswith(".")):
            found[folder.name] = images
    return found


def _read_split(by_class: dict[str, list[Path]], classes: tuple[str, ...], root: Path) -> Split:
    files = [path for paths in by_class.values() for path in paths]
    labels = [classes.index(name) for name, paths in by_class.items() for _ in paths]

    def content(i: int) -> bytes:
        try:
            return files[i].read_bytes()
        except OSError as error:
            raise SettingError("data.source", f"{files[i]} ({error.strerror})", "readable images") from None

    def name(i: int) -> str:
        return str(files[i].relative_to(root))

    return split(decode(len(files), content, name, "decoding"), torch.tensor(labels))
