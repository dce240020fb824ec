"""``softdefend labels``: which training labels a run's memory distrusts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softdefend.analysis import audit_run, check_output, write_audit
from softdefend.analysis.label_scores import DEFAULT_SCORE
from softdefend.cli.flags import Flags, positional
from softdefend.core.errors import SettingError
from softdefend.execution.engine import resolve_device


@dataclass(frozen=True)
class LabelsFlags:
    """'audit' ranks the training images of a run by how strongly its label memory, or the network itself,
    distrusts their labels: a CSV file, a page with the images, and figures where the truth is known."""

    action: str = positional()
    """audit."""
    run: str = positional()
    """A run folder."""
    output: Path = Path("label-audit")
    """Folder of the results."""
    score: str = DEFAULT_SCORE
    """What distrust is measured by: self-confidence, margin, log-odds or balanced-margin."""
    source: str = "memory"
    """What is asked: memory, or prediction (of the newest weights on the clean training images)."""
    top: int = 120
    """Images on the page."""
    baseline: bool | None = None
    """Compare with cleanlab; where it is installed when not given."""
    at: tuple[int, ...] = (100, 1000)
    """k of precision at k."""
    batch_size: int = 500
    """Images at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


FLAGS = Flags("labels", LabelsFlags)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Write ``labels.csv``, ``audit.json`` and ``audit.html`` into the output folder."""
    flags = FLAGS.read(words).make(LabelsFlags)
    if flags.action != "audit":
        raise SettingError("labels", repr(flags.action), "audit")
    if flags.top < 1:
        raise SettingError("--top", flags.top, "a whole number >= 1")
    check_output(flags.output, [flags.run])
    found = audit_run(
        flags.run,
        score=flags.score,
        source=flags.source,
        baseline=flags.baseline,
        at=flags.at,
        batch_size=flags.batch_size,
        device=resolve_device(flags.device),
    )
    write_audit(found, flags.output, flags.top)
    known = "" if found.wrong is None else f"; {found.wrong:,} are wrong"
    print(f"{len(found.rows):,} labels, another class believed for {found.flagged:,}{known}")
    for line in found.comparison:
        if line["auroc"] is not None:
            print(f"AUROC {line['auroc']:.4f}  {line['name']}")
    print(f"table: {flags.output / 'labels.csv'}\npage: {flags.output / 'audit.html'}")
