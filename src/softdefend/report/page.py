"""One HTML page that needs nothing but itself: no requests, no scripts, readable from a file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.report import robustness, sections
from softdefend.report.blocks import Report
from softdefend.report.figures import colors
from softdefend.report.markup import Html, join, tag
from softdefend.report.runs import RunRecord, group_runs
from softdefend.report.summary import heading, summary
from softdefend.report.tables import comparison_rows


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
    text = "<!DOCTYPE html>\n" + page(runs, title or "Robust training report")
    write_atomic(path, text.encode())
    return path


def page(runs: Sequence[RunRecord], title: str) -> Html:
    """The page's ``html`` element."""
    groups, rows = group_runs(runs), comparison_rows(runs)
    report = Report(groups, rows, colors(groups))
    style = Html((files("softdefend.report") / "page.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title}: {heading(runs)}"),
        tag("style", style),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", title),
            tag("p", heading(runs), class_="about"),
            tag("p", summary(groups, rows), class_="summary"),
        ),
        tag(
            "main",
            sections.comparison(report),
            sections.learning_curves(report),
            sections.eps_curves(report),
            sections.classes(report),
            robustness.after_each_attack(report),
            robustness.confusion(report),
            robustness.audits(report),
            robustness.transfers(report),
            robustness.corruptions(report),
            robustness.galleries(report),
            sections.examples(report),
            tag("section", tag("h2", "Details"), sections.attacks(report), sections.provenance(report)),
        ),
    )
    return tag("html", join("\n", head, "\n", body, "\n"), lang="en")
