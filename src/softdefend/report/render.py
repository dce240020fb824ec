"""Write a page. This is the only place where text becomes HTML."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from softdefend.report.content import Section
from softdefend.report.embed import png_uri, svg_uri


@cache
def templates() -> Environment:
    """The templates of ``templates/``. All text is escaped, and a name that is not given is an error."""
    made = Environment(
        loader=PackageLoader("softdefend.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"svg_uri": svg_uri, "png_uri": png_uri}
    return made


def render_page(title: str, about: str, sections: Iterable[Section], *, summary: str = "") -> bytes:
    """One HTML page that needs nothing but itself.

    Args:
        title: the heading.
        about: what the page is about, below the title.
        sections: the parts of the page.
        summary: what stands out at the top.
    """
    template = templates().get_template("page.html.j2")
    page = template.render(title=title, about=about, sections=list(sections), summary=summary)
    return page.encode(errors="backslashreplace")  # names of files may be no text
