"""How much memory there is, so that what does not fit is refused before the system ends the process."""

from __future__ import annotations

import os
from pathlib import Path

from softdefend.core.errors import SettingError

_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where a container says what it may use, what it uses, and how much of that are copies of files."""


class TooLargeError(SettingError):
    """What does not fit into memory."""


def available_memory() -> int | None:
    """Bytes that this process can still get; None where the system does not say."""
    known = [_of_machine(), *(_of_group(*names) for names in _GROUPS)]
    return min((amount for amount in known if amount is not None), default=None)


def check_memory(needed: int, setting: str, what: str) -> None:
    """Refuse what takes more memory than there is.

    Args:
        needed: bytes.
        setting: which the message names.
        what: takes them.

    Raises:
        SettingError: it says how much it would take, and how much there is.
    """
    available = available_memory()
    if available is not None and needed > available:
        given = f"{what} that take {in_words(needed)} of memory"
        raise TooLargeError(setting, given, f"at most the {in_words(available)} that are free")


def in_words(count: int) -> str:
    """A number of bytes with its unit.

    >>> in_words(420 * 9000 * 9000 * 3)
    '102.1 GB'
    """
    amount, units = float(count), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.4g} {units[0]}"


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        amounts = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return amounts["MemAvailable"] + amounts["SwapFree"]
    except (OSError, ValueError, LookupError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _of_group(folder: str, limit: str, used: str, copies: str) -> int | None:
    try:
        most, taken = (int((Path(folder) / name).read_text()) for name in (limit, used))
        rows = (line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
        return max(0, most - taken + sum(int(amount) for name, amount in rows if name == copies))
    except (OSError, ValueError):  # no group, or "max"
        return None
