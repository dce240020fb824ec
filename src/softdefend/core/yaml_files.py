"""YAML in which every setting stands once: files, and single values of a command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from softdefend.core.errors import SettingError
from softdefend.core.files import read_bytes

_LARGEST = 2**18
"""Bytes of a file of settings, which has a few thousand; PyYAML reads 100 kB in a second."""
_MOST_VALUES = 10_000
_MOST_MERGED = 100
_NULLS = ("null", "Null", "NULL", "~")


class _Loader(yaml.SafeLoader):
    """Dates stay text; refuses a key that stands twice in one mapping, of which YAML would silently take the
    last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = "" if isinstance(self, _WordLoader) else f", line {key.start_mark.line + 1}"
                raise _given_twice(f"{self.name}{line}", key.value)
            seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            if key.tag.endswith(":merge") and len(value.value) > _MOST_MERGED:
                raise yaml.constructor.ConstructorError(
                    None, None, "too many merged mappings", key.start_mark
                )
        super().flatten_mapping(node)
        if len(node.value) > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "too many merged values", node.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _WordLoader(_Loader):
    """``1e-4`` is a number. In files it stays text, as which PyYAML writes it, until a setting reads it."""


_WordLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$|[-+]?\.[0-9][0-9_]*$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        SettingError: missing, unreadable, no regular file or a large one, a setting given twice, or something
            else.
    """
    try:
        content = _load(read_bytes(path, _LARGEST).decode(), _Loader, str(path))
    except SettingError:
        raise
    # A number of thousands of digits is a ValueError, and so are bytes that are no text.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SettingError(str(path), f"unreadable YAML ({error})", "a readable YAML file") from error
    if not isinstance(content, dict):
        raise SettingError(str(path), f"a {type(content).__name__}", "a YAML mapping")
    return content


def parse_value(text: str, name: str = "settings") -> Any:
    """What a text would be in a YAML file; the text itself where it would be nothing or broken.

    Args:
        text: to read.
        name: of the setting that it is for, for messages.

    Raises:
        SettingError: a setting given twice.
    """
    try:
        value = _load(text, _WordLoader, name)
    except SettingError:
        raise
    except (ValueError, RecursionError, yaml.YAMLError):
        return text
    return text if value is None and text.strip() not in _NULLS else value


def _load(text: str, loader: type[_Loader], name: str) -> Any:
    """The value of a YAML text in which every setting stands once, and no value so often that it is too much.

    Raises:
        SettingError: a setting given twice.
        ValueError, RecursionError, yaml.YAMLError: anything else.
    """
    reader = loader(text)
    reader.name = name
    try:
        value = reader.get_single_data()
    finally:
        reader.dispose()
    if _count(value, {}) > _MOST_VALUES:
        raise ValueError("values repeated beyond all bounds")
    if isinstance(value, dict):
        seen = set[str]()
        for path in _paths(value):
            if path in seen:
                raise _given_twice(name, path)
            seen.add(path)
    return value


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values stand in a value; what an alias repeats counts each time, and is looked at once."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if (count := known.setdefault(id(value), 0)) < 0:
        raise ValueError("a value that holds itself")
    if not count:
        known[id(value)] = -1
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(one, known) for one in inner)
    return known[id(value)]


def _paths(tree: Mapping[Any, Any]) -> Iterator[str]:
    """The settings in a mapping by dotted path, ``{a: {b: 1}, a.b: 2}`` twice the same."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{rest}" for rest in _paths(value))
        else:
            yield str(key)


def _given_twice(where: str, key: str) -> SettingError:
    return SettingError(where, f"{key!r} a second time", "each setting once")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
