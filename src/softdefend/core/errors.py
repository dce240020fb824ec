"""Errors a person can act on: one line that names the setting, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def printable(text: str) -> str:
    """A text with an escape for each character that a page, a file or a terminal cannot have or would obey.

    Names of files are bytes to the system; those that are no UTF-8 come as lone surrogates.

    >>> printable("caf\\udce9\\x1b[1m")
    'caf\\\\xe9\\\\x1b[1m'
    """
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    byte = ord(character) - 0xDC00  # where it stands for a byte, from 0x80 on
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()


def one_line(reason: object) -> str:
    """What somebody else's code says of its failure, on one line of at most 160 characters."""
    return " ".join(str(reason).split())[:160]


class SettingError(ValueError):
    """A setting, file or tensor from outside that cannot be used. The command line exits with code 2.

    Args:
        setting: the name a user knows it by (``threat.eps``, a path, an argument name).
        given: what was given, as the user would recognise it.
        accepted: what would have been accepted.

    >>> str(SettingError("threat.eps", "8", "a value in (0, 1] in pixel units, such as 8/255"))
    'threat.eps: got 8; accepted: a value in (0, 1] in pixel units, such as 8/255'
    """

    def __init__(self, setting: str, given: object, accepted: str) -> None:
        self.setting, self.given, self.accepted = setting, given, accepted
        text = f"{setting}: got {given}; accepted: {accepted}"
        super().__init__(printable(" ".join(text.split())))

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, str, str]]:
        return type(self), (self.setting, str(self.given), self.accepted)


def check_values(section: str, settings: object, checks: Iterable[tuple[str, bool, str]]) -> None:
    """Refuse the first value that is not valid.

    Args:
        section: what the settings are called together, such as ``optim``.
        settings: holds the values by name.
        checks: for each the name of a value, whether it is valid, and what is accepted.

    Raises:
        SettingError: for that value.
    """
    for name, valid, accepted in checks:
        if not valid:
            raise SettingError(f"{section}.{name}", getattr(settings, name), accepted)


class DivergenceError(RuntimeError):
    """Training stopped because the loss or a weight is no longer a usable number (exit code 3)."""


EXIT_LOST = 4
"""The exit code of :class:`LostProcessError`."""


class LostProcessError(RuntimeError):
    """Another process of the same run has ended or does not answer."""


class ReportedError(RuntimeError):
    """A process that was started from here has failed, and has said why.

    Args:
        code: its exit code.
    """

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"a process ended with code {code}")


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """The other name that is spelled most like ``given``, as an ending for ``accepted``; empty where none is.

    >>> did_you_mean("pgdat", ["trades", "pgd-at"]), did_you_mean("nope", ["trades", "pgd-at"])
    ('; did you mean pgd-at?', '')
    """
    spelled = {name.lower(): name for name in names if name != given}
    near = get_close_matches(given.lower(), spelled, n=1)
    return f"; did you mean {spelled[near[0]]}?" if near else ""
