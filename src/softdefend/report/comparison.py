"""What a report compares: the recipes of some runs, their rows of the table, and a color for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softdefend.report.content import Cell
from softdefend.report.figures import colors
from softdefend.report.runs import Group, RunRecord, group_runs
from softdefend.report.tables import Row, comparison_rows


@dataclass(frozen=True)
class Comparison:
    """What every section of a report is drawn from.

    Attributes:
        groups: the recipes.
        rows: of the table, one for each recipe.
        color: by recipe.
    """

    groups: Sequence[Group]
    rows: Sequence[Row]
    color: Mapping[str, str]

    @property
    def runs(self) -> list[RunRecord]:
        """All runs, recipe by recipe."""
        return [run for group in self.groups for run in group.runs]

    def name_cell(self, recipe: str, *, columns: int = 1) -> Cell:
        """A recipe's name behind its color."""
        return Cell(recipe, swatch=self.color[recipe], columns=columns)


def compare_runs(runs: Sequence[RunRecord]) -> Comparison:
    """Group runs by recipe and count what the table shows."""
    groups = group_runs(runs)
    return Comparison(groups, comparison_rows(runs), colors(groups))
