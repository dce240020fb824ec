"""``softdefend analyze``: why it works, measured on runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softdefend.analysis import PARTS, AnalysisRequest, AnalyzeSettings, analyze_runs
from softdefend.cli.flags import Flags, positional
from softdefend.execution.engine import resolve_device


@dataclass(frozen=True)
class AnalyzeFlags:
    """Why it works: overfitting, gradient norms, label quality, information and geometry of finished or
    running runs, side by side. Run folders are read only; results go to --output, and what lies there already
    is not measured again."""

    run: tuple[str, ...] = positional()
    """Run folders."""
    output: Path = Path("analysis")
    """Folder of the results."""
    parts: tuple[str, ...] = tuple(PARTS.names())
    """What to measure: overfitting, gradients, labels, information, geometry."""
    which: tuple[str, ...] = ("best", "last")
    """best, last; checkpoints: all that the run has kept; archived: those of save.archive."""
    reference: str | None = None
    """A run whose best network judges labels where clean ones are not known."""
    train_votes: str | None = None
    """.npz of human labels of the training images."""
    train_keys: tuple[str, ...] = ("random_label1", "random_label2", "random_label3")
    """Its arrays, one for each annotator, as CIFAR-10N names them."""
    test_votes: str | None = None
    """.npz with counts [n, k] for the test images: CIFAR-10H."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    progress: bool = True
    """Show progress bars."""


FLAGS = Flags("analyze", AnalyzeFlags, AnalyzeSettings)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Write ``analysis.json``, ``analysis.html`` and ``results/`` into the output folder."""
    given = FLAGS.read(words)
    flags, settings = given.make(AnalyzeFlags), given.make(AnalyzeSettings)
    request = AnalysisRequest(
        parts=flags.parts,
        which=flags.which,
        settings=settings,
        reference=flags.reference,
        train_votes=flags.train_votes,
        train_keys=flags.train_keys,
        test_votes=flags.test_votes,
    )
    device = resolve_device(flags.device)
    analysis = analyze_runs(flags.run, flags.output, request, device, progress=flags.progress)
    print(f"results: {flags.output / 'analysis.json'}\npage: {flags.output / 'analysis.html'}")
    overfitting = analysis.parts.get("overfitting")
    for one in overfitting.measurements if overfitting else ():
        if one.result["best"] and one.result["last"]:
            print(f"{one.run}: robust validation accuracy {_best_and_last(one.result)}")


def _best_and_last(result: Mapping[str, Any]) -> str:
    rows = ((which, result[which]) for which in ("best", "last"))
    known = ((which, row["epoch"], row["val_robust"]) for which, row in rows)
    return ", ".join(f"{which} {100 * v:.1f}% (epoch {e})" for which, e, v in known if v is not None)
