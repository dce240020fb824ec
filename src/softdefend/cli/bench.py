"""``softdefend bench``: how fast training steps are on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softdefend.cli import train
from softdefend.cli.flags import Flags, positional
from softdefend.core.errors import SettingError
from softdefend.experiments.bench import BenchSettings, bench_train


@dataclass(frozen=True)
class BenchFlags:
    """'train' measures milliseconds per training step on random images of CIFAR-10's shape, against the
    machine's own matrix ceiling and, with --reference, the reference code's step."""

    what: str = positional()
    """train."""


FLAGS = Flags("bench", BenchFlags, BenchSettings, passes_on=train.completion)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Time the steps."""
    given = FLAGS.read(words)
    what = given.make(BenchFlags).what
    if what != "train":
        raise SettingError("bench", repr(what), "train")
    bench_train(given.make(BenchSettings), given.rest)
