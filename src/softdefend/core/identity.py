"""Which run a file belongs to. Weights and checkpoints carry digests of their run's settings and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from softdefend.core.digest import value_digest
from softdefend.core.errors import SettingError
from softdefend.core.weight_files import metadata_of
from softdefend.core.yaml_files import flatten, read_yaml

FREE = ("save", "evaluate", "data.cache", "data.workers", "runtime.devices")
"""Settings that may change between a run and its continuation: they change no result of training but by
rounding."""
PATHS = ("data.source", "data.extra", "data.noise_file", "init_from")
"""Settings that may be spelt differently if they lead to the same file or folder. What is there has a digest
of its own."""


class RunIdentity(NamedTuple):
    """What tells one run's files from another's.

    Attributes:
        settings: :func:`settings_digest` of the configuration.
        data: sha256 (hex) of the training and validation data.
    """

    settings: str
    data: str


def settings_digest(config: Mapping[str, Any]) -> str:
    """sha256 (hex) of a run's configuration, but for :data:`FREE` and :data:`PATHS`. What is null counts as
    absent, as it does where settings are compared."""
    # A file that somebody else wrote may hold what JSON has not.
    flat = json.loads(json.dumps(flatten(config), default=str, skipkeys=True))
    kept = {key: value for key, value in flat.items() if key not in PATHS and not is_free(key)}
    return value_digest({key: _number(value) for key, value in kept.items() if value is not None})


def is_free(key: str) -> bool:
    """Whether a setting, by its dotted path, is one of :data:`FREE`."""
    return bool({key, key.split(".")[0]} & {*FREE})


def check_weights(path: Path, metadata: Mapping[str, Any], which: str, run: RunIdentity) -> None:
    """Check that a file of weights is the one that a run wrote under its name.

    Args:
        path: of the file, for messages.
        metadata: of the file.
        which: ``best`` or ``last``.
        run: the run.

    Raises:
        SettingError: weights of another run, of this run's other checkpoint, or from elsewhere.
    """
    _check_settings(path, metadata, run.settings)
    trained = str(metadata["run"].get("data"))
    if trained != run.data:
        given = f"training data {run.data[:12]}, where {path} was trained on {trained[:12]}"
        raise SettingError("data", given, "the data that the run was trained with")
    if metadata.get("checkpoint") != which:
        given = f"the weights {metadata.get('checkpoint')!r} of this run"
        raise SettingError(str(path), given, f"its weights {which!r}")


def check_place(path: Path) -> None:
    """Check that a run's safetensors weights belong to the run in whose folder they lie, if they lie in one.

    Raises:
        SettingError: no such file, a damaged one, or weights of another run.
    """
    config, metadata = path.parent / "config.yaml", metadata_of(path)
    if "run" in metadata and config.is_file():
        _check_settings(path, metadata, settings_digest(read_yaml(config)))


def _check_settings(path: Path, metadata: Mapping[str, Any], settings: str) -> None:
    run = metadata.get("run")
    if not isinstance(run, Mapping) or run.get("settings") != settings:
        given = f"weights of {'another' if run else 'no'} run"
        raise SettingError(str(path), given, f"the file that the run in {path.parent} wrote")


def _number(value: Any) -> Any:
    """A value in which 1 and 1.0 are the same, as they are for a setting."""
    if isinstance(value, list):
        return [_number(one) for one in value]
    if isinstance(value, Mapping):
        return {key: _number(one) for key, one in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
