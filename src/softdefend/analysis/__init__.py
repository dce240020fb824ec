"""Why it works: the analyses of the SGLR paper as measurements on any run folder, and a label audit."""

from softdefend.analysis.command import (
    AnalyseSettings,
    Wishes,
    analyse,
    analyse_runs,
    audit_labels,
    audit_run,
)

__all__ = ["AnalyseSettings", "Wishes", "analyse", "analyse_runs", "audit_labels", "audit_run"]
