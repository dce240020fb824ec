"""HTML that cannot be injected into: plain strings are escaped, only :class:`Html` passes as it is."""

from __future__ import annotations

import html


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


_VOID = frozenset({"img", "meta", "br"})


def tag(name: str, /, *children: str, **attributes: str | int) -> Html:
    """One element. Children and attribute values are escaped, unless a child is :class:`Html`.

    An attribute whose name is a Python keyword is written with an underscore behind it (``class_``); inner
    underscores become hyphens (``aria_label``).
    """
    written = "".join(f' {_attribute(key)}="{html.escape(str(value))}"' for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Children one after another, escaped as in :func:`tag`."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))


def details(summary: str, *children: str) -> Html:
    """A part that is folded away until it is asked for."""
    return tag("details", tag("summary", summary), *children)


def scrolling_table(caption: str, head: Html, rows: list[Html]) -> Html:
    """A table that scrolls sideways inside its own box where the screen is narrower."""
    parts = (tag("caption", caption), tag("thead", head), tag("tbody", *rows))
    return tag("div", tag("table", *parts), class_="scroll", tabindex=0, role="region", aria_label=caption)


def row(cell: str, *texts: str) -> Html:
    """One table row: ``cell`` is the element of every cell ("td" or "th")."""
    return tag("tr", *(tag(cell, text) for text in texts))


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
