"""Type hints of settings: which names a class takes, and whether a plain value is of a type."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np

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

_LARGEST_FLOAT = 10**308
_MOST_BITS, _MOST_SHOWN = 200, 100
"""Of a number, and characters of a text, that a message shows."""


class Slot(NamedTuple):
    """One setting: its type, and its default, :data:`REQUIRED` for none."""

    hint: Any
    default: Any = REQUIRED


_type_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)
"""Each text of a hint is compiled when it is read. A failure is not kept: a name may be defined later."""


def fields_of(kind: Any, default: Any = REQUIRED) -> dict[str, Slot]:
    """The settings of a dataclass; with an object of it as ``default``, its values are their defaults."""
    hints = _type_hints(kind)
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
        return _type_hints(init)
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
        fits = number and isinstance(value, int)
    elif member is str:
        fits = isinstance(value, str)
    elif member is Path:
        fits = isinstance(value, str) and value != ""
    elif member in (bool, type(None)):
        fits = isinstance(value, member)
    return value if fits else MISFIT


def check_type(name: str, value: Any, hint: Any, most: int | None = WHOLE - 1) -> Any:
    """A value from Python that has the type of its setting; NumPy's numbers as Python's.

    Args:
        name: of the setting, for the message.
        value: what was given.
        hint: its type. Of types that hold others only lists and tuples are looked into.
        most: the largest whole number; None where the caller says.

    Raises:
        SettingError: another type, a class where an object of it is wanted, or a larger whole number.
    """
    members = members_of(hint)
    for member in members:
        if (held := _held(name, value, member, most)) is not MISFIT:
            return held
    wanted = [member for member in members if member is not type(None)]
    if get_origin(wanted[0]) is Literal:
        raise SettingError(name, repr(value), " or ".join(map(str, get_args(wanted[0]))))
    if isinstance(value, type) and isinstance(wanted[0], type) and issubclass(value, wanted[0]):
        raise SettingError(name, f"the class {value.__name__}", f"an object of it, as {value.__name__}()")
    accepted = " or ".join(dict.fromkeys(_words(member) for member in wanted))
    raise SettingError(name, _shown(value), accepted)


def check_fields(settings: Any, section: str, most: int = WHOLE - 1) -> None:
    """Check the values of a dataclass by :func:`check_type`, before the class compares them with anything.

    Choices among words are left to the class as long as they are words, and so is the range of seeds.

    Args:
        settings: the object, from its ``__post_init__``.
        section: what its settings are called together, such as ``optim``; empty for none.
        most: the largest whole number.

    Raises:
        SettingError: naming the setting.
    """
    kind: Any = type(settings)
    for name, hint in _hints_of_fields(kind).items():
        value = getattr(settings, name)
        if get_origin(hint) is Literal and isinstance(value, str):
            continue
        limit = None if name.endswith("seed") else most
        checked = check_type(f"{section}.{name}".removeprefix("."), value, hint, limit)
        if checked is not value:
            object.__setattr__(settings, name, checked)


def with_checked_arguments(init: Callable[..., None], section: str) -> Callable[..., None]:
    """A constructor that checks the values it is given by :func:`check_type` first.

    Choices among words are left to the class, as in :func:`check_fields`, and a wrong call to Python.

    Args:
        init: the constructor. What has no type hint is not checked.
        section: what its settings are called together, such as ``label``.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: Any, **keywords: Any) -> None:
        try:
            given = signature.bind(*args, **keywords)
        except TypeError:
            return init(*args, **keywords)
        hints = _hints_of(init)
        for name, value in given.arguments.items():
            kind, hint = signature.parameters[name].kind, hints.get(name, Any)
            collects = kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            if not collects and not (get_origin(hint) is Literal and isinstance(value, str)):
                given.arguments[name] = check_type(f"{section}.{name}", value, hint)
        return init(*given.args, **given.kwargs)

    return checked


@functools.cache
def _hints_of_fields(kind: Any) -> dict[str, Any]:
    try:
        hints = get_type_hints(kind)
    except NameError:  # a name that its module imports for type checkers only
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # thousands of digits cannot be printed
        return f"a number of {value.bit_length()} bits"
    if not isinstance(value, (str, int, float, type(None))):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."


def _words(member: Any) -> str:
    if get_origin(member) in SEQUENCES:
        return "a list, such as [a, b]"
    if get_origin(member) is Literal:
        return " or ".join(map(str, get_args(member)))
    return WORDS.get(member) or f"an object of {getattr(member, '__name__', member)}"


def _held(name: str, value: Any, member: Any, most: int | None) -> Any:
    """The value as a member of a union has it, :data:`MISFIT` for one of another type."""
    origin = get_origin(member)
    if origin is Literal:
        return value if any(type(c) is type(value) and c == value for c in get_args(member)) else MISFIT
    if origin in SEQUENCES:
        return _held_list(name, value, get_args(member)[0], most)
    if member in (int, float, Budget):
        return _held_number(name, value, member, most)
    if member is bool:
        return bool(value) if isinstance(value, (bool, np.bool_)) else MISFIT
    if member is Path:
        return value if isinstance(value, (str, Path)) else MISFIT
    return value if member is Any or not isinstance(member, type) or isinstance(value, member) else MISFIT


def _held_list(name: str, value: Any, inner: Any, most: int | None) -> Any:
    if not isinstance(value, SEQUENCES):
        return MISFIT
    items = [check_type(name, item, inner, most) for item in value]
    same = all(item is given for item, given in zip(items, value, strict=True))
    return value if same else type(value)(items)


def _held_number(name: str, value: Any, member: Any, most: int | None) -> Any:
    if isinstance(value, (bool, np.bool_)):
        return MISFIT
    if isinstance(value, (Budget, str)):
        return value if member is Budget or (member is float and isinstance(value, Budget)) else MISFIT
    if isinstance(value, (int, np.integer)):
        value = int(value)
        if member is int:
            return _bounded(name, value, most)
        if abs(value) < WHOLE:
            return value
        return float(value) if abs(value) < _LARGEST_FLOAT else MISFIT
    if member is int or not isinstance(value, (float, np.floating)):
        return MISFIT
    return value if type(value) is float else float(value)


def _bounded(name: str, value: int, most: int | None) -> int:
    if value.bit_length() > _MOST_BITS:
        raise SettingError(name, _shown(value), "a whole number of 64 bits at most")
    if most is None or -most - 1 <= value <= most:
        return value
    accepted = "a whole number from -2^63 to 2^63 - 1" if most == WHOLE - 1 else f"at most {most:,}"
    raise SettingError(name, value, accepted)
