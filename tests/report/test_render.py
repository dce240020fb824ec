"""The page's templates: whatever comes from outside stays text, and nothing is forgotten silently."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from jinja2 import UndefinedError
from matplotlib.figure import Figure
from page_tools import Page

from softdefend.report import content
from softdefend.report.figures import Plot
from softdefend.report.render import render_page, templates

EVIL = "</td><script>alert('x')</script> & \"quoted\""
IMAGE = np.zeros((1, 2, 2), np.float32)


def page(*blocks: content.Block) -> Page:
    return Page(render_page("title", "about", [content.Section("section", blocks)]).decode())


BLOCKS: dict[str, Callable[[], content.Block]] = {
    "heading": lambda: content.Heading(EVIL, EVIL),
    "paragraph": lambda: content.Paragraph(EVIL),
    "code": lambda: content.Code(EVIL),
    "figures": lambda: content.Figures([Plot(Figure(), EVIL, EVIL)]),
    "table": lambda: content.Table(EVIL, [EVIL], [[EVIL]], groups=[EVIL]),
    "table of cells": lambda: content.Table(
        "t", [content.Cell(EVIL)], [[content.Cell(EVIL, small=EVIL, swatch=EVIL)]]
    ),
    "gallery": lambda: content.Gallery(
        [content.Picture(IMAGE, EVIL, [EVIL, *(content.Text(EVIL, style) for style in ("bold", "small"))])]
    ),
    "examples": lambda: content.Examples([content.Example(EVIL, EVIL, [content.Picture(IMAGE, EVIL, [])])]),
    "folded": lambda: content.Folded(EVIL, [content.Paragraph(EVIL)]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_strings_are_text_wherever_they_stand(name: str) -> None:
    written = page(BLOCKS[name]())
    assert "script" not in written.text
    assert not [key for _, key, _ in written.attributes if key.startswith(("on", "quoted"))]
    texts = [text for every in written.text.values() for text in every]
    assert any(EVIL in text for text in [*texts, *written.values("alt")])


def test_the_frame_is_escaped_too() -> None:
    written = Page(render_page(EVIL, EVIL, [content.Section(EVIL, [])], summary=EVIL).decode())
    assert "script" not in written.text
    assert written.text["h1"] == written.text["h2"] == [EVIL]
    assert written.text["title"] == [f"{EVIL}: {EVIL}"]
    assert written.text["p"] == [EVIL, EVIL]


def test_every_kind_of_block_is_drawn() -> None:
    """A block without a branch in the template would leave nothing."""
    known = {kind for kind in vars(content).values() if isinstance(kind, type) and hasattr(kind, "kind")}
    assert {type(make()) for make in BLOCKS.values()} == known
    empty = render_page("title", "about", [content.Section("section", [])])
    assert all(
        len(render_page("title", "about", [content.Section("section", [make()])])) > len(empty)
        for make in BLOCKS.values()
    )


def test_cells_span_shade_and_name_their_row() -> None:
    table = content.Table(
        "t",
        ["a", "b"],
        [["first", content.Cell("1", shade=40)], ["second", content.Cell("2", prose=True, style="wrong")]],
        groups=[content.Cell("name", rows=2), content.Cell("both", columns=2)],
    )
    written = page(table)
    assert written.rows == [["name", "both"], ["a", "b"], ["first", "1"], ["second", "2"]]
    assert [a for a in written.attributes if a[0] in ("td", "th")] == [
        ("th", "scope", "col"), ("th", "rowspan", "2"),
        ("th", "scope", "colgroup"), ("th", "colspan", "2"),
        ("th", "scope", "col"), ("th", "scope", "col"),
        ("th", "scope", "row"), ("td", "class", "shade"), ("td", "style", "--share:40"),
        ("th", "scope", "row"), ("td", "class", "words"),
    ]  # fmt: skip
    assert ("div", "aria-label", "t") in written.attributes
    assert ("span", "class", "wrong") in written.attributes


def test_captions_have_lines_and_styles() -> None:
    pieces = ["a ", content.LINE_BREAK, content.Text("b", "bold"), content.Text("c", "correct"), " d"]
    written = page(content.Gallery([content.Picture(IMAGE, "alt", pieces)]))
    assert written.text["figcaption"] == ["a bc d"]
    assert written.text["b"] == ["b"]
    assert len(written.text["br"]) == 1
    assert ("span", "class", "correct") in written.attributes


def test_a_name_that_a_template_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        templates().from_string("{{ forgotten }}").render()
