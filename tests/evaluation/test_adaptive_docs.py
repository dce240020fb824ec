"""The code of docs/adaptive.md breaks the three defenses as far as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from softdefend.attacks.names import parse_attack

PAGE = (Path(__file__).parents[2] / "docs" / "adaptive.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SAID = {
    name: int(percent) for name, percent in re.findall(r"^(\w+) = accuracy.*# (\d+)%$", "".join(CODE), re.M)
}
BROKEN = {"direct": "broken", "ragged": "averaged", "flat": "climbed"}
"""Accuracies under a plain attack, and under the adaptive one."""


@pytest.fixture(scope="module")
def made() -> dict:
    scope: dict = {}
    for block in CODE:
        exec(compile(block, "adaptive.md", "exec"), scope)
    return scope


@pytest.mark.parametrize(("name", "percent"), SAID.items())
def test_an_accuracy_is_what_the_page_says(made, name, percent):
    assert 100 * made[name] == pytest.approx(percent, abs=6)  # 64 images, other rounding elsewhere


@pytest.mark.parametrize(("held", "fell"), BROKEN.items())
def test_each_defense_is_broken(made, held, fell):
    assert {held, fell} <= set(SAID)
    assert made[fell] < made[held] - 0.2


def test_attacks_that_the_page_names_exist():
    names = re.findall(r"`((?:pgd|fgsm|cw|apgd)-[\w-]+)`", PAGE)
    assert len(names) >= 4
    assert [parse_attack(name).name for name in names] == names
