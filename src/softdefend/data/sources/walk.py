"""Lists of what a source's folders hold. A folder that cannot be read is refused, not passed over."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from softdefend.core.errors import SettingError


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the folders in a folder, by name, and its files, in no useful order.

    Links count as what they lead to. Hidden ones, and links that lead nowhere, are left out.

    Raises:
        SettingError: naming what cannot be read.
    """
    folders: list[Path] = []
    files: list[Path] = []
    here: str | Path = folder
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                here = entry.path
                if not entry.name.startswith("."):
                    _sort_in(entry, folders, files)
    except OSError as error:
        raise SettingError(
            "data.source", f"{here} ({error.strerror})", "folders and files that can be read"
        ) from None
    return sorted(folders), files


def walk_files(folder: Path, inside: Path | None = None) -> Iterator[Path]:
    """List the files at any depth of ``folder``, in no useful order, without hidden files and folders.

    Linked folders are followed. Each real folder is read once, by its own name rather than a link's where it
    has both, and none that holds ``folder`` or is or holds ``inside``: such a link would lead round in a
    circle, and out of one class into the others.

    Raises:
        SettingError: naming what cannot be read.
    """
    seen = set(_above(folder)) | (set() if inside is None else {_real(inside), *_above(inside)})
    pending, links = [folder], deque[Path]()
    while pending or links:
        here = pending.pop() if pending else links.popleft()
        if (real := _real(here)) in seen:
            continue
        seen.add(real)
        folders, files = list_folder(here)
        yield from files
        for path in folders:
            (links if path.is_symlink() else pending).append(path)


def _sort_in(entry: os.DirEntry[str], folders: list[Path], files: list[Path]) -> None:
    try:
        if entry.is_dir():
            folders.append(Path(entry.path))
        elif entry.is_file():
            files.append(Path(entry.path))
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself leads nowhere
            raise


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on some loops, in some versions of Python


def _above(path: Path) -> tuple[Path, ...]:
    return tuple(_real(path).parents)
