"""``softdefend export``: a checkpoint as a file that runs without this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softdefend.cli.flags import Flags, positional
from softdefend.publish.check_export import ExportSettings, export_run, summary


@dataclass(frozen=True)
class ExportFlags:
    """Write a checkpoint of a run as one file for other programs, with normalization inside and for batches
    of any size. It is compared with the network on test images, and on the adversarial images that are found
    on the network."""

    run: str = positional()
    """A run folder."""
    output: Path | None = None
    """The file; in export/ of the run folder if not given. Beside it a .json says what was measured."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N, for the attacks; the file runs on the CPU."""


FLAGS = Flags("export", ExportFlags, ExportSettings)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Write the file, and what it was measured to do."""
    given = FLAGS.read(words)
    flags, settings = given.make(ExportFlags), given.make(ExportSettings)
    path, about = export_run(Path(flags.run), settings, flags.output, device=flags.device)
    print(f"{path}\n{summary(about)}")
