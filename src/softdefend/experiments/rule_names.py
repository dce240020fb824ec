"""Names of rules in a configuration, such as ``SGLR``, written as the import paths of their classes.

A name is looked up in the registry of its kind. The parser library would look among all subclasses that are
loaded in the process instead, where two may share a name. It only ever sees import paths.
"""

from __future__ import annotations

import inspect
import json
import pydoc
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_type_hints

import yaml

from softdefend.core.errors import SettingError
from softdefend.training.config import RULES, flat_hints
from softdefend.training.plain import import_path


class RuleNames:
    """Replaces names by import paths, in one configuration after another.

    It remembers which class stands where, since the arguments of a rule may be rules too: with
    ``--weight AWP`` in an earlier place, ``--weight.average EMA`` names a weight rule.
    """

    def __init__(self) -> None:
        self._hints: dict[str, Any] = dict(flat_hints())

    def in_content(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content of a configuration file.

        Raises:
            SettingError: the name of no rule.
        """
        return {name: self._value(name, value) for name, value in content.items()}

    def in_words(self, words: Iterable[str]) -> list[str]:
        """Words of the command line.

        Raises:
            SettingError: the name of no rule.
        """
        found: list[str] = []
        rest = iter(words)
        for word in rest:
            flag, equals, value = word.partition("=")
            setting = _setting(flag)
            if self._kind(setting) is None:
                found.append(word)
            elif equals:
                found.append(f"{flag}={self._word(setting, value)}")
            else:
                given = next(rest, "")
                found += [flag, self._word(setting, given)] if given and given[:2] != "--" else [flag, given]
        return found

    def _word(self, setting: str, word: str) -> str:
        try:
            value = yaml.safe_load(word)
        except yaml.YAMLError:
            value = word
        if isinstance(value, Mapping):
            return json.dumps(self._value(setting, value))
        return word if value is None else str(self._value(setting, word))

    def _value(self, setting: str, value: Any) -> Any:
        if self._kind(setting) is None:
            return value
        if isinstance(value, str):
            return self._path(setting, value)
        if not isinstance(value, Mapping):
            return value
        made = dict(value)
        if isinstance(value.get("class_path"), str):
            made["class_path"] = self._path(setting, value["class_path"])
        if isinstance(value.get("init_args"), Mapping):
            arguments = value["init_args"].items()
            made["init_args"] = {name: self._value(f"{setting}.{name}", one) for name, one in arguments}
        return made

    def _path(self, setting: str, name: str) -> str:
        """The import path of a name; paths stay as they are."""
        kind = self._kind(setting)
        assert kind is not None
        if "." not in name and name not in RULES[kind]:
            own = f"the import path of your own subclass of {flat_hints()[kind].__name__}"
            raise SettingError(setting, name or "nothing", " or ".join([*RULES[kind].names(), own]))
        rule = _locate(name) if "." in name else RULES[kind][name]
        if rule is not None:
            self._hints |= {f"{setting}.{name}": hint for name, hint in _argument_hints(rule).items()}
        return name if "." in name else import_path(RULES[kind][name])

    def _kind(self, setting: str) -> str | None:
        """Which kind of rule a setting takes: ``label``, ``objective`` or ``weight``; None for none."""
        hint = self._hints.get(setting)
        return next((kind for kind in RULES if flat_hints()[kind] in (hint, *get_args(hint))), None)


def _setting(flag: str) -> str:
    """``weight.average`` for ``--weight.init_args.average.class_path``."""
    keys = flag.removeprefix("--").split(".") if flag.startswith("--") else []
    return ".".join(key for key in keys if key not in ("class_path", "init_args"))


def _locate(path: str) -> Any:
    """The class of an import path; None where it cannot be imported, which the parser says."""
    try:
        return pydoc.locate(path)
    except pydoc.ErrorDuringImport:
        return None


def _argument_hints(rule: Any) -> dict[str, Any]:
    """Types of a class's constructor arguments; of somebody else's class as far as they can be read."""
    found: dict[str, Any] = {}
    for base in reversed(inspect.getmro(rule) if inspect.isclass(rule) else ()):
        if "__init__" in vars(base):
            try:
                found |= get_type_hints(vars(base)["__init__"])
            except (NameError, TypeError):  # names that only a type checker imports
                continue
    return found
