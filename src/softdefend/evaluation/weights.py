"""Files of weights: safetensors that carry a checksum of what they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from softdefend.data.cache import checksum
from softdefend.errors import SettingError

_KEY = "softdefend"
"""One key for all metadata: the format keeps no order of keys, and equal runs have equal bytes."""


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """A file's content: tensors in host memory that share none of it, ``metadata`` and their sha256."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    said = json.dumps({**metadata, "sha256": checksum(sorted(contiguous.items()))})
    return to_safetensors(contiguous, metadata={_KEY: said})


def read_metadata(path: Path) -> dict[str, Any]:
    """What a file says of its weights; empty for one from elsewhere. The weights are not read.

    Raises:
        OSError, SafetensorError, ValueError: missing or damaged.
    """
    with safe_open(path, "pt") as file:
        return _metadata(file)


def _metadata(file: Any) -> dict[str, Any]:
    metadata = json.loads((file.metadata() or {}).get(_KEY, "{}"))
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata that are a {type(metadata).__name__}")
    return metadata


def read_safetensors(path: Path, accepted: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file, which may be from elsewhere and then has no checksum.

    Args:
        path: of the file.
        accepted: what a message says may be there.

    Raises:
        SettingError: missing, damaged, or altered since it was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = _metadata(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise SettingError(str(path), "no such file", accepted) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise SettingError(str(path), "a damaged or foreign file", accepted) from error
    if metadata.get("sha256") not in (None, checksum(sorted(tensors.items()))):
        raise SettingError(str(path), "an altered file (its checksum does not match)", "an intact one")
    return tensors, metadata


def load_weights(net: nn.Module, path: Path) -> dict[str, Any]:
    """Put a run's weights into ``net`` and return their metadata.

    Raises:
        SettingError: missing, damaged or altered file, or weights of another network.
    """
    tensors, metadata = read_safetensors(path, "safetensors weights written by a training run")
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise SettingError(
            str(path), "weights of another network", f"weights of {type(net).__name__}"
        ) from error
    return metadata
