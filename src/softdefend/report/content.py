"""What a page is made of: sections of tables, figures and words. How they look is in ``templates/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from softdefend.report.figures import Plot


@dataclass(frozen=True)
class Text:
    """A piece of a caption.

    Attributes:
        text: plain text; it is escaped when the page is written.
        style: ``bold``, ``small``, or a color for what is ``correct`` or ``wrong``.
    """

    text: str
    style: Literal["bold", "small", "correct", "wrong"]


LINE_BREAK = "\n"
"""A piece of a caption that begins a new line."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than plain text.

    Attributes:
        text: what stands in it.
        small: smaller text below.
        swatch: a color that is shown before the text.
        style: a color for what is ``correct`` or ``wrong``.
        shade: how dark the background is, in [0, 100].
        prose: whether the text is sentences, to be broken into lines.
        columns, rows: how many it spans.
    """

    text: str
    small: str = ""
    swatch: str = ""
    style: Literal["", "correct", "wrong"] = ""
    shade: int | None = None
    prose: bool = False
    columns: int = 1
    rows: int = 1


@dataclass(frozen=True)
class Picture:
    """One image [c, h, w] in [0, 1], a text for those who do not see it, and the caption's pieces."""

    image: NDArray[np.float32]
    alt: str
    caption: Sequence[str | Text]


@dataclass(frozen=True)
class Heading:
    """A heading within a section, with a swatch of a color where there is one."""

    kind: ClassVar[str] = "heading"
    text: str
    swatch: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Words. A ``note`` is a remark below a table or figure, a ``summary`` stands out."""

    kind: ClassVar[str] = "paragraph"
    text: str
    style: Literal["note", "summary", ""] = "note"


@dataclass(frozen=True)
class Code:
    """Text that keeps its lines and spaces."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Figures:
    """Figures beside each other, below each other where the screen is narrow."""

    kind: ClassVar[str] = "figures"
    plots: Sequence[Plot]


@dataclass(frozen=True)
class Table:
    """A table that scrolls sideways inside its own box where the screen is narrower.

    Attributes:
        caption: what the table is, for those who do not see it.
        head: names of the columns.
        body: rows; the first cell of each is its name.
        groups: a row above the head; a cell of it may span several columns, or both rows.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str | Cell]
    body: Sequence[Sequence[str | Cell]]
    groups: Sequence[str | Cell] = ()


@dataclass(frozen=True)
class Gallery:
    """Small images with captions."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Example:
    """Pictures that belong together, below a name in bold and what the name is."""

    label: str
    name: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Examples:
    """Examples beside each other."""

    kind: ClassVar[str] = "examples"
    examples: Sequence[Example]


@dataclass(frozen=True)
class Folded:
    """Blocks that are folded away until somebody asks for them."""

    kind: ClassVar[str] = "folded"
    summary: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Code | Figures | Table | Gallery | Examples | Folded


@dataclass(frozen=True)
class Section:
    """A part of a page under its heading."""

    title: str
    blocks: Sequence[Block]


def figures(*plots: Plot | None) -> list[Block]:
    """The plots that could be drawn, as a block; no block where there are none."""
    drawn = [plot for plot in plots if plot]
    return [Figures(drawn)] if drawn else []
