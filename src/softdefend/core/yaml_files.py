"""Configuration files: YAML mappings in which every setting stands once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from softdefend.core.errors import SettingError


class _Once(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                place = f"{self.name}, line {key.start_mark.line + 1}"
                raise SettingError(place, f"{key.value!r} a second time", "each setting once")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        SettingError: missing, unreadable, a setting given twice, or something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Once)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(str(path), f"unreadable YAML ({error})", "a readable YAML file") from error
    if not isinstance(content, dict):
        raise SettingError(str(path), f"a {type(content).__name__}", "a YAML mapping")
    return content


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
