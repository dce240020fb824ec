"""Why it works: the analyses of the SGLR paper as measurements on any run folder, and a label audit."""

from softdefend.analysis.analyze import Analysis, analyze_runs, check_output
from softdefend.analysis.label_audit import Audit, audit_run, write_audit
from softdefend.analysis.part import PARTS, AnalysisPart, NetworkPart, RunPart
from softdefend.analysis.parts.geometry import Geometry
from softdefend.analysis.parts.gradients import Gradients
from softdefend.analysis.parts.information import Information
from softdefend.analysis.parts.labels import LabelQuality
from softdefend.analysis.parts.overfitting import Overfitting
from softdefend.analysis.request import AnalysisRequest, AnalyzeSettings

for _part in (Overfitting, Gradients, LabelQuality, Information, Geometry):
    PARTS.register(_part.name)(_part)

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
    "write_audit",
]
