"""Pictures as data URIs, so that a page needs nothing but itself."""

from __future__ import annotations

import base64
import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

INK = "#010203"
"""The color that figures draw text and axes in; it becomes dark on a light page and light on a dark one."""

LARGEST = 64
"""Example images are shown at most this high and wide, in pixels: noise does not compress."""

_STYLE = (
    "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#d5dae1}}</style>"  # as page.css
)


def svg(figure: Figure) -> str:
    """A figure as SVG text whose :data:`INK` follows the reader's light or dark scheme."""
    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "path", "svg.hashsalt": "softdefend"}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(settings), _any_script():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().replace(INK, "currentColor")
    return text.replace("<defs>", f"{_STYLE}<defs>", 1)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file, dark on white."""
    buffer = io.BytesIO()
    with _any_script():
        figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


@contextlib.contextmanager
def _any_script() -> Iterator[None]:
    """Names in a script that the bundled font lacks are drawn as boxes; the page's text has them right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def svg_uri(figure: Figure) -> str:
    """:func:`svg` as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure).encode()).decode()


def png_uri(image: NDArray[np.float32]) -> str:
    """One image [c,h,w] in [0, 1] as a PNG data URI: gray for one channel, RGB for three.

    Of any other number of channels the first is shown. Values outside [0, 1] are clipped.
    """
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    picture = Image.fromarray(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0])
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
