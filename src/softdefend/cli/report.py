"""``softdefend report``: one table and one page from runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softdefend.cli.flags import Flags, positional
from softdefend.report import comparison_rows, markdown_table, read_run, text_table, write_report


@dataclass(frozen=True)
class ReportFlags:
    """One table and one self-contained HTML page from finished or running runs."""

    run: tuple[str, ...] = positional()
    """Run folders."""
    output: Path = Path("report.html")
    """The page to write."""
    title: str | None = None
    """Of the page."""
    markdown: bool = False
    """Print the table as Markdown."""


FLAGS = Flags("report", ReportFlags)
completion = FLAGS.completion


def run(words: Sequence[str]) -> None:
    """Print the table and write the page."""
    flags = FLAGS.read(words).make(ReportFlags)
    runs = [read_run(Path(folder)) for folder in flags.run]
    rows = comparison_rows(runs)
    print(markdown_table(rows) if flags.markdown else text_table(rows))
    print(f"\nreport: {write_report(runs, flags.output, flags.title)}")
