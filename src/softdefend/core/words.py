"""The words of a command line: which of them are flags, and which are their values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from softdefend.core.errors import SettingError

_NEGATIVE = re.compile(r"-\d+$|-\d*\.\d+$")


def is_value(word: str) -> bool:
    """Whether a word is a value and no flag: what begins with a minus is one only as a plain number, or where
    a space stands before any ``=``."""
    name = word.partition("=")[0]
    return not word.startswith("-") or word == "-" or " " in name or _NEGATIVE.match(word) is not None


def groups(
    words: Sequence[str], most: Callable[[str], int | None]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Flags with their values, in order; a value that belongs to no flag has the flag ``""``.

    Args:
        words: of a command line.
        most: how many values a flag (``--seeds``) takes; None for any number. ``--flag=VALUE`` has one.

    Yields:
        The flag, its values, and the words that both were written with.
    """
    rest = list(words)
    while rest:
        flag, equals, value = rest[0].partition("=") if not is_value(rest[0]) else ("", "", "")
        if equals:
            yield flag, [value], rest[:1]
            rest = rest[1:]
            continue
        values = list(takewhile(is_value, rest[1:]))[: most(flag)] if flag else rest[:1]
        size = len(values) + bool(flag)
        yield flag, values, rest[:size]
        rest = rest[size:]


def assignments(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Words that are all ``--name value`` or ``--name=value``: names and values; None for a missing value.

    Raises:
        SettingError: a word that belongs to no flag.
    """
    for flag, values, written in groups(words, lambda _: 1):
        if not flag:
            raise stray(written[0])
        yield flag.removeprefix("--") or flag, values[0] if values else None


def stray(word: str) -> SettingError:
    """The error for a word that belongs to no flag."""
    return SettingError("command line", repr(word), "settings as --name value")


def no_value(flag: str) -> SettingError:
    """The error for a flag without the value that it needs."""
    return SettingError(flag, "no value", "a value behind it; --name=VALUE where it begins with a minus")
