"""What the sections of a page are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softdefend.report.details import is_number
from softdefend.report.embed import png_uri, svg_uri
from softdefend.report.figures import Plot
from softdefend.report.markup import Html, join, tag
from softdefend.report.runs import Group
from softdefend.report.tables import ABSENT, Row


@dataclass(frozen=True)
class Report:
    """What every section draws from: the recipes, their rows of the table and their colors."""

    groups: Sequence[Group]
    rows: Sequence[Row]
    color: Mapping[str, str]


def titled(title: str, *children: str) -> Html:
    """A section under its heading."""
    return tag("section", tag("h2", title), *children)


def paragraph(text: str) -> Html:
    """A remark below a table or figure."""
    return tag("p", text, class_="note")


def swatched(report: Report, recipe: str) -> Html:
    """A recipe's name behind its color."""
    swatch = tag("span", "", class_="swatch", style=f"background:{report.color[recipe]}", aria_hidden="true")
    return join(swatch, recipe)


def figures(plots: Sequence[Plot]) -> Html:
    """Figures beside each other, below each other where the screen is narrow."""
    drawn = [
        tag("figure", tag("figcaption", plot.title), tag("img", src=svg_uri(plot.figure), alt=plot.alt))
        for plot in plots
    ]
    return tag("div", *drawn, class_="plots")


def picture(image: Any, alt: str, *caption: str) -> Html:
    """One image [c, h, w] in [0, 1] with words below it."""
    return tag("figure", tag("img", src=png_uri(image), alt=alt), tag("figcaption", *caption))


def number(value: Any) -> str:
    """A count or measure from a file as text; a dash where it is none."""
    if not is_number(value):
        return ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
