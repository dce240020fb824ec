"""Writing files so that a crash or a full disk loses nothing that was there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from softdefend.errors import SettingError


def write_atomic(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to disk, rename: a reader sees the old file or the new one.

    Raises:
        SettingError: the disk is full or the folder is not writable; what stood at ``path`` still does.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The temporary file may hold the last free bytes of the disk.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SettingError(
            str(path),
            error.strerror or error,
            "a writable place with enough free space; nothing was overwritten",
        ) from error
