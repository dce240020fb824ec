"""Tables, figures and one self-contained HTML page from run folders."""

from __future__ import annotations

from softdefend.report.page import write_report
from softdefend.report.runs import RunRecord, read_run
from softdefend.report.tables import Row, comparison_rows, markdown_table, text_table

__all__ = [
    "Row",
    "RunRecord",
    "comparison_rows",
    "markdown_table",
    "read_run",
    "text_table",
    "write_report",
]
