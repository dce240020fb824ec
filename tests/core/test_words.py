"""Which words of a command line are flags, and which are their values."""

from __future__ import annotations

import pytest

from softdefend.core.errors import SettingError
from softdefend.core.words import assignments, groups, is_value


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("run", True),
        ("", True),
        ("-", True),
        ("-3", True),
        ("-0.5", True),
        ("-.5", True),
        ("-1e-4", False),
        ("-x", False),
        ("--", False),
        ("--name", False),
        ("--name=a b", False),
        ("--name=[a, -b]", False),
        ("- a b", True),
    ],
)
def test_what_begins_with_a_minus_is_a_flag_unless_it_is_a_plain_number(word: str, expected: bool) -> None:
    assert is_value(word) is expected


def test_a_flag_takes_as_many_words_as_it_may() -> None:
    most = {"--switch": 0, "--many": None}
    words = ["a", "--switch", "b", "--one", "c", "d", "--many", "e", "-1", "--one=f", "g", "--many"]
    found = list(groups(words, lambda flag: most.get(flag, 1)))
    assert [(flag, values) for flag, values, _ in found] == [
        ("", ["a"]),
        ("--switch", []),
        ("", ["b"]),
        ("--one", ["c"]),
        ("", ["d"]),
        ("--many", ["e", "-1"]),
        ("--one", ["f"]),
        ("", ["g"]),
        ("--many", []),
    ]
    assert [word for _, _, written in found for word in written] == words


def test_words_in_pairs() -> None:
    words = ["--a.b", "1", "--c=--d e", "--e", "--f", "-2", "-g", "-h=1", "--"]
    assert list(assignments(words)) == [
        ("a.b", "1"),
        ("c", "--d e"),
        ("e", None),
        ("f", "-2"),
        ("-g", None),
        ("-h", "1"),
        ("--", None),
    ]
    with pytest.raises(SettingError, match=r"command line: got 'c'; accepted: settings as --name value"):
        list(assignments(["--a", "b", "c"]))
