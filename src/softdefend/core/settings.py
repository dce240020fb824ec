"""Settings as plain values: what dataclasses accept, and one line for everything else.

Plain values are what a YAML file holds: numbers, text, true, false, null, lists and mappings. Which are
accepted follows from the type hints of dataclasses and constructors. A *rule* is an object that a
configuration chooses by its class, such as a label rule: ``{class_path: SGLR, init_args: {r: 0.5}}``, or in
short ``SGLR``, or ``{r: 0.5}`` for an argument of the class that is chosen already.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from softdefend.core.errors import SettingError, did_you_mean
from softdefend.core.hints import (
    MISFIT,
    REQUIRED,
    SEQUENCES,
    WHOLE,
    WORDS,
    Slot,
    arguments_of,
    fields_of,
    fit,
    import_path,
    members_of,
)
from softdefend.core.registry import Registry
from softdefend.core.words import no_value
from softdefend.core.yaml_files import parse_value, read_yaml

Tree = dict[str, Any]
"""Plain values by name, section by section."""

_CLASS_KEYS = {"class_path", "init_args"}
_NULL = "null (None)"


@dataclass(frozen=True)
class Word:
    """A word of a command line, to be read as its setting's type has it; None where it is missing."""

    text: str | None


class Settings:
    """The settings that there are.

    Args:
        slots: their types and defaults by name, such as those of a dataclass by :func:`fields_of`.
        registries: the base classes of rules, each with its named classes.
        prefix: stands before every setting's name in messages, such as ``--``.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        *,
        registries: Mapping[type, Registry[Any]] | None = None,
        prefix: str = "",
    ) -> None:
        self.slots, self.registries, self.prefix = dict(slots), dict(registries or {}), prefix

    def update(self, tree: Mapping[str, Any], more: Mapping[str, Any]) -> Tree:
        """A tree with further values over it; neither is changed.

        Names in ``more`` may be dotted (``optim.lr``), its values may be :class:`Word`. In the tree every
        rule has an import path and arguments. Where its class changes, those of its earlier arguments stay
        that fit the new one.

        Raises:
            SettingError: an unknown name, a value of another type, or nothing where a value is needed.
        """
        return self._values(tree, more, self.slots, self.prefix, "")

    def missing(self, tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Settings without a default that a tree lacks: their names, and what they accept."""
        return self._missing(tree, self.slots, self.prefix)

    def describe(self, hint: Any) -> str:
        """What a type accepts, in words."""
        known = [self._describe(member) for member in members_of(hint) if self._is_known(member)]
        return " or ".join(known) or "a value"

    # --- one value -----------------------------------------------------------------------------------------

    def _adapt(self, old: Any, new: Any, slot: Slot, name: str, show: Callable[[Any], str] = str) -> Any:
        """The value of a setting as its type has it; ``old`` is its earlier one, None where there is none."""
        if isinstance(new, Word):
            new = self._read(new, slot.hint, name)
        members = members_of(slot.hint)
        if int in members and isinstance(new, int):
            _check_size(name, new)
        for member in members:
            if (fitting := fit(new, member)) is not MISFIT:
                return fitting
        if not any(self._is_known(member) for member in members if member is not type(None)):
            return new  # a type that no plain value tells of
        if new is None:
            raise SettingError(name, _NULL, f"a value: {self.describe(slot.hint)}")
        for member in members:
            if self._is_rule(member):
                return self._rule(old, new, Slot(member, slot.default), name, self.describe(slot.hint))
            if is_dataclass(member):
                return self._section(old, new, Slot(member, slot.default), name)
            if get_origin(member) in SEQUENCES and isinstance(new, SEQUENCES):
                return self._items(list(new), member, name)
        if isinstance(new, str) and (loaded := parse_value(new, name)) != new:
            return self._adapt(old, loaded, slot, name, show)  # a number in quotes
        raise SettingError(name, show(new) or "nothing", self.describe(slot.hint))

    def _read(self, word: Word, hint: Any, name: str) -> Any:
        """A word as a plain value. It stays text where that is what the type asks for, as ``8/255`` is."""
        text, members = word.text, members_of(hint)
        if text is None:
            raise no_value(f"--{name.removeprefix('--')}")
        if any(fit(text, member) is not MISFIT for member in members if member not in (str, Path)):
            return text
        value = parse_value(text, name)
        if not isinstance(value, str) and any(fit(value, member) is not MISFIT for member in members):
            return value
        if any(fit(text, member) is not MISFIT for member in members):
            return text
        if isinstance(value, str) and any(map(self._is_section, members)) and os.path.isfile(text):
            return read_yaml(Path(text))
        names_class = any(map(self._is_rule, members)) and not isinstance(value, (Mapping, type(None)))
        return text if isinstance(value, str) or names_class else value

    def _items(self, new: list[Any], member: Any, name: str) -> list[Any]:
        """The values of a list; a wrong one is shown in quotes, for it stands among others."""
        hints = get_args(member)
        if get_origin(member) is not tuple or Ellipsis in hints:
            hints = hints[:1] * len(new)
        if len(new) != len(hints):
            raise SettingError(name, new, f"a list of {len(hints)}")
        return [self._adapt(None, one, Slot(hint), name, repr) for one, hint in zip(new, hints, strict=True)]

    # --- sections ------------------------------------------------------------------------------------------

    def _section(self, old: Any, new: Any, slot: Slot, name: str) -> Tree:
        if not isinstance(new, Mapping):
            raise SettingError(name, repr(new), f"{self._describe(slot.hint)}; as words: --{name}.NAME VALUE")
        slots = fields_of(slot.hint, slot.default)
        return self._values(old or {}, new, slots, f"{name}.", f"those of {name}: ")

    def _values(
        self,
        old: Mapping[str, Any],
        new: Mapping[Any, Any],
        slots: Mapping[str, Slot],
        prefix: str,
        owner: str,
    ) -> Tree:
        """Values by name, those of ``new`` over those of ``old``; ``owner`` is whose names ``slots`` has."""
        values = dict(old)
        for key, value in new.items():
            name, dot, rest = str(key).partition(".")
            if name not in slots or (dot and not self._is_nested(slots[name].hint)):
                accepted = f"{owner}{', '.join(slots) or 'none'}{did_you_mean(name, slots)}"
                raise SettingError(f"{prefix}{key}", "an unknown setting", accepted)
            given = {rest: value} if dot else value
            values[name] = self._adapt(values.get(name), given, slots[name], f"{prefix}{name}")
        return values

    # --- rules ---------------------------------------------------------------------------------------------

    def _rule(self, old: Any, new: Any, slot: Slot, name: str, accepted: str) -> Tree:
        given = _spelled_out(new, name, accepted)
        standard = import_path(type(slot.default)) if isinstance(slot.default, slot.hint) else ""
        path = given.get("class_path", old["class_path"] if old else standard)
        kind = self._class(path, slot.hint, name, accepted)
        slots = arguments_of(kind, slot.default)
        earlier = old["init_args"] if old else {}
        if old and self._class(old["class_path"], slot.hint, name, accepted) is not kind:
            earlier = dict(self._fitting(earlier, slots))
        owner = f"those of {kind.__name__}: "
        arguments = self._values(earlier, given.get("init_args", {}), slots, f"{name}.", owner)
        return {"class_path": path if "." in path else import_path(kind), "init_args": arguments}

    def _fitting(self, arguments: Mapping[str, Any], slots: Mapping[str, Slot]) -> Iterator[tuple[str, Any]]:
        """Those of a class's arguments that another class takes too."""
        for key in (key for key in slots if key in arguments):
            with contextlib.suppress(SettingError):
                yield key, self._adapt(None, arguments[key], slots[key], key)

    def _class(self, path: Any, base: type, name: str, accepted: str) -> type:
        """The class of a name or an import path.

        Raises:
            SettingError: there is none, it cannot be imported, or it is of another kind.
        """
        if not isinstance(path, str) or not path:
            raise SettingError(name, _NULL if path is None else path or "no class_path", accepted)
        registry = self._registry(base)
        found: Any = None
        if registry is not None and path in registry:
            found = registry[path]
        elif "." in path:
            module, _, attribute = path.rpartition(".")
            try:
                found = getattr(importlib.import_module(module), attribute)
            except Exception as error:  # importing somebody's module fails in any way
                raise SettingError(name, f"{path} ({error})", accepted) from error
        if not (isinstance(found, type) and issubclass(found, base)):
            raise SettingError(name, path, accepted)
        if inspect.isabstract(found):
            raise SettingError(name, f"{path}, an abstract class", accepted)
        return found

    # --- types ---------------------------------------------------------------------------------------------

    def _registry(self, member: Any) -> Registry[Any] | None:
        """The named classes of a base class or of one derived from it; None where it is no rule's."""
        bases = (base for base in self.registries if isinstance(member, type) and issubclass(member, base))
        return self.registries.get(next(bases, object))

    def _is_rule(self, member: Any) -> bool:
        return self._registry(member) is not None

    def _is_section(self, member: Any) -> bool:
        return is_dataclass(member) and not self._is_rule(member)

    def _is_nested(self, hint: Any) -> bool:
        return any(self._is_rule(member) or is_dataclass(member) for member in members_of(hint))

    def _is_known(self, member: Any) -> bool:
        listed = member in WORDS or get_origin(member) in (Literal, *SEQUENCES)
        return listed or is_dataclass(member) or self._is_rule(member)

    def _describe(self, member: Any) -> str:
        if (registry := self._registry(member)) is not None:
            return " or ".join(
                [*registry.names(), f"the import path of your own subclass of {member.__name__}"]
            )
        if is_dataclass(member):
            return f"its settings by name: {', '.join(fields_of(member))}"
        if get_origin(member) is Literal:
            return " or ".join(map(str, get_args(member)))
        return "a list, such as [a, b]" if get_origin(member) in SEQUENCES else WORDS[member]

    def _missing(
        self, tree: Mapping[str, Any], slots: Mapping[str, Slot], prefix: str
    ) -> Iterator[tuple[str, str]]:
        for name, slot in slots.items():
            if name not in tree:
                if slot.default is REQUIRED:
                    yield f"{prefix}{name}", self.describe(slot.hint)
                continue
            for member in members_of(slot.hint) if isinstance(tree[name], Mapping) else ():
                values, inner = tree[name], {}
                if self._is_rule(member):
                    kind = self._class(values["class_path"], member, name, self._describe(member))
                    values, inner = values["init_args"], arguments_of(kind, slot.default)
                elif is_dataclass(member):
                    inner = fields_of(member, slot.default)
                yield from self._missing(values, inner, f"{prefix}{name}.")


def _check_size(name: str, number: int) -> None:
    """Refuse a count that no tensor can have. Seeds have ranges of their own, and say so themselves."""
    if not -WHOLE <= number < WHOLE and "seed" not in name.rpartition(".")[2]:
        raise SettingError(name, number, "a whole number from -2^63 to 2^63 - 1")


def _spelled_out(given: Any, name: str, accepted: str) -> dict[str, Any]:
    """A rule's short forms in its long one, of which parts may be absent."""
    if isinstance(given, str):
        return {"class_path": given}
    if not isinstance(given, Mapping):
        raise SettingError(name, given, accepted)
    keys = {str(key).partition(".")[0] for key in given}
    if not keys & _CLASS_KEYS:
        return {"init_args": given}
    path, arguments = given.get("class_path", ""), given.get("init_args", {})
    further = {key.partition(".")[2]: value for key, value in given.items() if key.startswith("init_args.")}
    if keys - _CLASS_KEYS or not isinstance(arguments, Mapping):
        spelling = "{class_path: NAME, init_args: {SETTING: VALUE}}, or NAME alone"
        what = "settings beside class_path" if keys - _CLASS_KEYS else f"init_args {arguments}"
        raise SettingError(name, what, spelling)
    if isinstance(path, Word):
        path = path.text
    chosen = {"class_path": path} if "class_path" in given else {}
    return {**chosen, "init_args": {**arguments, **further}}
