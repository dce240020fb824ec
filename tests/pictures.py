"""Figures that look alike are drawn once: drawing takes longer than most of what ends in a page."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.text import Text

SHOWN = [
    f"get_{name}"
    for name in (
        *("visible", "xydata", "path", "paths", "offsets", "coordinates", "array", "size_inches"),
        *("color", "facecolor", "edgecolor", "alpha", "linestyle", "linewidth", "marker"),
        *("xlim", "ylim", "xscale", "yscale"),
    )
]
"""The methods that say what is seen of a part of a figure, where it has them."""


class Drawn:
    """Draws as ``draw`` does, and gives the same text again for a figure of the same looks."""

    def __init__(self, draw: Callable[[Figure], str]) -> None:
        self.draw = draw
        self.texts: dict[str, str] = {}

    def __call__(self, figure: Figure) -> str:
        seen = hashlib.sha256("\n".join(map(looks, figure.findobj())).encode()).hexdigest()
        if seen not in self.texts:
            self.texts[seen] = self.draw(figure)
        return self.texts[seen]


def looks(part: Artist) -> str:
    """All that a part of a figure says of how it looks."""
    said = [getattr(part, name)() for name in SHOWN if hasattr(part, name)]
    said += [part.get_text()] if isinstance(part, Text) else []
    return f"{type(part).__name__} {list(map(_plain, said))}"


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list):
        return list(map(_plain, value))
    return _plain(value.vertices) if hasattr(value, "vertices") else value
