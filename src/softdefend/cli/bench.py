"""``softdefend bench``: how fast training steps are on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softdefend.cli import train
from softdefend.cli.flags import Flags, positional
from softdefend.core.errors import SettingError
from softdefend.execution.engine import count_processes
from softdefend.execution.launched import place_of_this_process
from softdefend.experiments.bench import BenchSettings, base_arguments, bench_train
from softdefend.experiments.config import resolve
from softdefend.experiments.launch import run_on_processes


@dataclass(frozen=True)
class BenchFlags:
    """'train' measures milliseconds per training step on random images, against the machine's own matrix
    ceiling; with --against_eager true against the same step neither compiled nor captured, and with
    --reference against the reference code's."""

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
    settings, runtime = given.make(BenchSettings), resolve(base_arguments(given.rest)).runtime
    size = count_processes(runtime.device, runtime.devices)
    if size > 1 and place_of_this_process() is None:
        run_on_processes(["bench", *words], size)
        return
    bench_train(settings, given.rest)
