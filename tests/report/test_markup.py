from __future__ import annotations

from html.parser import HTMLParser

from softdefend.report.markup import Html, details, join, row, scrolling_table, tag

EVIL = "</td><script>alert('x')</script> & \"quoted\""


def parse(text: str) -> tuple[list[tuple[str, dict[str, str | None]]], str]:
    """Start tags with attributes, and all the text."""
    tags: list[tuple[str, dict[str, str | None]]] = []
    words: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: tags.append((name, dict(attributes)))  # type: ignore[method-assign]
    parser.handle_data = words.append  # type: ignore[method-assign]
    parser.feed(text)
    parser.close()
    return tags, "".join(words)


def test_strings_are_text_wherever_they_stand() -> None:
    tags, words = parse(tag("p", EVIL, tag("b", EVIL), title=EVIL))
    assert tags == [("p", {"title": EVIL}), ("b", {})]
    assert words == EVIL * 2
    for built in (
        join(EVIL),
        row("td", EVIL),
        details(EVIL, EVIL),
        scrolling_table(EVIL, row("th", EVIL), []),
    ):
        tags, words = parse(built)
        assert "script" not in dict(tags)
        assert EVIL in words


def test_html_passes_as_it_is() -> None:
    assert join(Html("<i>x</i>"), "<") == "<i>x</i>&lt;"
    assert isinstance(join("x"), Html)


def test_attribute_names() -> None:
    assert tag("td", "x", class_="a", aria_label="b", colspan=3) == (
        '<td class="a" aria-label="b" colspan="3">x</td>'
    )
    assert tag("img", src="s", alt="") == '<img src="s" alt="">'
