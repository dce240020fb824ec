"""The documents' links lead somewhere, and the files they name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w/.])((?:benchmarks|docs|tests|src/softdefend)/[\w./-]*\w)")
EXAMPLES = set(re.findall(r"^#+ .*`(.*)`$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE))
"""Files that CONTRIBUTING.md tells a reader to write: those in its headings."""


def prose(page: Path) -> str:
    """The text of a page without its code blocks: no heading and no link is in those."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> Iterator[str]:
    """The anchor of every heading, as GitHub makes it: lower case, hyphens for spaces, no punctuation."""
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in LINK.findall(prose(page)):
            if not re.match(r"[a-z]+:", target):
                yield page, target


@pytest.mark.parametrize(
    ("page", "target"), list(links()), ids=lambda value: str(value).removeprefix(f"{ROOT}/")
)
def test_every_relative_link_and_anchor_exists(page, target):
    path, _, anchor = target.partition("#")
    linked = (page.parent / path).resolve() if path else page
    assert linked.exists()
    if anchor:
        assert anchor in anchors(linked)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_this_repository_that_a_page_names_exists(page):
    named = set(NAMED.findall(page.read_text())) - EXAMPLES
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_an_anchor_is_made_as_github_makes_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n\n## The rest: `a_b`, 2 (C-D)\n\n```sh\n# no heading\n```\n")
    assert list(anchors(page)) == ["one", "the-rest-a_b-2-c-d"]
