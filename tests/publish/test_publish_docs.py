"""Every command of docs/publish.md is one that the parser takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from softdefend.cli.main import load

PAGE = Path(__file__).parents[2] / "docs" / "publish.md"
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", LINES)
def test_the_command_and_its_flags_exist(line: str) -> None:
    program, command, *words = shlex.split(line, comments=True)
    assert program == "softdefend"
    module = load(command)
    assert module.FLAGS.read(words).values is not None  # type: ignore[attr-defined]


def test_all_commands_are_there() -> None:
    assert {shlex.split(line)[1] for line in LINES} == {"push", "evaluate", "export", "zoo"}
