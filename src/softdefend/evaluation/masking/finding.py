"""What an audit found: one line a check, and the verdict over all of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any, Literal

from torch import Tensor

Verdict = Literal["fine", "suspicious", "not measured"]

SIGNIFICANT = 0.01
"""How probable so large a share may at most be by chance where it is held against a network."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """Its name in tables, such as ``black box``."""
    figure: float | None
    """What was measured, finite; None where it was not."""
    threshold: str
    """What would be suspicious, in words with a number."""
    verdict: Verdict
    explanation: str
    """What the figure says about this network."""
    reference: str
    """Where the check comes from."""


@dataclass(frozen=True)
class Audit:
    """Everything an audit found; suspicious as soon as one check is."""

    findings: tuple[Finding, ...]
    verdict: Literal["no sign of masking", "suspicious"]
    summary: str

    @classmethod
    def of(cls, findings: list[Finding], n: int, right: int) -> Audit:
        """From findings on ``n`` images, of which ``right`` were classified correctly."""
        caught = [finding.check for finding in findings if finding.verdict == "suspicious"]
        measured = sum(finding.verdict != "not measured" for finding in findings)
        images = f"{n} images, {right} classified correctly; {measured} of {len(findings)} checks made"
        if caught:
            summary = (
                f"Suspicious: {', '.join(caught)}. Do not trust robust accuracy from gradient attacks here "
                f"before an attack made for this network agrees ({images})."
            )
            return cls(tuple(findings), "suspicious", summary)
        summary = f"No sign of gradient masking ({images}). This is no proof that there is none."
        return cls(tuple(findings), "no sign of masking", summary)

    def finding(self, check: str) -> Finding:
        """The finding of this name.

        Raises:
            KeyError: no such check.
        """
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(check)

    @property
    def suspicious(self) -> tuple[str, ...]:
        """Names of the checks that found something."""
        return tuple(finding.check for finding in self.findings if finding.verdict == "suspicious")

    def to_dict(self) -> dict[str, Any]:
        """Numbers as numbers, for JSON."""
        return {
            "verdict": self.verdict,
            "summary": self.summary,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        head = ("check", "figure", "suspicious if", "verdict")
        rows = [(f.check, _number(f.figure), f.threshold, f.verdict) for f in self.findings]
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
            for row in (head, *rows)
        ]
        reasons = [
            fill(f"{f.check}: {f.explanation} [{f.reference}]", 110, subsequent_indent="  ")
            for f in self.findings
            if f.verdict == "suspicious"
        ]
        return "\n".join([*lines, "", *reasons, fill(self.summary, 110)])


def _number(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.3g}"


@dataclass(frozen=True)
class Check:
    """A check's name, limit and source: everything about it but what was measured.

    Args:
        name: in tables.
        limit: what the figure must not cross; a share has to cross it significantly.
        suspicious: ``above`` or ``below`` the limit.
        reference: paper.
        meaning: what a crossed limit means, one sentence.
        share: the figure is a share of images, so that chance is allowed for.
    """

    name: str
    limit: float
    suspicious: Literal["above", "below"]
    reference: str
    meaning: str
    share: bool = False

    @property
    def threshold(self) -> str:
        """In words."""
        return f"{self.suspicious} {self.limit:g}" + (" (p < 0.01)" if self.share else "")

    def of(self, figure: float, detail: str = "") -> Finding:
        """The finding that goes with a figure."""
        if not math.isfinite(figure):
            return self._finding(None, True, detail or "The figure is not finite.")
        crossed = figure > self.limit if self.suspicious == "above" else figure < self.limit
        return self._finding(figure, crossed, detail)

    def of_flags(self, flags: Tensor, detail: str = "") -> Finding:
        """The finding that goes with booleans [n], n >= 1: suspicious where so many would come up less
        than once in a hundred if the true share were the limit (exact binomial test); not measured where
        that could not come about with so few."""
        count, n = int(flags.sum()), len(flags)
        if self.limit**n >= SIGNIFICANT:  # all of them would still be within chance
            return self.skipped(f"{n} images are too few: even all of them would be within chance.")
        from scipy.stats import binomtest  # takes a second to import: only where it is used

        chance = binomtest(count, n, self.limit, alternative="greater").pvalue
        return self._finding(count / n, chance < SIGNIFICANT, f"{count} of {n} images. {detail}")

    def skipped(self, why: str) -> Finding:
        """Not measured."""
        return Finding(self.name, None, self.threshold, "not measured", why, self.reference)

    def _finding(self, figure: float | None, crossed: bool, detail: str) -> Finding:
        text = " ".join(part for part in (self.meaning if crossed else "", detail.strip()) if part)
        text = text or "As with an honest network."
        verdict: Verdict = "suspicious" if crossed else "fine"
        return Finding(self.name, figure, self.threshold, verdict, text, self.reference)
