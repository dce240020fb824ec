"""Flags made from dataclasses: what words give, what help shows, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse import ArgumentParser

from softdefend.cli.flags import Flags, positional, switch
from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"] = "a"
    """Which of the two, in 100%."""
    rate: float = 0.5


@dataclass(frozen=True)
class Own:
    """Do one thing, and do it well."""

    action: str = positional()
    """What to do."""
    runs: tuple[str, ...] = positional(())
    """Where,
    in a second line."""
    seeds: tuple[int, ...] = (0,)
    """Some numbers."""
    eps: Budget | None = None
    folder: Path = Path("here")
    """A place."""
    log: Path | None = None
    loud: bool = switch()
    """Say it."""
    sure: bool | None = None
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class More:
    size: int | None = 10
    """Of the thing."""
    steps: int = 20
    """Of the thing too."""


@dataclass(frozen=True)
class Needs:
    """Needs something."""

    presets: tuple[str, ...]
    only: str = "all"


FLAGS = Flags("thing", Own, More, partial=(More,))
PASSING = Flags("many", Needs, passes_on=lambda prog: ArgumentParser(prog=prog), epilog="The end: 100%.")


def read(words: str, flags: Flags = FLAGS) -> Own:
    return flags.read(words.split()).make(Own)


def test_words_become_objects_of_the_fields_types() -> None:
    words = (
        "do a b --seeds 1 2 -3 --eps 8/255 --folder there --loud --sure null --inner.kind b --inner.rate 1"
    )
    made = read(words)
    assert made == Own(
        "do", ("a", "b"), (1, 2, -3), Budget("8/255"), Path("there"), None, True, None, Inner("b", 1.0)
    )
    assert type(made.inner.rate) is float
    assert str(made.eps) == "8/255"


def test_what_is_not_given_is_as_its_default_has_it() -> None:
    assert read("do") == Own("do")


def test_only_what_was_given_changes_settings_of_elsewhere() -> None:
    given = FLAGS.read(["do", "--size", "null"])
    assert given.changes(More) == {"size": None}
    assert given.make(More) == More(size=None)
    assert set(given.values) == {"action", "size"}


@pytest.mark.parametrize("words", ["--loud do a b", "do --loud a b", "--sure true do a b --seeds 1"])
def test_words_by_themselves_may_stand_anywhere_in_one_row(words: str) -> None:
    made = read(words)
    assert (made.action, made.runs) == ("do", ("a", "b"))


BEHIND = "a value behind it; --name=VALUE where it begins with a minus"
REFUSED = {
    "nothing": ("", "action: got nothing; accepted: what to do; see 'softdefend thing --help'"),
    "a word with a flag": ("--action do", "action: got an unknown setting; accepted: seeds, eps, "),
    "in two rows": ("do a --loud b", "command line: got 'b'; accepted: settings as --name value"),
    "unknown": ("do --foo 1", "foo: got an unknown setting; accepted: seeds, eps, folder, log, loud, "),
    "unknown in a section": (
        "do --inner.foo 1",
        "inner.foo: got an unknown setting; accepted: those of inner: kind, rate",
    ),
    "abbreviated": ("do --fold x", "fold: got an unknown setting; accepted: "),
    "short": ("do -s 1", "-s: got an unknown setting; accepted: "),
    "no value": ("do --eps", f"--eps: got no value; accepted: {BEHIND}"),
    "no values": ("do --seeds --loud", f"--seeds: got no value; accepted: {BEHIND}"),
    "one of many": ("do --seeds 1 x", "seeds: got 'x'; accepted: a whole number"),
    "a value for a switch": ("do --loud=yes", "--loud: got 'yes'; accepted: no value: it is a switch"),
    "no ratio": ("do --eps x", "eps: got x; accepted: a ratio such as 8/255 or "),
    "no path": ("do --log=", "log: got nothing; accepted: a path or null"),
    "no choice": ("do --inner.kind c", "inner.kind: got c; accepted: a or b"),
    "two values": ("do a --size 1 2", "command line: got '2'; accepted: settings as --name value"),
}


@pytest.mark.parametrize(("words", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_one_line(words: str, expected: str) -> None:
    with pytest.raises(SettingError) as raised:
        FLAGS.read(words.split())
    assert str(raised.value).startswith(expected)


def test_words_for_training_are_passed_on_as_they_are() -> None:
    words = "--presets a b --optim.lr 0.1 --label=SGLR stray --only few --preset -1e-4 --presets c"
    given = PASSING.read(words.split())
    assert given.make(Needs) == Needs(("c",), "few")
    assert given.rest == ["--optim.lr", "0.1", "--label=SGLR", "stray", "--preset", "-1e-4"]


def test_a_commands_own_flags_have_dashes_where_others_are_passed_on() -> None:
    with pytest.raises(SettingError, match=r"^--presets: got nothing; .*'softdefend many --help'"):
        PASSING.read(["--optim.lr", "0.1"])
    with pytest.raises(SettingError, match=r"^--presets: got no value"):
        PASSING.read(["--presets"])


# --- help ---------------------------------------------------------------------------------------------------


def shown(parser: ArgumentParser) -> str:
    return " ".join(parser.format_help().split())


def test_help_shows_every_flag_with_its_words_type_and_default() -> None:
    text = shown(FLAGS.parser())
    for name in (*FLAGS.settings.slots, "inner.kind", "inner.rate"):
        assert f"--{name} " in text or name in ("action", "runs")
    for words in ("Do one thing, and do it well.", "What to do.", "Where, in a second line.", "A place."):
        assert words in text
    assert "Which of the two, in 100%. (type: Literal['a', 'b'], default: a)" in text
    assert "(type: str, default: here)" in text
    assert "Of the thing. (type: int | null)" in text  # a default that is elsewhere is not shown
    assert "[runs ...]" in text


def test_help_of_a_command_that_passes_words_on_tells_where_to_find_the_others() -> None:
    text = shown(PASSING.parser())
    assert "beside these: see 'softdefend train --help'." in text
    assert text.endswith("The end: 100%.")
    assert "train --help" not in shown(FLAGS.parser())


def test_completion_knows_the_flags_of_both() -> None:
    def others(prog: str) -> ArgumentParser:
        parser = ArgumentParser(prog=prog)
        parser.add_argument("--optim.lr", type=float)
        parser.add_argument("--only", type=str, help="as training has it")
        return parser

    text = shown(Flags("many", Needs, passes_on=others).completion())
    assert all(flag in text for flag in ("--optim.lr", "--presets", "as training has it"))


@pytest.mark.parametrize("words", ["--help", "do -h", "do --foo --help"])
def test_help_is_printed_for_whoever_asks(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        FLAGS.read(words.split())
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: softdefend thing")
