"""Type hints of settings: which names a class takes, and whether a plain value is of a type."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget

REQUIRED: Any = dataclasses.MISSING
"""The default of a setting that has none."""

MISFIT = object()
"""What :func:`fit` finds of a value of another type."""

SEQUENCES = (tuple, list, set, frozenset)

WHOLE = 2**63
"""Whole numbers of settings are from -WHOLE to WHOLE - 1, as tensors and generators have them."""

WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    Budget: "a ratio such as 8/255 or a non-negative number such as 0.03",
    type(None): "null",
}
"""What types of single values accept."""


class Slot(NamedTuple):
    """One setting: its type, and its default, :data:`REQUIRED` for none."""

    hint: Any
    default: Any = REQUIRED


def fields_of(kind: Any, default: Any = REQUIRED) -> dict[str, Slot]:
    """The settings of a dataclass; with an object of it as ``default``, its values are their defaults."""
    hints = get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if field.init]
    return {
        field.name: Slot(hints[field.name], getattr(default, field.name, _default(field))) for field in fields
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    factory: Any = field.default_factory
    return field.default if factory is REQUIRED else factory()


def arguments_of(kind: type, default: Any = REQUIRED) -> dict[str, Slot]:
    """The constructor arguments of a class; behind ``**kwargs`` stand those of the next class.

    The values of ``default`` are their defaults where it is an object of this very dataclass.
    """
    if dataclasses.is_dataclass(kind):
        return fields_of(kind, default if type(default) is kind else REQUIRED)
    slots: dict[str, Slot] = {}
    for base in kind.__mro__[:-1]:
        if (init := vars(base).get("__init__")) is None:
            continue
        hints = _hints_of(init)
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for one in (one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)):
            value = REQUIRED if one.default is one.empty else one.default
            slots.setdefault(one.name, Slot(hints.get(one.name, Any), value))
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return slots


def _hints_of(init: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(init)
    except NameError:  # a name that its module imports for type checkers only
        return {}


def import_path(kind: type) -> str:
    """The shortest path under which a class can be imported, such as ``softdefend.SGLR``."""
    parts = kind.__module__.split(".")
    for end in range(1, len(parts)):
        package = ".".join(parts[:end])
        if getattr(sys.modules.get(package), kind.__name__, None) is kind:
            return f"{package}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def members_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of anything else itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def fit(value: Any, member: Any) -> Any:
    """A single plain value as its type has it (a whole number as a float), :data:`MISFIT` where it is none of
    that type. Lengths and paths stay text."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = False
    if get_origin(member) is Literal:
        fits = any(type(choice) is type(value) and choice == value for choice in get_args(member))
    elif member is float and number:
        try:
            return float(value)
        except OverflowError:
            return MISFIT
    elif member is Budget and (number or isinstance(value, str)):
        try:
            return str(Budget(value))
        except SettingError:
            return MISFIT
    elif member is int:
        fits = number and isinstance(value, int) and -WHOLE <= value < WHOLE
    elif member is str:
        fits = isinstance(value, str)
    elif member is Path:
        fits = isinstance(value, str) and value != ""
    elif member in (bool, type(None)):
        fits = isinstance(value, member)
    return value if fits else MISFIT
