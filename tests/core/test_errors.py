"""The lines that answer bad input."""

import doctest

import pytest

from softdefend.core import errors


def test_the_examples_in_the_documentation():
    assert doctest.testmod(errors).failed == 0


@pytest.mark.parametrize(
    ("given", "meant"),
    [("sglr", "SGLR"), ("epoch", "epochs"), ("epochs", ""), ("", ""), ("zzz", "")],
)
def test_only_another_name_is_suggested(given, meant):
    answer = errors.did_you_mean(given, ["SGLR", "epochs", "lr"])
    assert answer == (f"; did you mean {meant}?" if meant else "")
