"""What the documentation site is built from, as far as it can be checked without building it."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from softdefend.cli.main import COMMANDS
from softdefend.experiments.config import resolve

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


def cells(page: Path) -> list[str]:
    return re.findall(r"^```\{code-cell\}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def python(page: Path) -> ast.Module:
    """The Python of a tutorial's cells, without command lines."""
    code = "\n".join(cell for cell in cells(page) if not cell.startswith("%%"))
    return ast.parse(re.sub(r"^!.*$", "", code, flags=re.MULTILINE))


def commands(page: Path) -> Iterator[list[str]]:
    """Words of the command lines in a tutorial's cells, with the texts that they name."""
    texts = {
        node.targets[0].id: node.value.value
        for node in python(page).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    for cell in cells(page):
        for line in re.findall(r"^!softdefend (.*)$", cell, flags=re.MULTILINE):
            yield shlex.split(re.sub(r" 2?> \S+$", "", line.format(**texts)))


def test_every_page_stands_in_the_sites_contents():
    contents = (DOCS / "index.md").read_text()
    lines = "\n".join(re.findall(r"```\{toctree\}\n(.*?)```", contents, flags=re.DOTALL)).splitlines()
    listed = {line for line in lines if line and not line.startswith(":")}
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")} - {"index"}
    cards = {page for page in pages if page.startswith("methods/")}
    assert listed == pages - cards  # which stand below methods


def test_there_are_five_tutorials():
    assert len(TUTORIALS) == 5
    assert all(cells(page) for page in TUTORIALS)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorials_imports_and_commands_are_real(page):
    for node in ast.walk(python(page)):
        if isinstance(node, ast.ImportFrom):
            exec(compile(ast.Module([node], type_ignores=[]), page.name, "exec"), {})
    for words in commands(page):
        assert words[0] in COMMANDS
        if words[0] in ("train", "compare"):
            own = ("--presets", "--parallel")
            rest = [word for flag in flags_of(words[1:]) if flag[0] not in own for word in flag]
            resolve(rest)


def flags_of(words: list[str]) -> Iterator[list[str]]:
    """A flag and its values at a time."""
    starts = [number for number, word in enumerate(words) if word.startswith("--")]
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
        yield words[start:end]
