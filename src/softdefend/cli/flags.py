"""A command's flags, made from dataclasses: names, types, defaults and help are those of their fields."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from jsonargparse import ArgumentParser, set_parsing_settings

from softdefend.cli.console import HELP
from softdefend.core.docstrings import field_docstrings
from softdefend.core.errors import SettingError, did_you_mean
from softdefend.core.hints import REQUIRED, SEQUENCES, Slot, fields_of, members_of
from softdefend.core.settings import Settings, Tree, Word
from softdefend.core.threat import Budget
from softdefend.core.words import groups, no_value, stray

T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # what stands below a setting is its help


def positional(default: Any = REQUIRED) -> Any:
    """A field that is no flag: its words stand by themselves, those of a tuple in one row."""
    return field(default=default, metadata={"positional": True})


def switch() -> Any:
    """A field that is false, and true where its flag is given; the flag takes no value."""
    return field(default=False, metadata={"switch": True})


@dataclass(frozen=True)
class Given:
    """What the words of one call give.

    Attributes:
        values: plain values by the name of their flag, for those that were given.
        rest: words for ``softdefend train``.
    """

    values: Tree
    rest: list[str]

    def make(self, kind: type[T]) -> T:
        """An object of one of the command's dataclasses; what was not given is as its defaults have it."""
        return kind(**self.changes(kind))

    def changes(self, kind: type) -> dict[str, Any]:
        """Of the fields of a dataclass those that were given, as its constructor takes them."""
        return _constructor_arguments(self.values, kind)


class Flags:
    """The flags of one command.

    Args:
        name: of the command.
        kinds: dataclasses; the first one's docstring describes the command.
        partial: of these what is not given stays open, so that their defaults are not shown.
        passes_on: makes the parser of ``softdefend train``, to which all words go that are no flags here.
        epilog: what help ends with.
    """

    def __init__(
        self,
        name: str,
        *kinds: type,
        partial: Sequence[type] = (),
        passes_on: Callable[[str], ArgumentParser] | None = None,
        epilog: str = "",
    ) -> None:
        self.prog, self.kinds, self.passes_on = f"softdefend {name}", kinds, passes_on
        self.partial, self.epilog = tuple(partial), epilog
        # Dashes tell a command's own flags from the settings of the training that it passes words on to.
        slots = {name: slot for kind in kinds for name, slot in fields_of(kind).items()}
        self.settings = Settings(slots, prefix="--" if passes_on else "")
        marked = {one.name: one.metadata for kind in kinds for one in fields(kind)}
        self._positional = [name for name, mark in marked.items() if "positional" in mark]
        self._flags = [name for name in marked if name not in self._positional]
        self._switches = {name for name, mark in marked.items() if "switch" in mark}

    # --- words ---------------------------------------------------------------------------------------------

    def read(self, words: Sequence[str]) -> Given:
        """What words give. ``--help`` among them prints help and exits.

        Raises:
            SettingError: words that cannot be used, or one missing.
        """
        if HELP & set(words):
            self.parser().print_help()
            raise SystemExit(0)
        values: Tree = {}
        rest: list[str] = []
        row = ""  # the positional tuple that the next word may continue
        for flag, given, written in groups(words, self._most):
            name = self._setting(flag, values) if flag or not row else row
            row = name if not flag and self._is_list(name) else ""
            if name:
                value = self._value(flag, given) if flag else self._positional_value(values, name, given[0])
                values = self.settings.update(values, {name: value})
            elif self.passes_on:
                rest += written
            elif flag:
                bare = flag.removeprefix("--") or flag
                accepted = ", ".join(self._flags) + did_you_mean(bare, self._flags)
                raise SettingError(bare, "an unknown setting", accepted)
            else:
                raise stray(written[0])
        for name, _ in self.settings.missing(values):
            bare = name.removeprefix("--")
            shown = bare if bare in self._positional else name
            raise SettingError(shown, "nothing", f"{self._meaning(bare)}; see '{self.prog} --help'")
        return Given(values, rest)

    def _meaning(self, name: str) -> str:
        """What help says of a flag, inside a sentence."""
        texts = {one: text for kind in self.kinds for one, text in field_docstrings(kind).items()}
        text = texts.get(name, "").removesuffix(".")
        return text[:1].lower() + text[1:] or "a value"

    def _setting(self, flag: str, values: Tree) -> str:
        """The setting that a flag is for, or the next word by itself where it is empty; empty for none."""
        name = flag.removeprefix("--")
        if flag:
            return name if name.partition(".")[0] in self._flags else ""
        return next((one for one in self._positional if one not in values), "")

    def _most(self, flag: str) -> int | None:
        name = flag.removeprefix("--")
        if name in self._switches:
            return 0
        return None if self._is_list(name) else 1

    def _is_list(self, name: str) -> bool:
        return name in self.settings.slots and get_origin(self.settings.slots[name].hint) in SEQUENCES

    def _value(self, flag: str, given: Sequence[str]) -> Any:
        name = flag.removeprefix("--")
        if name in self._switches:
            if given:
                raise SettingError(flag, repr(given[0]), "no value: it is a switch")
            return True
        if self._is_list(name):
            if not given:
                raise no_value(flag)
            return [Word(word) for word in given]
        return Word(given[0] if given else None)

    def _positional_value(self, values: Tree, name: str, word: str) -> Any:
        return [*values.get(name, ()), Word(word)] if self._is_list(name) else Word(word)

    # --- help ----------------------------------------------------------------------------------------------

    def parser(self) -> ArgumentParser:
        """A parser of the command's own flags; for help only."""
        note = "Every setting of 'softdefend train' is accepted beside these: see 'softdefend train --help'."
        parser = ArgumentParser(
            prog=self.prog,
            exit_on_error=False,
            allow_abbrev=False,
            description=" ".join((self.kinds[0].__doc__ or "").split()),
            epilog=" ".join(filter(None, (note if self.passes_on else "", self.epilog))),
        )
        self._add_to(parser)
        return parser

    def completion(self) -> ArgumentParser:
        """A parser of all flags that the command takes, those of training included; for completion only."""
        if self.passes_on is None:
            return self.parser()
        parser = self.passes_on(self.prog)
        self._add_to(parser)
        return parser

    def _add_to(self, parser: ArgumentParser) -> None:
        taken = {option for action in parser._actions for option in action.option_strings}
        for kind in self.kinds:
            texts = field_docstrings(kind)
            for name, slot in fields_of(kind).items():
                if f"--{name}" not in taken:
                    self._add(parser, name, slot, texts[name], shown=kind not in self.partial)

    def _add(self, parser: ArgumentParser, name: str, slot: Slot, text: str, *, shown: bool) -> None:
        options: dict[str, Any] = {"help": text.replace("%", "%%")}
        default = _plain(slot.default) if shown else argparse.SUPPRESS
        if name in self._positional:
            count = None if not self._is_list(name) else "+" if slot.default is REQUIRED else "*"
            parser.add_argument(name, type=str, nargs=count, **options)
        elif name in self._switches:
            parser.add_argument(f"--{name}", action="store_true", **options)
        elif is_dataclass(slot.hint):
            parser.add_argument(f"--{name}", type=slot.hint, default=slot.default, **options)
        else:
            hint = get_args(slot.hint)[0] if self._is_list(name) else slot.hint
            options |= {"nargs": "+"} if self._is_list(name) else {}
            kind = str if hint is Path else str | None if Path in members_of(hint) else hint
            required, default = (True, None) if slot.default is REQUIRED else (False, default)
            parser.add_argument(f"--{name}", type=kind, required=required, default=default, **options)


def _plain(default: Any) -> Any:
    if isinstance(default, tuple):
        return [_plain(one) for one in default]
    return str(default) if isinstance(default, Path) else default


def _constructor_arguments(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    slots = fields_of(kind)
    return {name: _object(value, slots[name].hint) for name, value in values.items() if name in slots}


def _object(value: Any, hint: Any) -> Any:
    """A plain value as the type has it that it was checked against."""
    if value is None:
        return None
    for member in members_of(hint):
        if member in (Budget, Path):
            return member(value)
        if is_dataclass(member) and isinstance(member, type):
            return member(**_constructor_arguments(value, member))
        if get_origin(member) in SEQUENCES:
            item = get_args(member)[0]
            return get_origin(member)(_object(one, item) for one in value)
    return value
