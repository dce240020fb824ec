"""Types of values from Python, and NumPy's numbers as Python's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.core.hints import check_fields, check_type
from softdefend.core.threat import Budget, ThreatModel

ACCEPTED = [
    (3, int),
    (-(2**63), int),
    (2**63 - 1, int),
    (3, float),
    (0.5, float),
    (Budget("8/255"), float),
    (True, bool),
    ("a", str),
    (None, int | None),
    (3, int | None),
    ("8/255", Budget),
    (0.03, Budget | None),
    ("a", Path),
    (Path("a"), Path),
    ("b", Literal["a", "b"]),
    ((1, 2), tuple[int, ...]),
    ([0.5, 1], tuple[float, ...]),
    (["a"], tuple[str, ...]),
    ((), tuple[str, ...]),
    (ThreatModel(), ThreatModel | None),
    (object(), Any),
]
REFUSED = [
    (True, int, "a whole number"),
    (3.0, int, "a whole number"),
    ("3", int, "a whole number"),
    (None, int, "a whole number"),
    (np.float64(3), int, "a whole number"),
    (np.bool_(True), int, "a whole number"),
    (torch.tensor(3), int, "a whole number"),
    (2**63, int, r"from -2\^63 to 2\^63 - 1"),
    (-(2**63) - 1, int | None, r"from -2\^63 to 2\^63 - 1"),
    (10**5000, int, "64 bits"),
    ("0.5", float, "a number"),
    (True, float, "a number"),
    (10**400, float, "a number"),
    (1, bool, "true or false"),
    (3, str, "text"),
    (b"a", str, "text"),
    (3, Path, "a path"),
    ("c", Literal["a", "b"], "a or b"),
    (["a"], Literal["a", "b"], "a or b"),
    ("abc", tuple[str, ...], "a list"),
    ((1, "2"), tuple[int, ...], "a whole number"),
    ((1, 2.5), tuple[int, ...], "a whole number"),
    ({"eps": 1}, ThreatModel, "an object of ThreatModel"),
    (ThreatModel, ThreatModel, r"an object of it, as ThreatModel\(\)"),
    (3, bool | None, "true or false"),
]


@pytest.mark.parametrize(("value", "hint"), ACCEPTED)
def test_a_value_of_its_type_stays_itself(value, hint):
    assert check_type("x", value, hint) is value


@pytest.mark.parametrize(("value", "hint", "words"), REFUSED, ids=range(len(REFUSED)))
def test_a_value_of_another_type_is_one_short_line(value, hint, words):
    with pytest.raises(SettingError, match=words) as caught:
        check_type("x.y", value, hint)
    assert caught.value.setting == "x.y"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("value", "hint", "kind"),
    [
        (np.int64(3), int, int),
        (np.uint8(3), int | None, int),
        (np.float32(3), float, float),
        (np.float64(3), float | None, float),
        (np.int32(3), float, int),
        (np.bool_(True), bool, bool),
        (2**64, float, float),
    ],
)
def test_numbers_of_numpy_become_pythons(value, hint, kind):
    made = check_type("x", value, hint)
    assert type(made) is kind
    assert made == value


def test_lists_of_numpys_numbers_become_lists_of_pythons():
    made = check_type("x", [np.int64(1), 2], tuple[int, ...])
    assert made == [1, 2]
    assert [type(item) for item in made] == [int, int]


@dataclass(frozen=True)
class Section:
    count: int = 1
    seed: int = 0
    word: Literal["a", "b"] = "a"
    size: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, "section", most=100)


def test_a_dataclass_checks_its_own_fields():
    made = Section(np.int64(7), np.uint8(2), "another word, for the class to refuse", np.float32(0.5))
    assert [type(value) for value in vars(made).values()] == [int, int, str, float]
    assert Section(seed=2**70).seed == 2**70  # the class knows its range
    for given, setting in (({"count": 101}, "count"), ({"seed": 0.5}, "seed"), ({"word": 3}, "word")):
        with pytest.raises(SettingError) as caught:
            Section(**given)
        assert caught.value.setting == f"section.{setting}"
