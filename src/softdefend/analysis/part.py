"""What a part of an analysis is: which inputs its result depends on, how it is measured, how it is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from softdefend.analysis.request import AnalysisRequest
from softdefend.analysis.results import PartResults
from softdefend.analysis.runs import AnalyzedNetwork, AnalyzedRun
from softdefend.core.errors import SettingError, did_you_mean
from softdefend.core.registry import Registry
from softdefend.report.content import Section


class AnalysisPart(ABC):
    """One part of an analysis. Subclass :class:`RunPart` or :class:`NetworkPart`.

    Attributes:
        needs: names of the fields of ``AnalyzeSettings`` that the result depends on. They are part of what a
            stored result is found by: a setting that is read and not named here would give results of
            another value.
        revision: raise it when the part computes something else, so that older results no longer count.
        order: where its section stands on the page, the smallest first.

    Args:
        name: the registered one, as in ``--parts`` and in the results.
        request: what the analysis is to contain.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    revision: ClassVar[int] = 1
    order: ClassVar[int] = 100

    def __init__(self, name: str, request: AnalysisRequest) -> None:
        self.name, self.request, self.settings = name, request, request.settings

    def prepare(self, runs: Sequence[AnalyzedRun]) -> None:  # noqa: B027  most parts need nothing else
        """Open and check what the part needs beside the runs, before anything is measured.

        Raises:
            SettingError: what the request names is not there or does not fit.
        """

    def inputs(self, run: AnalyzedRun) -> dict[str, Any]:
        """The plain values that a result depends on, beside weights, data and threat; digests for files."""
        return {"settings": {name: getattr(self.settings, name) for name in self.needs}}

    @abstractmethod
    def section(self, results: PartResults) -> Section | None:
        """The results as a section of the page; None where there is nothing to show."""


class RunPart(AnalysisPart):
    """A part that reads what a run has written, once for each run. Its results are not stored."""

    @abstractmethod
    def measure(self, run: AnalyzedRun) -> dict[str, Any]:
        """The results for one run, as plain values."""


class NetworkPart(AnalysisPart):
    """A part that measures networks, once for each set of saved weights. Its results are stored."""

    @abstractmethod
    def measure(self, network: AnalyzedNetwork) -> dict[str, Any]:
        """The results for one network, as plain values."""


PARTS: Registry[type[AnalysisPart]] = Registry("analysis")
"""All parts by name."""


def make_parts(request: AnalysisRequest) -> list[AnalysisPart]:
    """The requested parts, in the order of the page.

    Raises:
        SettingError: a part that is not known.
    """
    names = PARTS.names() if request.parts is None else dict.fromkeys(request.parts)
    for name in names:
        if name not in PARTS:
            known = PARTS.names()
            raise SettingError("--parts", repr(name), ", ".join(known) + did_you_mean(name, known))
    return [PARTS[name](name, request) for name in sorted(names, key=lambda name: (PARTS[name].order, name))]
