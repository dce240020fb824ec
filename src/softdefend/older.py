"""What run folders of older versions do not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADDED: Mapping[str, Any] = {"net.init": "own", "optim.schedule.warmup": 0.0}
"""Settings that runs of older versions do not name, by dotted path, and what these did."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
