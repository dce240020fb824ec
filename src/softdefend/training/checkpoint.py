"""Checkpoint files that survive a crash. Damaged ones are detected and refused.

A checkpoint is a header, the SHA-256 of the body, its length, and the body: tensors, numbers, strings,
lists and dicts as ``torch.save`` writes them, read back with ``weights_only=True`` only. The checksum is
verified before a single byte of the body is parsed, and no pickled code is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import torch

from softdefend.core.errors import SettingError
from softdefend.core.files import Writer, check_regular, move, write_atomic
from softdefend.core.torch_files import check_torch_file

_MAGIC = b"softdefend-checkpoint-1\n"
_HEADER = len(_MAGIC) + 32 + 8
_NAME = re.compile(r"step-[0-9]+\.ckpt")


class CheckpointError(SettingError):
    """A checkpoint that cannot be used."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) atomically with its checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()
    header = _MAGIC + hashlib.sha256(body).digest() + len(body).to_bytes(8, "little")
    write_atomic(path, header + body)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint written by :func:`save`.

    Raises:
        CheckpointError: missing, foreign, truncated or altered file, or a body that is more than data.
    """
    body = _read(path)
    try:
        check_torch_file(io.BytesIO(body), str(path))
        state = torch.load(io.BytesIO(body), map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            str(path), "a body that is not plain data", "tensors and plain values"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(str(path), f"a {type(state).__name__}", "a dictionary of training state")
    if _is_named(path) and state.get("step", step_of(path)) != step_of(path):
        given = f"a checkpoint of step {state['step']} under another name"
        raise CheckpointError(str(path), given, f"the checkpoint of step {step_of(path)}")
    return state


def _read(path: Path) -> bytes:
    """The body of a checkpoint; of another file no more than the header is read.

    Raises:
        CheckpointError: it is not there, or not as it was written.
    """
    accepted = "a readable checkpoint file"
    try:
        rest = check_regular(path) - _HEADER
        with open(path, "rb") as file:
            head = file.read(_HEADER)
            if not head.startswith(_MAGIC):
                raise CheckpointError(str(path), "a file of another kind", "a softdefend checkpoint")
            length = int.from_bytes(head[_HEADER - 8 :], "little")
            if len(head) < _HEADER or rest != length:
                given = f"a truncated file ({max(rest, 0)} of {length} bytes)"
                raise CheckpointError(str(path), given, "a whole checkpoint")
            body = file.read(length)
    except OSError as error:
        raise CheckpointError(str(path), str(error.strerror), accepted) from error
    except MemoryError as error:
        raise CheckpointError(str(path), f"{length} bytes, more than fit into memory", accepted) from error
    if hashlib.sha256(body).digest() != head[len(_MAGIC) : len(_MAGIC) + 32]:
        raise CheckpointError(
            str(path), "an altered file (its checksum does not match)", "an intact checkpoint"
        )
    return body


def is_checkpoint(path: Path) -> bool:
    """Whether a regular file says that it is a checkpoint."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def snapshot(value: Any) -> Any:
    """A copy in the host's memory of nested dictionaries and lists of tensors and plain values."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(snapshot, value))
    return value


def step_of(path: Path) -> int:
    """The step that a checkpoint is named after."""
    return int(path.stem.removeprefix("step-"))


def _is_named(path: Path) -> bool:
    """Whether a file is named as a checkpoint is."""
    return _NAME.fullmatch(path.name) is not None


class CheckpointFolder:
    """The newest few checkpoints of one run, named by how many steps had been made.

    Args:
        folder: where they lie.
        keep: how many to keep, >= 2: if the newest is damaged, a good one is left.
        writer: writes them; one of its own when None.
    """

    stride: int | None = None
    """Checkpoints whose step is a multiple of this are never deleted; none are kept so when None."""

    def __init__(self, folder: Path, keep: int = 2, writer: Writer | None = None) -> None:
        self.folder, self.keep, self.writer = folder, keep, writer or Writer()

    def paths(self) -> list[Path]:
        """All checkpoints, the oldest first; those that :meth:`save` was given are on disk then."""
        self.writer.wait()
        return self._paths()

    def _paths(self) -> list[Path]:
        found = self.folder.glob("step-*.ckpt") if os.path.isdir(self.folder) else ()
        return sorted(filter(_is_named, found), key=step_of)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the state after ``step`` updates, then delete the oldest checkpoints.

        The state is copied first, so that training may go on while it is written in the background. The
        earlier checkpoints stay until the new one is complete.

        Raises:
            SettingError: an earlier state could not be written.
        """
        path, copied = self.folder / f"step-{step:09d}.ckpt", snapshot(state)

        def write() -> None:
            save(path, copied)
            for old in self._paths()[: -self.keep]:
                if self.stride is None or step_of(old) % self.stride:
                    old.unlink(missing_ok=True)

        self.writer(write)
        return path

    def abandon(self, step: int) -> None:
        """Move the checkpoints of later steps into ``abandoned/``, as the run goes on from ``step``.

        They must not count as the newest, nor crowd out new ones.
        """
        for path in self.paths():
            if step_of(path) > step:
                move(path, self.folder / "abandoned" / path.name)

    def load(self, chosen: Path | None = None, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The chosen checkpoint, else the newest; None where there is none.

        Raises:
            CheckpointError: it cannot be used; the line names the previous good one, if any.
        """
        paths = self.paths()
        path = chosen or (paths[-1] if paths else None)
        if path is None:
            return None
        try:
            return load(path, device)
        except CheckpointError as damaged:
            error = damaged
            if chosen is not None and not os.path.isfile(chosen):
                given = f"{chosen} ({damaged.given})"
                error = CheckpointError("resume", given, "a checkpoint file of this run")
            for other in reversed([p for p in paths if p != path]):
                try:
                    load(other)
                except CheckpointError:
                    continue
                offer = f"; the previous good one is {other}: continue from it with --resume {other}"
                raise CheckpointError(error.setting, error.given, error.accepted + offer) from damaged
            raise error from damaged


class SilentCheckpoints(CheckpointFolder):
    """The checkpoints for the processes that write nothing: the first one does."""

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Where the checkpoint will be; nothing is written."""
        return self.folder / f"step-{step:09d}.ckpt"
