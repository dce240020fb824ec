"""``softdefend demo``: robust overfitting and its cure, on a CPU, without a download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softdefend.cli import train
from softdefend.cli.flags import Flags
from softdefend.experiments import pipeline

PROTOCOL = ("--config", "digits_demo", "--runtime.threads", "1")
"""Two runs side by side with one thread each: images this small are not worth dividing."""
PRESETS = ("pgd-at", "sglr-reference")


@dataclass(frozen=True)
class DemoFlags:
    """Train PGD-AT and PGD-AT + SGLR on 8x8 digits with 30% wrong labels: a table and a report in about two
    minutes on two cores."""

    folder: Path = Path("demo")
    """Where the runs and the report go."""
    parallel: int = 2
    """Runs at a time, each a process of its own."""


FLAGS = Flags("demo", DemoFlags, passes_on=train.completion)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Make the two runs where they are not there yet, print the table and write the report."""
    given = FLAGS.read(words)
    flags = given.make(DemoFlags)
    arguments = [*PROTOCOL, *given.rest]
    table, report = pipeline.compare(arguments, PRESETS, [0], flags.folder, parallel=flags.parallel)
    print(f"\n{table}\n\nreport: {report}")
