"""Why it works: the analyses of the SGLR paper as measurements on any run folder, and a label audit."""

from softdefend.analysis import parts  # registers them
from softdefend.analysis.analyze import Analysis, analyze_runs, check_output
from softdefend.analysis.label_audit import Audit, audit_run, write_audit
from softdefend.analysis.part import PARTS, AnalysisPart, NetworkPart, RunPart
from softdefend.analysis.request import AnalysisRequest, AnalyzeSettings

__all__ = [
    "PARTS",
    "Analysis",
    "AnalysisPart",
    "AnalysisRequest",
    "AnalyzeSettings",
    "Audit",
    "NetworkPart",
    "RunPart",
    "analyze_runs",
    "audit_run",
    "check_output",
    "parts",
    "write_audit",
]
