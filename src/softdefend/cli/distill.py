"""``softdefend distill``: two teachers and the student that learns from both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softdefend.cli import train
from softdefend.cli.flags import Flags
from softdefend.experiments.distill import kd_swa


@dataclass(frozen=True)
class DistillFlags:
    """Train a standard teacher, a robust one and the student that learns from both (Chen et al., ICLR 2021).
    Stages that are finished are kept, unfinished ones continued."""

    preset: str = "kd-swa"
    """Of the student; its label rule is KD."""
    standard: str | None = None
    """A finished run as the standard teacher, in place of training one."""
    robust: str | None = None
    """A finished run as the robust teacher, in place of training one."""
    folder: Path = Path("runs/distill")
    """Gets standard/, robust/ and student/."""


FLAGS = Flags("distill", DistillFlags, passes_on=train.completion)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Make the stages that are not there yet."""
    given = FLAGS.read(words)
    flags = given.make(DistillFlags)
    student = kd_swa(
        given.rest, flags.folder, preset=flags.preset, standard=flags.standard, robust=flags.robust
    )
    print(f"student: {student}")
