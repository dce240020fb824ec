"""The one answer to "is this result there already?": JSON files that know what they were made from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from softdefend.core.digest import value_digest
from softdefend.core.files import write_atomic


class ResultStore:
    """Results in one folder, each a JSON file ``NAME.json``.

    Beside the result a file holds ``inputs``, the plain values that the result is a function of (digests of
    weights, data and code, the threat, settings), and ``key``, their sha256. A result counts as present where
    the key is the same. Files that cannot be read, or whose key is not that of their inputs, count as absent.

    Args:
        folder: made with the first result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """The file of a result."""
        return self.folder / f"{name}.json"

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of a file, whatever it was made from; None where there is none, or no result."""
        try:
            content = json.loads(self.path(name).read_text(encoding="utf-8"))
            intact = content["key"] == value_digest(content["inputs"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return content if intact else None

    def find(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The content of a file that was made from ``inputs``, else None."""
        content = self.read(name)
        return content if content is not None and content["key"] == value_digest(plain(inputs)) else None

    def write(self, name: str, inputs: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Write a result in place of what stood there, and return the file's content.

        Raises:
            SettingError: the folder cannot be written; what stood there still does.
            ValueError: a number that is not finite; JSON has no word for it.
        """
        known = plain(inputs)
        content = {**plain(result), "inputs": known, "key": value_digest(known)}
        write_atomic(self.path(name), json.dumps(content, indent=1, allow_nan=False).encode())
        return content

    def compute(
        self, name: str, inputs: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The content made from ``inputs`` before, else that of ``make()``, which is written."""
        found = self.find(name, inputs)
        return self.write(name, inputs, make()) if found is None else found

    def set_aside(self, name: str, *companions: Path) -> Path | None:
        """Copy a result that another will replace to ``earlier/NAME-NUMBER.json``: it may be hours of work.

        Args:
            name: of the result.
            companions: files that belong to it, copied beside it under the same name and their own suffix.

        Returns:
            The copy; None where there is no result, or the same one is kept there already.
        """
        if self.read(name) is None:
            return None
        content, earlier = self.path(name).read_bytes(), self.folder / "earlier"
        for number in itertools.count(1):
            place = earlier / f"{name}-{number}.json"
            if not place.exists():
                break
            if place.read_bytes() == content:
                return None
        for path in companions:
            if path.is_file():
                write_atomic(place.with_suffix(path.suffix), path.read_bytes())
        write_atomic(place, content)
        return place


def plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))
