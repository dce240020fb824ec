"""A run that is killed and continued, beside one that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from softdefend.training import Trainer
from tiny import Killed

FILES = ("metrics.jsonl", "best.safetensors", "last.safetensors")
"""Those of a run folder that a kill may not change."""


class _KilledAfter:
    """The step of a run that is killed once it has made ``left`` updates."""

    def __init__(self, step, left: int) -> None:
        self.step, self.left = step, left

    def __call__(self, *given) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        self.step(*given)

    def __getattr__(self, name):
        return getattr(self.step, name)


def train_whole_and_killed(start: Callable[[str], Trainer], cuts: Iterable[int]) -> tuple[Trainer, Trainer]:
    """Train without a kill and with some; both trainers at their ends, whose folders hold the same files.

    Args:
        start: makes the trainer of a folder, the same run in each.
        cuts: updates that each process makes before it is killed, fewer than are left.
    """
    whole = start("whole")
    whole.fit()
    for cut in cuts:
        part = start("killed")
        part.step = _KilledAfter(part.step, cut)
        with pytest.raises(Killed):
            part.fit()
        part.folder.close()
    last = start("killed")
    last.fit()
    assert_same_files(whole.folder.path, last.folder.path)
    return whole, last


def assert_same_files(one: Path, other: Path, names: Iterable[str] = FILES) -> None:
    """Bit equality of files of two folders."""
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
