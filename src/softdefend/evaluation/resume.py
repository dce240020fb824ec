"""What a killed evaluation finds again: one file that is replaced as it goes on and removed at the end."""

from __future__ import annotations

import glob
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save as to_safetensors
from torch import Tensor

from softdefend.core.files import write_atomic
from softdefend.core.safetensors_files import open_safetensors

_KEY = "softdefend-evaluation-4"
Saved = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and plain values."""


class StateFile:
    """The unfinished part of one evaluation, safetensors with the plain values as JSON in its metadata.

    Args:
        path: of the file.
        identity: plain values that say which evaluation this is: settings, weights, data, versions. What an
            evaluation of another identity left behind is not continued.
        every: least seconds between two writes, so that a write costs little beside the work it saves.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], every: float = 30.0) -> None:
        self.path, self.identity, self.every = path, json.loads(json.dumps(dict(identity))), every
        self._written = time.monotonic()

    def load(self) -> Saved | None:
        """What was saved last, on the CPU; None where there is nothing, or something damaged or foreign."""
        try:
            with open_safetensors(self.path) as file:
                content = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return (tensors, content["state"]) if content["identity"] == self.identity else None

    def load_all(self) -> list[Saved | None]:
        """What each process saved last that took part when this, the first, did; empty where there is
        nothing. None for one that has saved nothing since."""
        own = self.load()
        if own is None:
            return []
        others = (self.of_process(rank).load() for rank in range(1, own[1]["processes"]))
        session = own[1]["session"]
        return [own, *(it if it is not None and it[1]["session"] == session else None for it in others)]

    def of_process(self, rank: int) -> StateFile:
        """The file of another process of the same evaluation."""
        # No name of a result ends so: a number alone would make best-l2-1.5 of best-l2-1.
        path = self.path.with_suffix(f".process{rank}{self.path.suffix}") if rank else self.path
        return StateFile(path, self.identity, self.every)

    def save(self, state: Callable[[], Saved]) -> None:
        """Write what ``state()`` returns, unless the last write was a moment ago.

        Raises:
            SettingError: the disk is full or the folder is not writable.
        """
        if time.monotonic() - self._written < self.every:
            return
        tensors, values = state()
        # Copies: safetensors refuses tensors that share memory.
        apart = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        metadata = {_KEY: json.dumps({"identity": self.identity, "state": values})}
        write_atomic(self.path, to_safetensors(apart, metadata=metadata))
        self._written = time.monotonic()

    def remove(self) -> None:
        """The evaluation is finished."""
        others = f"{glob.escape(self.path.stem)}.process*{self.path.suffix}"
        for path in (self.path, *self.path.parent.glob(others)):
            path.unlink(missing_ok=True)
