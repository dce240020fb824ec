"""The one answer to "is this result there already?": files that know what they were made from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save as to_safetensors
from torch import Tensor

from softdefend.core.digest import checksum, value_digest
from softdefend.core.files import parse_json, read_bytes, sweep, write_atomic
from softdefend.core.safetensors_files import open_safetensors

_LARGEST = 2**28
"""Bytes of a JSON file; an audit's has some hundred thousand."""

_OWN = ("inputs", "key", "sha256")
"""What the store adds to a result."""


class ResultStore:
    """Results in one folder: JSON files ``NAME.json`` and files of tensors ``NAME.safetensors``.

    Beside the result a file holds ``inputs``, the plain values that the result is a function of (digests of
    weights, data and code, the threat, settings), their sha256 as ``key``, and the ``sha256`` of the result
    itself. A result counts as present where its key is that of the inputs asked for. A file that cannot be
    read, or that was edited since it was written, counts as absent.

    Args:
        folder: made with the first result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sweep(folder)

    def path(self, name: str, suffix: str = ".json") -> Path:
        """The file of a result."""
        return self.folder / f"{name}{suffix}"

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file, whatever it was made from; None where there is none, or no result."""
        try:
            content = parse_json(read_bytes(self.path(name), _LARGEST))
            wanted = value_digest(dict(content["inputs"])), value_digest(_result(content))
            intact = (content["key"], content["sha256"]) == wanted
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return content if intact else None

    def find(
        self, name: str, inputs: Mapping[str, Any], *, ignoring: Collection[str] = ()
    ) -> dict[str, Any] | None:
        """The content of a JSON file that was made from ``inputs``, else None.

        Args:
            name: of the result.
            inputs: what it has to be made from.
            ignoring: inputs that may differ. The caller judges them from the content.
        """
        content = self.read(name)
        if content is None:
            return None
        known, wanted = (
            {key: value for key, value in values.items() if key not in ignoring}
            for values in (content["inputs"], plain(inputs))
        )
        return content if known == wanted else None

    def write(self, name: str, inputs: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Write a result in place of what stood there, and return the file's content.

        Raises:
            SettingError: the folder cannot be written; what stood there still does.
            ValueError: a number that is not finite; JSON has no word for it.
        """
        known, kept = plain(inputs), _result(plain(result))
        content = {**kept, "inputs": known, "key": value_digest(known), "sha256": value_digest(kept)}
        write_atomic(self.path(name), json.dumps(content, indent=1, allow_nan=False).encode())
        return content

    def compute(
        self, name: str, inputs: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The content made from ``inputs`` before, else that of ``make()``, which is written."""
        found = self.find(name, inputs)
        return self.write(name, inputs, make()) if found is None else found

    def find_tensors(
        self, name: str, inputs: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata of a file that was made from ``inputs``, else None."""
        try:
            with open_safetensors(self.path(name, ".safetensors")) as file:
                metadata = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        except (OSError, SafetensorError):
            return None
        key, sha256 = value_digest(plain(inputs)), checksum(tensors.items())
        return (tensors, metadata) if _has(metadata, key=key, sha256=sha256) else None

    def write_tensors(
        self,
        name: str,
        inputs: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write tensors in place of what stood there; equal tensors and inputs make equal bytes.

        Raises:
            SettingError: the folder cannot be written; what stood there still does.
        """
        known = plain(inputs)
        on_cpu = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
        own = {"inputs": json.dumps(known), "key": value_digest(known), "sha256": checksum(on_cpu.items())}
        content = to_safetensors(on_cpu, metadata={**(metadata or {}), **own})
        write_atomic(self.path(name, ".safetensors"), _ordered(content))

    def set_aside(self, name: str, *companions: Path) -> Path | None:
        """Copy a JSON result to ``earlier/NAME-NUMBER.json`` before another replaces it.

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
            if place.is_file() and place.read_bytes() == content:
                return None
        for path in companions:
            if path.is_file():
                write_atomic(place.with_suffix(path.suffix), path.read_bytes())
        write_atomic(place, content)
        return place


def plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


def _result(content: Mapping[str, Any]) -> dict[str, Any]:
    """A file's content without what the store has added."""
    return {name: value for name, value in content.items() if name not in _OWN}


def _has(metadata: Mapping[str, str], **wanted: str) -> bool:
    return all(metadata.get(name) == value for name, value in wanted.items())


def _ordered(content: bytes) -> bytes:
    """The same safetensors file with the keys of its header in order: the library shuffles the metadata."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight bytes
    return len(header).to_bytes(8, "little") + header + content[8 + length :]
