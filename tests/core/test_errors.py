"""The lines that answer bad input."""

from __future__ import annotations

import doctest
import os

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from softdefend.core import errors
from softdefend.core.errors import SettingError, printable


def test_the_examples_in_the_documentation():
    assert doctest.testmod(errors).failed == 0


@pytest.mark.parametrize(
    ("given", "meant"),
    [("sglr", "SGLR"), ("epoch", "epochs"), ("epochs", ""), ("", ""), ("zzz", "")],
)
def test_only_another_name_is_suggested(given, meant):
    answer = errors.did_you_mean(given, ["SGLR", "epochs", "lr"])
    assert answer == (f"; did you mean {meant}?" if meant else "")


@drawn(st.text(st.characters(exclude_categories=())) | st.binary().map(os.fsdecode))
def test_any_text_becomes_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()
    assert str(SettingError(text, text, text)).isprintable()


def test_printable_text_stays_and_bytes_are_shown_as_such() -> None:
    assert printable("Käfer 8/255 日本") == "Käfer 8/255 日本"
    assert printable(os.fsdecode(b"caf\xe9\x00\x1b[1m")) == "caf\\xe9\\x00\\x1b[1m"
    assert printable("\ud800\u202e") == "\\ud800\\u202e"
