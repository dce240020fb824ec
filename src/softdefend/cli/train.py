"""``softdefend train``: one recipe, trained, evaluated and reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from softdefend.cli.console import HELP
from softdefend.core.errors import SettingError
from softdefend.core.words import groups
from softdefend.experiments import pipeline
from softdefend.experiments.config import make_parser, plain_settings, print_config, resolve

_PRINT_CONFIG = "--print_config"
_PRINT_OPTIONS = ("skip_default", "skip_unset")


def run(words: Sequence[str]) -> None:
    """Train one run, or continue it; or print what was asked for instead."""
    for flag, values, _ in groups(words, lambda _: 1):
        if flag in HELP:
            completion().print_help()
            raise SystemExit(0)
        if flag.endswith(".help"):
            _print_class_help(flag, values)
    printing = [word for word in words if word.partition("=")[0] == _PRINT_CONFIG]
    if printing:
        others = [word for word in words if word not in printing]
        print(print_config(others, **_print_options(printing[-1])), end="")
        raise SystemExit(0)
    pipeline.train(resolve(words))


def completion(prog: str = "softdefend train") -> ArgumentParser:
    """A parser of every setting of a run, for help and completion."""
    parser = make_parser(prog)
    # Presets are read before anything is parsed, as protocols are.
    parser.add_argument("--preset", type=str, help="a recipe, by name or path; it wins over a protocol")
    return parser


def _print_class_help(flag: str, values: Sequence[str]) -> None:
    """Print the arguments of a class, as ``--label.help SGLR`` asks for them, and exit.

    Raises:
        SettingError: a setting that is no class, or an unknown class.
    """
    parser, setting = completion(), flag.removeprefix("--").removesuffix(".help")
    if flag not in {option for action in parser._actions for option in action.option_strings}:
        accepted = "a setting that names a class, such as --label.help"
        raise SettingError(flag.removeprefix("--"), "an unknown setting", accepted)
    words = [flag]
    if values:
        chosen: Any = plain_settings([f"--{setting}={values[0]}"])
        for key in setting.split("."):
            chosen = chosen[key]
        words = [f"{flag}={chosen['class_path']}"]
    parser.parse_args(words)


def _print_options(word: str) -> dict[str, bool]:
    """``--print_config=skip_default,skip_unset`` as keywords of :func:`print_config`.

    Raises:
        SettingError: another option.
    """
    given = list(filter(None, word.partition("=")[2].split(",")))
    for option in given:
        if option not in _PRINT_OPTIONS:
            raise SettingError(_PRINT_CONFIG, repr(option), " or ".join(_PRINT_OPTIONS))
    return {option: option in given for option in _PRINT_OPTIONS}
