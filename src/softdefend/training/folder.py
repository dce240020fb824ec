"""The run folder: everything that a run is, in one place."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
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
from softdefend.core.files import Writer, check_regular, move, parse_json, sweep, write_atomic
from softdefend.core.identity import PATHS, RunIdentity, check_weights, is_free
from softdefend.core.weight_files import read_metadata, read_safetensors, to_bytes
from softdefend.core.yaml_files import flatten, read_yaml
from softdefend.training.checkpoint import CheckpointFolder, SilentCheckpoints, snapshot

log = logging.getLogger(__name__)

WEIGHTS = ("best", "last")
"""The files of weights, without their suffix."""
_PLAIN = (".lock", "config.yaml", "environment.json", "metrics.jsonl", "timing.jsonl")
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
            for name in _PLAIN:
                if (self.path / name).exists():
                    check_regular(self.path / name)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held for the life of the run)
        except OSError as error:
            place = error.filename or self.path
            raise SettingError(
                "folder", f"{place} ({error.strerror})", "a folder that can be written"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise SettingError(
                "folder", f"{self.path}, in use by another process", "a folder of its own"
            ) from error
        for place in (self.path, self.checkpoints.folder):
            sweep(place)
        with contextlib.suppress(OSError):  # an epoch that is still to come says what is wrong
            _whole_lines(self.path / "timing.jsonl")

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
        content = yaml.safe_dump(dict(config), sort_keys=False).encode()
        # A start that got nowhere leaves its settings behind; they need not be kept.
        if path.exists() and self._has_results() and not _holds(path, content):
            self._compare(read_yaml(path), config)
        write_atomic(path, content)

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
            and not is_free(key)
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
            present = isinstance(parse_json(path.read_bytes()), dict)
        except (OSError, ValueError):
            present = False  # no file, or a damaged one that no report could read
        if not present:
            write_atomic(path, json.dumps({**environment(device), "seed": seed}, indent=1).encode())

    def append(self, name: str, row: Mapping[str, Any]) -> str:
        """Add one line to a JSON Lines file and return it.

        Raises:
            SettingError: the disk is full or the folder no longer writable.
        """
        path, before, line = self.path / name, None, _line(row)
        try:
            _whole_lines(path)
            with open(path, "ab") as file:
                before = file.tell()
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
                return line
        except OSError as error:
            if before is not None:
                with contextlib.suppress(OSError):
                    os.truncate(path, before)  # half a line would spoil the next one
            raise SettingError(
                str(path),
                error.strerror or error,
                "a writable place with enough free space; the last checkpoint stands",
            ) from error

    def restore(self, name: str, content: str) -> None:
        """Make a file what a checkpoint knows of it. Lines that were written later are taken back, those that
        have been lost are written again.

        Raises:
            SettingError: a line was altered.
        """
        path, known = self.path / name, content.encode()
        present = path.read_bytes() if path.exists() else b""
        if present.startswith(known):
            if len(present) > len(known):
                os.truncate(path, len(known))
            return
        # After a power cut some file systems have zeros where the end was.
        if not known.startswith(present.rstrip(b"\0")):
            pairs = enumerate(zip(present.split(b"\n"), known.split(b"\n"), strict=False), start=1)
            line = next(number for number, (one, other) in pairs if one != other)
            accepted = "the row as training wrote it; where there is no such file all rows are written again"
            raise SettingError(f"{path} line {line}", "a row that was altered", accepted)
        log.warning(f"{path} had lost its end; it is written again from the checkpoint")
        write_atomic(path, known)

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

    def check_weights(self, run: RunIdentity) -> None:
        """Check that weights in the folder are this run's. Damaged ones are left to :meth:`recall`.

        Raises:
            SettingError: some are not; training would overwrite them.
        """
        for name in WEIGHTS:
            for path in (self.path / f"{name}.safetensors", self._pending(name)):
                if (metadata := _metadata(path)) is not None:
                    check_weights(path, metadata, name, run)

    def recall(self, name: str, epoch: int | None) -> bool:
        """Bring pending weights in order after a kill: settle those of ``epoch``, remove others.

        Returns:
            Whether the file is now of that epoch, and whole.
        """
        pending, path = self._pending(name), self.path / f"{name}.safetensors"
        if pending.is_file():
            if _epoch_of(pending) == epoch:
                move(pending, path)
            else:
                pending.unlink()
        return _epoch_of(path) == epoch

    def _pending(self, name: str) -> Path:
        return self.path / f".{name}.pending.safetensors"


class SilentFolder(RunFolder):
    """The run folder for the processes that write nothing: the first one does.

    What is read of it, the first process reads and tells the others.
    """

    def __init__(self, path: Path | str, keep: int = 2, *, background: bool = False) -> None:
        self.path, self.writer = Path(path), Writer()
        self.checkpoints = SilentCheckpoints(self.path / "checkpoints", keep, self.writer)

    def close(self) -> None:
        """Nothing is held."""

    def write_config(self, config: Mapping[str, Any]) -> None:
        """See :meth:`RunFolder.write_config`; nothing is written."""

    def write_environment(self, device: torch.device, seed: int) -> None:
        """See :meth:`RunFolder.write_environment`; nothing is written."""

    def append(self, name: str, row: Mapping[str, Any]) -> str:
        """The line; nothing is written."""
        return _line(row)

    def save_model(
        self, name: str, net: nn.Module, metadata: Mapping[str, Any], *, pending: bool = False
    ) -> None:
        """See :meth:`RunFolder.save_model`; nothing is written."""

    def settle(self, name: str) -> None:
        """See :meth:`RunFolder.settle`; nothing is moved."""


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _holds(path: Path, content: bytes) -> bool:
    return path.stat().st_size == len(content) and path.read_bytes() == content


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


def _metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of a file of weights; None where there is none, or a damaged one."""
    try:
        return read_metadata(path) if path.is_file() else None
    except (OSError, SafetensorError, ValueError):
        return None


def _epoch_of(path: Path) -> int | None:
    """The epoch that a whole file of weights was saved at."""
    try:
        return int(read_safetensors(path, "")[1]["epoch"]) if path.is_file() else None
    except (SettingError, KeyError, TypeError, ValueError):
        return None
