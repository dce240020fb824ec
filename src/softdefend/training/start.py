"""Where a run starts: at fresh weights, at other weights, at the state of another run, or at its own."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError
from softdefend.core.files import check_regular
from softdefend.core.identity import check_place, settings_digest
from softdefend.core.weight_files import load_weights_file
from softdefend.core.yaml_files import read_yaml
from softdefend.training import checkpoint
from softdefend.training.checkpoint import CheckpointError, CheckpointFolder
from softdefend.training.config import TrainConfig

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainConfig)

_ACCEPTED = "a run folder (its best weights), a file of weights, or a checkpoint"


def record_start(config: Config, folder: Path) -> Config:
    """The configuration with the digest of the file that the run starts from, so that its folder says which
    one that was. A run that has checkpoints keeps the digest that it began with: it needs the file no more.

    Raises:
        SettingError: no such file, another one than the digest in the configuration names, or a checkpoint
            that has no epoch left to train.
    """
    if config.init_from is None:
        if config.init_sha256 is not None:
            raise SettingError("init_sha256", "a digest without init_from", "both, or null")
        return config
    if has_checkpoints(folder):
        began = read_yaml(folder / "config.yaml").get("init_sha256")
        return replace(config, init_sha256=config.init_sha256 or began)
    path = _find(config.init_from)
    config = replace(config, init_sha256=_digest(path, config.init_sha256))
    if checkpoint.is_checkpoint(path):
        _read_state(path, config)  # before data are read
    return config


def has_checkpoints(folder: Path) -> bool:
    """Whether there is a run in a folder that can be continued."""
    return bool(CheckpointFolder(folder / "checkpoints").paths())


def load_start(net: nn.Module, config: TrainConfig) -> dict[str, Any] | None:
    """Put the weights that a run starts from into its network.

    Args:
        net: as it was made; unchanged where the configuration has no ``init_from``.
        config: see :func:`record_start`.

    Returns:
        The state of the checkpoint, on the network's device, where the run starts from one.

    Raises:
        SettingError: a file that is not there any more, or cannot be used for this run.
    """
    if config.init_from is None:
        return None
    path = _find(config.init_from)
    _digest(path, config.init_sha256)
    if not checkpoint.is_checkpoint(path):
        if path.suffix == ".safetensors":
            check_place(path)
        notes = load_weights_file(net, path)
        log.info("; ".join([f"starts from the weights in {path}", *notes]))
        return None
    state = _read_state(path, config, next((p.device for p in net.parameters()), "cpu"))
    load_weights_file(net, path, state["net"])
    return state


def check_resume(chosen: Path, folder: Path) -> None:
    """Check, before anything is read or written, that a checkpoint is one of the run in a folder.

    Raises:
        CheckpointError: it cannot be used, or is of another run.
    """
    state = CheckpointFolder(folder / "checkpoints").load(chosen)
    assert state is not None
    accepted = f"a checkpoint of the run in the folder; --init_from {chosen} starts a new run from it"
    config = folder / "config.yaml"
    if not os.path.isfile(config):
        raise CheckpointError("resume", f"{chosen}, and no run in {folder}", accepted)
    if state.get("settings") != settings_digest(read_yaml(config)):
        raise CheckpointError("resume", f"{chosen}, of another run than that in {folder}", accepted)


def _read_state(path: Path, config: TrainConfig, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in a checkpoint.

    Raises:
        SettingError: a damaged or foreign one, or one that leaves no epoch to train.
    """
    state = checkpoint.load(path, device)
    if not (isinstance(state.get("net"), dict) and isinstance(state.get("epoch"), int)):
        raise SettingError("init_from", f"{path}, which holds no run's state", _ACCEPTED)
    if state["epoch"] >= config.optim.epochs:
        accepted = f"more than the {state['epoch']} that {path} has behind it; weights start at epoch 1"
        raise SettingError("optim.epochs", config.optim.epochs, accepted)
    return state


def _find(given: str) -> Path:
    """The file that is meant.

    Raises:
        SettingError: there is none, or weights of another run than that in whose folder they lie.
    """
    path = Path(given).expanduser()
    if os.path.isdir(path):
        path = path / "best.safetensors"
    try:
        check_regular(path)
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise SettingError("init_from", f"{path} ({error.strerror})", _ACCEPTED) from error
    return path


def _digest(path: Path, wanted: str | None) -> str:
    """sha256 (hex) of the file.

    Raises:
        SettingError: it cannot be read, or is another one than is wanted.
    """
    try:
        found = file_digest(path)
    except OSError as error:
        raise SettingError("init_from", f"{path} ({error.strerror})", _ACCEPTED) from error
    if wanted not in (None, found):
        raise SettingError("init_from", f"{path} of sha256 {found}", f"the file of sha256 {wanted}")
    return found
