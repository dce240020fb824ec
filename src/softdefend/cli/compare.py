"""``softdefend compare``: several recipes and seeds, one table, one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softdefend.cli import train
from softdefend.cli.flags import Flags
from softdefend.experiments import pipeline
from softdefend.experiments.config import packaged


@dataclass(frozen=True)
class CompareFlags:
    """Train several recipes with several seeds under one protocol: one table, one report. Finished runs are
    kept, unfinished ones continued."""

    presets: tuple[str, ...]
    """Recipes, by name or path."""
    seeds: tuple[int, ...] = (0,)
    """Of the runs: each recipe is trained with each of them."""
    folder: Path = Path("runs/compare")
    """Where the runs and the report go."""
    parallel: int = 1
    """Runs at a time, each a process of its own; spread over the GPUs that are visible."""


FLAGS = Flags(
    "compare",
    CompareFlags,
    passes_on=train.completion,
    epilog=f"Presets: {', '.join(packaged('preset'))}.",
)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Make the runs that are not there yet, print the table and write the report."""
    given = FLAGS.read(words)
    flags = given.make(CompareFlags)
    table, report = pipeline.compare(
        given.rest, flags.presets, flags.seeds, flags.folder, parallel=flags.parallel
    )
    print(f"\n{table}\n\nreport: {report}")
