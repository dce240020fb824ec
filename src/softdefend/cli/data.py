"""``softdefend data``: prepare or describe a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from softdefend.cli.flags import Flags, positional
from softdefend.core.errors import SettingError
from softdefend.data import DataSettings, describe, load


@dataclass(frozen=True)
class DataFlags:
    """'prepare' reads, checks and caches a data set; 'describe' also prints what is in it."""

    action: str = positional()
    """prepare or describe."""
    data: DataSettings = field(default_factory=DataSettings)
    """The data set."""


FLAGS = Flags("data", DataFlags)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Load the data set, and print its sizes or a description."""
    flags = FLAGS.read(words).make(DataFlags)
    if flags.action not in ("prepare", "describe"):
        raise SettingError("data", repr(flags.action), "prepare or describe")
    bundle = load(flags.data)
    sizes = f"{len(bundle.train)} train, {len(bundle.validation)} validation, {len(bundle.test)} test"
    print(describe(bundle) if flags.action == "describe" else f"{bundle.name}: {sizes}")
