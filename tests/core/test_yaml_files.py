"""YAML files in which every setting stands once, and single values as a command line has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from softdefend.core.errors import SettingError
from softdefend.core.yaml_files import parse_value, read_yaml


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("-3", -3),
        ("1_000", 1000),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", ""),
        ("  ", "  "),
        ("# a comment", "# a comment"),
        ("2020-01-01", "2020-01-01"),
        ("8/255", "8/255"),
        ("1e", "1e"),
        (".", "."),
        ("-", [None]),
        ("[a, 1e-1]", ["a", 0.1]),
        ("{a: 1", "{a: 1"),
        ("[" * 5000, "[" * 5000),
        ("9" * 5000, "9" * 5000),
        ("!!python/object:os.system {}", "!!python/object:os.system {}"),
    ],
)
def test_a_text_as_a_file_would_have_it(text: str, expected: Any) -> None:
    found = parse_value(text)
    assert (type(found), found) == (type(expected), expected)


def test_nan() -> None:
    assert math.isnan(parse_value(".nan"))


@given(st.floats(allow_nan=False))
def test_every_float_comes_back(number: float) -> None:
    assert parse_value(repr(number).replace("inf", ".inf")) == number


@pytest.mark.parametrize(
    "text", ["a: 1\na: 2", "a: {b: 1, b: 1}", "- 1", "", "a: [", f"a: {'9' * 5000}", "a: " + "[" * 5000]
)
def test_a_file_that_is_no_configuration_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(SettingError, match=f"^{path}.*; accepted: ") as raised:
        read_yaml(path)
    assert "\n" not in str(raised.value)


def test_what_yaml_writes_is_read_again(tmp_path: Path) -> None:
    content = {"a": {"b": [1e-05, 1, True, None, "1e-4", "null", "2020-01-01"]}, "c": "8/255"}
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(content))
    assert read_yaml(path) == content
