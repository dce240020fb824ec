"""Writing files so that a crash or a full disk loses nothing that was there, and reading no other things."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import itertools
import json
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from softdefend.core.errors import SettingError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""The name of a temporary file: that of the file to be, and the writing process."""


def cache_folder() -> Path:
    """``softdefend`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softdefend"


def check_regular(path: Path, most: int | None = None) -> int:
    """The size of a file in bytes, of one that can be read to its end.

    Args:
        path: of the file, or of a link to it.
        most: bytes that it may have.

    Raises:
        OSError: there is no such file; it is a folder, a device, a pipe or a socket, whose reading may never
            end; it has more than ``most`` bytes; the name is none that the system could have.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # a NUL, or characters that the file system's encoding has not
        raise OSError(errno.EINVAL, f"no possible name of a file: {error}", str(path)) from None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    if most is not None and status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes, where {most} are the most", str(path))
    return status.st_size


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file of at most ``most`` bytes.

    Raises:
        OSError: as :func:`check_regular` does, or it cannot be read.
    """
    size = check_regular(path, most)
    with open(path, "rb") as file:
        return file.read(size)


def parse_json(text: str | bytes) -> Any:
    """A JSON text as plain values.

    Raises:
        ValueError: it is none, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def keep_earlier(*paths: Path) -> Path:
    """Copy files of one folder that are about to be replaced to ``earlier/NUMBER/`` beside them.

    Returns:
        The folder of the copies.

    Raises:
        SettingError: it cannot be written.
    """
    beside = paths[0].parent / "earlier"
    kept = next(place for number in itertools.count(1) if not (place := beside / str(number)).exists())
    for path in filter(Path.is_file, paths):
        write_atomic(kept / path.name, path.read_bytes())
    return kept


def write_atomic(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to disk, rename: a reader sees the old file or the new one.

    Raises:
        SettingError: the disk is full or the folder is not writable; what stood at ``path`` still does.
    """
    # Of this process alone: another may be writing the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        with _create(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        # The temporary file may hold the last free bytes of the disk.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def _create(temporary: Path) -> Iterator[BinaryIO]:
    """A new file, locked until it is closed, so that :func:`sweep` leaves it alone."""
    while True:
        with open(temporary, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # else it was swept before it was locked
                yield file
                return


def sweep(folder: Path, name: str = "*") -> None:
    """Remove temporary files that killed processes have left in a folder. Those that are still being written
    are locked and stay.

    Args:
        folder: which may be missing.
        name: of the files to be; all where it is ``*``.
    """
    if not os.path.isdir(folder):
        return
    for left in folder.glob(f".{name if name == '*' else glob.escape(name)}.*.tmp"):
        if _TEMPORARY.fullmatch(left.name) and left.is_file():
            with contextlib.suppress(OSError), open(left, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), left.stat()):  # not renamed meanwhile
                    left.unlink()


def move(source: Path, target: Path) -> None:
    """Put a file in another's place at once.

    Raises:
        SettingError: it cannot be; both stand as they did.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(path: Path, error: OSError) -> SettingError:
    accepted = "a writable place with enough free space; nothing was overwritten"
    return SettingError(str(path), error.strerror or error, accepted)


class Writer:
    """Does pieces of work in order, in a thread, while the caller goes on: a GPU need not wait for a disk.

    What fails is raised by the next call, and nothing given after it is done: a later file may count on an
    earlier one. The interpreter does not exit before all is done.

    Args:
        background: in a thread; else at once, which is right where it would take time from the caller.
    """

    _MOST = 3
    """Pieces that may be waiting; most hold what they are to write."""

    def __init__(self, *, background: bool = True) -> None:
        self._background = background
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[object]] = deque()
        self._failed: BaseException | None = None

    def __call__(self, work: Callable[[], object]) -> None:
        """Have ``work`` done after all that was given before.

        Raises:
            SettingError: this or an earlier piece could not be written.
        """
        if not self._background:
            work()
            return
        while len(self._waiting) >= self._MOST or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        if self._failed is not None:
            raise self._failed
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._waiting.append(self._pool.submit(self._do, work))

    def wait(self) -> None:
        """Return once everything given is done.

        Raises:
            SettingError: a piece could not be written.
        """
        while self._waiting:
            self._waiting.popleft().exception()
        if self._failed is not None:
            raise self._failed

    def _do(self, work: Callable[[], object]) -> None:
        if self._failed is None:
            try:
                work()
            except BaseException as error:
                self._failed = error
                raise
