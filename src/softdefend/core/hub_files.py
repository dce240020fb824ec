"""Files that the client of the Hugging Face hub keeps, against the hashes by which the hub knows them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError

_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def download(get: Callable[[], str | Path], address: str, setting: str, accepted: str) -> Path:
    """The folder that the client downloads to.

    Args:
        get: asks the client; what is there already is not downloaded again.
        address: what the user asked for.
        setting: by which.
        accepted: for the message.

    Raises:
        SettingError: any reason for which the client could not get the files.
    """
    try:
        return Path(get())
    except Exception as error:  # the client's own errors and those of its HTTP library share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SettingError(setting, f"{address} ({reason})", accepted) from None


def damaged_files(root: Path) -> list[Path]:
    """Downloaded files whose content is not what the hub's hash of them says, in the order of their names.

    The client keeps content under its hash (sha256 for large files, git's sha1 for small ones), and links to
    it. A file that is no such link has no hash to be compared with.
    """
    return sorted(path for path in root.rglob("*") if path.is_symlink() and not _intact(path))


def _intact(path: Path) -> bool:
    known = Path(os.readlink(path)).name
    try:
        if _SHA256.fullmatch(known):
            return file_digest(path) == known
        if _GIT.fullmatch(known):
            content = path.read_bytes()
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == known
    except OSError:
        return False
    return True


def discard(files: list[Path]) -> None:
    """Remove downloaded files with their content, so that the next download gets them anew."""
    for path in files:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def check_hashes(root: Path, address: str, setting: str) -> None:
    """Refuse downloaded files that were altered.

    Raises:
        SettingError: naming the first.
    """
    for path in damaged_files(root):
        given = f"{address}, of which {path.name} does not have the hash that the hub gives"
        raise SettingError(setting, given, "the files of the hub; the next start asks for them again")
