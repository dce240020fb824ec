"""What torch.compile and Triton have compiled, kept on disk between processes and restarts of the machine."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from functools import cache
from pathlib import Path

import torch

from softdefend.core.files import cache_folder

_log = logging.getLogger(__name__)

LIMIT = 4 * 2**30
"""Bytes from which on the oldest is removed, until three quarters are left."""
_IN_USE = 24 * 3600.0
"""Seconds after its last use in which nothing is removed: another process may be about to load it."""
_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "", "TRITON_CACHE_DIR": "triton"}
"""Variables by which torch and Triton are told where to keep it, and the folder of each."""


@cache
def keep_compiled_code() -> None:
    """Have torch and Triton keep what they compile in the user's cache folder, where nobody said otherwise.

    Their own choice is a temporary folder. Both key it by source, versions and device and write whole files,
    so several processes can share it. A folder that cannot be written is done without.
    """
    folder = cache_folder() / "compiled" / f"torch-{torch.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        _log.info("%s: cannot be written; compiled code is kept in a temporary folder", folder)
        return
    remove_oldest(folder.parent, LIMIT)
    for variable, part in _FOLDERS.items():
        os.environ.setdefault(variable, str(folder / part))


def remove_oldest(folder: Path, limit: int, now: float | None = None) -> None:
    """Bring a folder of more than ``limit`` bytes to three quarters of it, by removing what has not been used
    for longest; a folder of files at a time, since these belong together.

    Args:
        folder: with folders of files, at any depth.
        limit: bytes.
        now: seconds, as :func:`time.time` has them.
    """
    now = time.time() if now is None else now
    found: list[tuple[float, int, list[str]]] = []
    for place, _, names in os.walk(folder):
        paths, used, size = [os.path.join(place, name) for name in names], 0.0, 0
        for path in paths:
            with contextlib.suppress(OSError):  # another process has removed it
                about = os.stat(path)
                used, size = max(used, about.st_atime, about.st_mtime), size + about.st_size
        found.append((used, size, paths))
    total = sum(size for _, size, _ in found)
    for used, size, paths in sorted(found) if total > limit else ():
        if total <= 0.75 * limit or used > now - _IN_USE:
            return
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        total -= size
