"""What the command-line parser complains about, in our one line."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from softdefend.attacks import PGD
from softdefend.core.errors import SettingError
from softdefend.training.config import RULES, flat_hints

CLASSES: dict[str, type] = {
    **{kind: flat_hints()[kind] for kind in RULES},
    "attack": PGD,
    "validate.attack": PGD,
}
"""Settings that name a class, and its base."""

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple": "a list, such as [a, b]",
    "NoneType": "null",
    "softdefend.core.threat.Budget": "a ratio such as 8/255 or a number such as 0.03",
}


_NO_SETTING = re.compile("(help|config|version|subcommand|print_.*)$")


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Arguments to a namespace; the parser's errors as our one line.

    Raises:
        SettingError: arguments that cannot be used.
    """
    try:
        parsed = parser.parse_args(list(arguments))
        made: argparse.Namespace = parser.instantiate(parsed)
    except ArgumentError as error:
        raise readable(error, parser) from error
    return made


def readable(error: Exception | str, parser: argparse.ArgumentParser) -> SettingError:
    """A parser's complaint as an error that names the setting, what was given and what is accepted."""
    text = " ".join(str(error).split())
    # Parser keys are nested: the rule's key first, then that of the rule's argument.
    setting = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)))
    return (
        _unknown(text, setting, parser)
        or _no_value(text, parser.prog)
        or _wrong_rule(text, setting)
        or _wrong_value(text, setting)
        or SettingError(setting or "command line", text, f"what '{parser.prog} --help' says")
    )


def _unknown(text: str, setting: str, parser: argparse.ArgumentParser) -> SettingError | None:
    # Beside class_path stands something else than init_args, so all of it is taken for the default's own.
    if re.search(r"Problem with given class_path '[^']+': .*[Oo]ption 'class_path' is not", text):
        accepted = "{class_path: NAME, init_args: {SETTING: VALUE}}, or NAME alone"
        return SettingError(setting, "settings beside class_path", accepted)
    if rule := re.search(r"given class_path '([^']+)': (?:.* )?[Oo]ption '([^']+)' is not accepted", text):
        accepted = ", ".join(_arguments_of(rule[1])) or "none"
        rule_name = rule[1].rpartition(".")[2]
        return SettingError(f"{setting}.{rule[2]}", "an unknown setting", f"those of {rule_name}: {accepted}")
    if word := re.search(r"unrecognized arguments: (\S+)", text):
        if not word[1].startswith("-"):
            return SettingError("command line", repr(word[1]), "settings as --name value")
        name = word[1].lstrip("-").partition("=")[0]
    elif group := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        name = f"{group[1]}.{group[2]}"
    elif option := re.search(r"Option '([^']+)' is not accepted", text):
        name = option[1]
    else:
        return None
    return SettingError(name, "an unknown setting", _nearest(name, parser))


def _nearest(name: str, parser: argparse.ArgumentParser) -> str:
    """The settings of the section that ``name`` would belong to, else those of the whole parser."""
    every = [action.dest for action in parser._actions if not _NO_SETTING.match(action.dest)]
    section, dot, _ = name.rpartition(".")
    beside = [key for key in every if key.startswith(section + dot)] if dot else []
    known = dict.fromkeys(key.removeprefix(section + dot).partition(".")[0] for key in beside or every)
    return (f"those of {section}: " if beside else "") + ", ".join(known or [f"see {parser.prog} --help"])


def _no_value(text: str, prog: str) -> SettingError | None:
    if found := re.search(r"the following arguments are required: (.+)", text):
        return SettingError(found[1], "nothing", f"a value, as '{prog} --help' says")
    if found := re.search(r"argument (--\S+): expected (?:one|at least one) argument", text):
        return SettingError(
            found[1], "no value", "a value behind it; --name=VALUE where it begins with a minus"
        )
    if found := re.search(r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", text):
        return SettingError(found[1], found[2], found[3].replace("'", ""))
    if found := re.search(r"argument (\S+): invalid (\w+) value: (.+)", text):
        return SettingError(found[1], found[3], _TYPES.get(found[2], found[2]))
    return None


def _wrong_rule(text: str, setting: str) -> SettingError | None:
    given = (
        re.search(r"Expected a dot import path string: (.+)", text)
        or re.search(r"Import path (\S+) does not correspond to a subclass", text)
        or re.search(r"Not a valid subclass of \w+\. Got value: (.+?) Subclass types", text)
    )
    failed = re.search(r"Problem with given class_path '([^']+)': (?!Parser key)(.+)", text)
    # Python's own words for a class_path that is null.
    null = re.search("argument of type 'NoneType' is not .*iterable$", text)
    if setting not in CLASSES or not (given or failed or null):
        return None
    what = given[1] if given else f"{failed[1]} ({failed[2]})" if failed else "null"
    known = RULES[setting].names() if setting in RULES else [CLASSES[setting].__name__]
    own = f"the import path of your own subclass of {CLASSES[setting].__name__}"
    return SettingError(setting, what, " or ".join([*known, own]))


def _wrong_value(text: str, setting: str) -> SettingError | None:
    if nested := re.search(r": got (.+?); accepted: (.+?)(?: - Expected| Given value|$)", text):
        return SettingError(setting, nested[1], nested[2])
    if found := re.search(r"Unable to load config ['\"](.+?)['\"]", text):
        return SettingError(setting, repr(found[1]), f"its settings one by one, as --{setting}.NAME VALUE")
    if found := re.search(r"Expected an? (.+?)\. Got value:(.*)$", text):
        return SettingError(setting, found[2].strip() or "nothing", _type(found[1]))
    if found := re.search(r"Subtypes: \[(.+?)\] Errors: .* Given value: (.+)$", text):
        return SettingError(setting, found[2], _type(found[1]))
    return None


def _type(annotation: str) -> str:
    """``<class 'int'>, typing.Literal['a', 'b']`` as words."""
    words: list[str] = []
    for name, choices in re.findall(r"<class '([\w.]+)'>|typing\.Literal\[([^\]]*)\]", annotation):
        words += [_TYPES.get(name, name)] if name else choices.replace("'", "").split(", ")
    return " or ".join(words) or annotation


def _arguments_of(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
