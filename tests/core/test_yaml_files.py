"""YAML files in which every setting stands once, and single values as a command line has them."""

from __future__ import annotations

import math
import os
import time
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


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{epochs: 1, epochs: 2}", "epochs"),
        ('{epochs: 1, "epochs": 2}', "epochs"),
        ("{schedule: {kind: a, kind: b}}", "kind"),
        ("{schedule: {kind: a}, schedule.kind: b}", "schedule.kind"),
        ("{a.b: {c: 1}, a: {d: 2, b.c: 3}}", "a.b.c"),
        ("[{a: 1, a: 2}]", "a"),
    ],
)
def test_a_setting_stands_once_in_a_value_however_it_is_written(text: str, key: str) -> None:
    with pytest.raises(SettingError, match=f"^optim: got '{key}' a second time; accepted: each setting once"):
        parse_value(text, "optim")


def test_merged_mappings_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("x: &x {k: 1, l: 1}\nbase: &b {<<: *x, k: 2}\nd: {<<: [*b, *x], l: 3}\n")
    content = read_yaml(path)
    assert (content["base"], content["d"]) == ({"k": 2, "l": 1}, {"k": 2, "l": 3})


def doubled(line: str, count: int = 40) -> str:
    return "".join(line.format(f"a{i}", f"a{i - 1}") for i in range(1, count))


BOMBS = {
    "aliases": "a0: &a0 [1, 1]\n" + doubled("{0}: &{0} [*{1}, *{1}]\n"),
    "mappings": "a0: &a0 {x: 1}\n" + doubled("{0}: &{0} {{b: *{1}, c: *{1}}}\n"),
    "merges": "a0: &a0 {x: 1}\n" + doubled("{0}: &{0} {{<<: [*{1}, *{1}]}}\n"),
    "many merges": "a: &a {x: 1}\nb: {<<: [" + "*a, " * 60_000 + "]}\n",
    "a chain": "a0: &a0 [1]\n" + doubled("{0}: &{0} [*{1}]\n", 5000),
    "a circle": "a: &a [*a]",
    "a circle of mappings": "a: &a {b: *a}",
    "many values": "a: [" + "1," * 20_000 + "]",
    "large": "a: " + "b" * 300_000,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_file_of_settings_is_read_in_little_time(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(BOMBS[kind])
    began = time.process_time()
    with pytest.raises(
        SettingError, match=rf"^{path}: got unreadable YAML \(.*accepted: a readable YAML file"
    ):
        read_yaml(path)
    assert time.process_time() - began < 10
    if kind != "large":
        assert parse_value(BOMBS[kind]) == BOMBS[kind]


@pytest.mark.parametrize("kind", ["device", "pipe", "loop"])
def test_what_is_no_regular_file_is_not_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    given = "symbolic links" if kind == "loop" else "no regular file"
    with pytest.raises(
        SettingError, match=rf"got unreadable YAML \(.*{given}.*accepted: a readable YAML file"
    ):
        read_yaml(path)


def test_what_yaml_writes_is_read_again(tmp_path: Path) -> None:
    content = {"a": {"b": [1e-05, 1, True, None, "1e-4", "null", "2020-01-01"]}, "c": "8/255"}
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(content))
    assert read_yaml(path) == content
