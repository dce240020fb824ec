"""The page of a run report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.report import robustness, sections
from softdefend.report.comparison import Comparison, compare_runs
from softdefend.report.content import Section
from softdefend.report.render import render_page
from softdefend.report.runs import RunRecord
from softdefend.report.summary import heading, summary

SECTIONS: tuple[Callable[[Comparison], Section | None], ...] = (
    sections.comparison_table,
    sections.learning_curves,
    sections.eps_curves,
    sections.accuracy_by_class,
    robustness.accuracy_after_each_attack,
    robustness.several_threats,
    robustness.queries_to_success,
    robustness.confusions,
    robustness.masking_audits,
    robustness.transfer_attacks,
    robustness.common_corruptions,
    robustness.attack_quality,
    robustness.certificates,
    robustness.galleries,
    sections.example_images,
    sections.run_details,
)
"""The sections of a report in their order; each returns None where the runs have nothing for it."""


def write_report(runs: Sequence[RunRecord], path: Path, title: str | None = None) -> Path:
    """Write the report of some runs as one self-contained HTML file and return its path.

    What the runs do not have (an evaluation, test monitoring, example images) is left out with a note.
    Missing folders are made, and a reader never sees half a page.

    Raises:
        SettingError: no runs, or a path that cannot be written.
    """
    path = Path(path)
    if not runs:
        raise SettingError("runs", "none", "one run folder or more")
    comparison = compare_runs(runs)
    made = (section(comparison) for section in SECTIONS)
    page = render_page(
        title or "Robust training report",
        heading(runs),
        [section for section in made if section],
        summary=summary(comparison.groups, comparison.rows),
    )
    write_atomic(path, page)
    return path
