"""A run's settings as the plain values that its folder records."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from softdefend.attacks import Attack
from softdefend.core.errors import SettingError
from softdefend.core.hints import arguments_of, import_path
from softdefend.core.rule import Rule
from softdefend.core.threat import Budget
from softdefend.training.config import RULES, TrainConfig, flat, flat_hints


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """All settings by flat name, as ``config.yaml`` holds them; the configuration parser takes them back.

    Raises:
        SettingError: see :func:`plain`.
    """
    return {name: plain(value) for name, value in flat(config).items()}


def plain(value: Any) -> Any:
    """A setting as plain values: text, numbers, truth values, null, lists and mappings.

    Rules and attacks are written as ``class_path`` and ``init_args``, because a class of somebody else may
    stand there. Of a rule that are its constructor arguments: a rule that has been set up holds more. Left
    out of them are objects that no file can hold, such as networks: a rule that takes one tells it from
    others on a resume, as KD does with the checksums in its ``state_dict``.

    Raises:
        SettingError: a rule with a constructor argument that it does not keep under its own name.
    """
    if isinstance(value, (Budget, Path)):
        return str(value)
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Rule):
        held = {name: _argument(value, name) for name in arguments_of(type(value))}
        arguments = {name: plain(item) for name, item in held.items() if _recordable(item)}
        return {"class_path": import_path(type(value)), "init_args": arguments}
    if is_dataclass(value) and not isinstance(value, type):
        content = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        if not isinstance(value, Attack):
            return content
        return {"class_path": import_path(type(value)), "init_args": content}
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _recordable(value: Any) -> bool:
    """Whether :func:`plain` says all that there is to say of a rule's argument: not of a network."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_recordable, value))
    if isinstance(value, dict):
        return all(map(_recordable, value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return all(_recordable(getattr(value, field.name)) for field in fields(value))
    return value is None or isinstance(value, (str, int, float, bool, Rule, Budget, Path, Tensor))


def _argument(rule: Rule, name: str) -> Any:
    """A constructor argument as the rule keeps it: an attribute of its own or a property.

    Raises:
        SettingError: there is none.
    """
    if name in vars(rule):
        return vars(rule)[name]
    if inspect.isdatadescriptor(inspect.getattr_static(type(rule), name, None)):
        return getattr(rule, name)
    setting = next((key for key in RULES if isinstance(rule, flat_hints()[key])), "rule")
    given = f"an argument that {type(rule).__name__} does not keep"
    accepted = f"one kept under its own name, as by self.{name} = {name} in __init__"
    raise SettingError(f"{setting}.{name}", given, accepted)
