from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from softdefend.report.embed import INK, LARGEST, png_uri, svg, svg_uri


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (2, "L")])
def test_pixels_survive(channels: int, mode: str) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (channels, 5, 7))
    picture = Image.open(io.BytesIO(decoded(png_uri((levels / 255).astype(np.float32)))))
    assert (picture.format, picture.mode, picture.size) == ("PNG", mode, (7, 5))
    expected = levels.transpose(1, 2, 0) if channels == 3 else levels[0]
    np.testing.assert_array_equal(np.asarray(picture), expected)


def test_values_outside_the_range_are_clipped_and_large_images_shrunk() -> None:
    image = np.full((1, 300, 150), 2.0, np.float32)
    image[:, :, 75:] = -1
    picture = Image.open(io.BytesIO(decoded(png_uri(image))))
    assert picture.size == (LARGEST // 2, LARGEST)
    assert (picture.getpixel((0, 0)), picture.getpixel((31, 0))) == (255, 0)


def figure(text: str = "text") -> Figure:
    made = Figure()
    made.add_subplot().set_title(text, color=INK)
    return made


def test_figure_follows_the_readers_scheme_and_asks_for_nothing() -> None:
    text = svg(figure())
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert INK not in text
    assert "currentColor" in text
    assert "prefers-color-scheme:dark" in text
    links = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")]
    assert all(link.startswith("#") for link in links)
    assert decoded(svg_uri(figure())).decode() == text  # and the same figure is the same text


def test_script_the_font_lacks_does_not_stop_the_report() -> None:
    ElementTree.fromstring(svg(figure("数字")))
