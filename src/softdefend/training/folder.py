"""The run folder: everything that a run is, in one place."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import nn

from softdefend.core.environment import environment
from softdefend.core.errors import SettingError
from softdefend.core.files import Writer, move, write_atomic
from softdefend.core.weight_files import read_metadata, to_bytes
from softdefend.core.yaml_files import flatten, read_yaml
from softdefend.training.checkpoint import CheckpointFolder, snapshot

RESUMABLE = ("save", "evaluate", "data.cache")
"""Settings that may change between a run and its continuation: they change no result of training."""
PATHS = ("data.source", "data.noise_file")
"""Settings that may be spelt differently if they lead to the same file or folder."""
_SHOWN = 4
"""Changed settings that one message names."""


class RunFolder:
    """Files of one run: ``config.yaml``, ``environment.json``, ``metrics.jsonl``, ``timing.jsonl``,
    ``checkpoints/``, ``best.safetensors``, ``last.safetensors``, ``evaluation/`` and ``report.html``.

    Args:
        path: created where absent.
        keep: checkpoints to keep.
        background: write weights and checkpoints in the background.

    Raises:
        SettingError: the folder cannot be written, or another process trains in it.
    """

    def __init__(self, path: Path | str, keep: int = 2, *, background: bool = False) -> None:
        self.path = Path(path)
        self.writer = Writer(background=background)
        self.checkpoints = CheckpointFolder(self.path / "checkpoints", keep, self.writer)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held for the life of the run)
        except OSError as error:
            raise SettingError(
                "folder", f"{self.path} ({error.strerror})", "a folder that can be written"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise SettingError(
                "folder", f"{self.path}, in use by another process", "a folder of its own"
            ) from error

    def close(self) -> None:
        """Let other processes in."""
        self._lock.close()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration, or compare it with the one that this run began with.

        Raises:
            SettingError: the folder holds a run with other settings; the line names them.
        """
        path = self.path / "config.yaml"
        if not path.exists() and self.checkpoints.paths():
            raise SettingError(
                str(path),
                "no such file beside checkpoints",
                "the settings that the run began with, or another --folder",
            )
        # A start that got nowhere leaves its settings behind; they need not be kept.
        if path.exists() and self._has_results():
            self._compare(read_yaml(path), config)
        write_atomic(path, yaml.safe_dump(dict(config), sort_keys=False).encode())

    def _compare(self, began: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Compare settings with those that a run began with.

        Raises:
            SettingError: some have changed that must not.
        """
        before, now = flatten(began), flatten(json.loads(json.dumps(config)))
        changed = sorted(
            key
            for key in before.keys() | now.keys()
            if before.get(key) != now.get(key)
            and not {key, key.split(".")[0]} & {*RESUMABLE}
            and not (key in PATHS and _same_file(before.get(key), now.get(key)))
        )
        if changed:
            shown, rest = changed[:_SHOWN], changed[_SHOWN:]
            values = [", ".join(repr(tree.get(key)) for key in shown) for tree in (now, before)]
            raise SettingError(
                ", ".join(shown) + (f" and {len(rest)} more" if rest else ""),
                f"{values[0]} where the run in {self.path} began with {values[1]}",
                "the settings it began with, or another --folder",
            )

    def _has_results(self) -> bool:
        """Whether the folder holds anything of a run or of an evaluation."""
        metrics = self.path / "metrics.jsonl"
        rows = metrics.is_file() and metrics.stat().st_size > 0
        weights = bool(self.checkpoints.paths()) or any(self.path.glob("*.safetensors"))
        return rows or weights or (self.path / "evaluation").exists()

    def write_environment(self, device: torch.device, seed: int) -> None:
        """Write versions, machine and commit, unless they are there already."""
        path = self.path / "environment.json"
        try:
            present = isinstance(json.loads(path.read_bytes()), dict)
        except (OSError, ValueError):
            present = False  # no file, or a damaged one that no report could read
        if not present:
            write_atomic(path, json.dumps({**environment(device), "seed": seed}, indent=1).encode())

    def append(self, name: str, row: Mapping[str, Any]) -> int:
        """Add one line to a JSON Lines file and return the file's size in bytes.

        Raises:
            SettingError: the disk is full or the folder no longer writable.
        """
        path, before = self.path / name, None
        try:
            _whole_lines(path)
            with open(path, "ab") as file:
                before = file.tell()
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
        except OSError as error:
            if before is not None:
                with contextlib.suppress(OSError):
                    os.truncate(path, before)  # half a line would spoil the next one
            raise SettingError(
                str(path),
                error.strerror or error,
                "a writable place with enough free space; the last checkpoint stands",
            ) from error

    def truncate(self, name: str, size: int) -> None:
        """Take back lines written after a checkpoint that knew ``size`` bytes.

        Raises:
            SettingError: the file is shorter than the checkpoint remembers.
        """
        path = self.path / name
        present = path.stat().st_size if path.exists() else 0
        if present < size:
            raise SettingError(
                str(path), f"{present} bytes", f"the file this run wrote, of {size} bytes or more"
            )
        if present > size:
            os.truncate(path, size)

    def save_model(
        self, name: str, net: nn.Module, metadata: Mapping[str, Any], *, pending: bool = False
    ) -> None:
        """Write weights as safetensors, with ``metadata``. A file that already holds them keeps its date, so
        that evaluations of it stay valid.

        Args:
            name: of the file, without its suffix.
            net: what has the weights.
            metadata: plain values.
            pending: write them to another file, until :meth:`settle` renames it. That is to happen once a
                checkpoint knows of them: a kill would otherwise leave an older checkpoint with newer weights.
        """
        tensors, path = snapshot(dict(net.state_dict())), self.path / f"{name}.safetensors"

        def write() -> None:
            content = to_bytes(tensors, metadata)
            if not (path.is_file() and path.read_bytes() == content):
                write_atomic(self._pending(name) if pending else path, content)

        self.writer(write)

    def settle(self, name: str) -> None:
        """Give pending weights their final name, after all that is still to be written."""

        def replace() -> None:
            if self._pending(name).is_file():
                move(self._pending(name), self.path / f"{name}.safetensors")

        self.writer(replace)

    def recall(self, name: str, epoch: int | None) -> bool:
        """Bring pending weights in order after a kill: settle those of ``epoch``, remove others.

        Returns:
            Whether the file is now of that epoch.
        """
        pending, path = self._pending(name), self.path / f"{name}.safetensors"
        if pending.is_file():
            if _epoch_of(pending) == epoch:
                move(pending, path)
            else:
                pending.unlink()
        return (_epoch_of(path) if path.is_file() else None) == epoch

    def _pending(self, name: str) -> Path:
        return self.path / f".{name}.pending.safetensors"


def _same_file(one: object, other: object) -> bool:
    """Whether both are paths to one existing file or folder."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    one, other = os.path.expanduser(one), os.path.expanduser(other)
    return os.path.exists(one) and os.path.realpath(one) == os.path.realpath(other)


def _whole_lines(path: Path) -> None:
    """Remove an incomplete last line, left by a failing disk or a power cut: it would spoil the next one."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        whole = file.read() == b"\n"
    if not whole:
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _epoch_of(path: Path) -> int | None:
    """The epoch that a file of weights was saved at."""
    try:
        return int(read_metadata(path)["epoch"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
