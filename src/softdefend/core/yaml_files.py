"""YAML in which every setting stands once: files, and single values of a command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from softdefend.core.errors import SettingError

_NULLS = ("null", "Null", "NULL", "~")


class _Loader(yaml.SafeLoader):
    """Dates stay text; refuses a key that stands twice in one mapping, of which YAML would silently take the
    last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = f"{self.name}, line {key.start_mark.line + 1}"
                raise SettingError(line, f"{key.value!r} a second time", "each setting once")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


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
        SettingError: missing, unreadable, a setting given twice, or something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except SettingError:
        raise
    # A number of thousands of digits is a ValueError, and so are bytes that are no text.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SettingError(str(path), f"unreadable YAML ({error})", "a readable YAML file") from error
    if not isinstance(content, dict):
        raise SettingError(str(path), f"a {type(content).__name__}", "a YAML mapping")
    return content


def parse_value(text: str) -> Any:
    """What a text would be in a YAML file; the text itself where it would be nothing or broken."""
    try:
        value = yaml.load(text, _WordLoader)
    except SettingError:
        raise
    except (ValueError, RecursionError, yaml.YAMLError):
        return text
    return text if value is None and text.strip() not in _NULLS else value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
