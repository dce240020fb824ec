"""Why it works: the analyses of the SGLR paper as measurements on any run folder, and a label audit."""

from softdefend.analysis.command import (
    AnalyzeSettings,
    Wishes,
    analyze_runs,
    audit_run,
)

__all__ = ["AnalyzeSettings", "Wishes", "analyze_runs", "audit_run"]
