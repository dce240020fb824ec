"""Files of weights: safetensors that carry a checksum of what they hold, and files of other people.

Nothing in a weights file is executed: it is safetensors, or a torch file read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from softdefend.core.digest import checksum, file_digest
from softdefend.core.errors import SettingError
from softdefend.core.files import check_regular, parse_json, write_atomic
from softdefend.core.memory import check_memory
from softdefend.core.pickles import BoundsError
from softdefend.core.safetensors_files import open_safetensors
from softdefend.core.torch_files import check_torch_file
from softdefend.core.weight_names import find_weights

_OF_A_RUN = "safetensors weights written by a training run"

_KEY = "softdefend"
"""One key for all metadata: the format keeps no order of keys, and equal runs have equal bytes."""


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The content of a weights file: tensors, ``metadata`` and the sha256 of the tensors.

    Args:
        tensors: in host memory, of which no two share any.
        metadata: plain values.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**metadata, "sha256": checksum(sorted(contiguous.items()))})
    return to_safetensors(contiguous, metadata={_KEY: text})


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a weights file; empty for one from elsewhere. The weights are not read.

    Raises:
        OSError, SafetensorError, ValueError: missing, damaged, or no regular file.
    """
    with open_safetensors(path) as file:
        return _metadata(file)


def _metadata(file: Any) -> dict[str, Any]:
    metadata = parse_json((file.metadata() or {}).get(_KEY, "{}"))
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata that are a {type(metadata).__name__}")
    return metadata


def read_safetensors(path: Path, accepted: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file, which may be from elsewhere and then has no checksum.

    Args:
        path: of the file.
        accepted: what may be there, for the message.

    Raises:
        SettingError: missing, damaged, or altered since it was written.
    """
    _check_file(path, accepted)
    try:
        with open_safetensors(path) as file:
            metadata = _metadata(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise SettingError(str(path), "a damaged or foreign file", accepted) from error
    if metadata.get("sha256") not in (None, checksum(sorted(tensors.items()))):
        raise SettingError(str(path), "an altered file (its checksum does not match)", "an intact one")
    return tensors, metadata


def metadata_of(path: Path) -> dict[str, Any]:
    """The metadata of a run's weights, which are not read.

    Raises:
        SettingError: no such file, or a damaged one.
    """
    try:
        return read_metadata(path)
    except FileNotFoundError as error:
        raise SettingError(str(path), "no such file", _OF_A_RUN) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise SettingError(str(path), "a damaged or foreign file", _OF_A_RUN) from error


def weights_digest(path: Path) -> str:
    """sha256 (hex) of the bytes of a run's weights file.

    Raises:
        SettingError: no such file, or one that cannot be read.
    """
    _check_file(path, _OF_A_RUN)
    try:
        return file_digest(path)
    except OSError as error:
        raise SettingError(str(path), "a damaged or foreign file", _OF_A_RUN) from error


def load_weights(net: nn.Module, path: Path) -> dict[str, Any]:
    """Put a run's weights into ``net`` and return their metadata.

    Raises:
        SettingError: missing, damaged or altered file, or weights of another network.
    """
    tensors, metadata = read_safetensors(path, _OF_A_RUN)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise SettingError(
            str(path), "weights of another network", f"weights of {type(net).__name__}"
        ) from error
    return metadata


def load_weights_file(
    net: nn.Module, path: Path, content: Mapping[str, Any] | None = None, key: str = ""
) -> list[str]:
    """Put the weights of a file into ``net``, however they are nested in it and whatever prefix they have.

    Every name and shape must fit in exactly one way. Only counts of batches, which older files lack, and
    buffers that the network's code sets in front of everything that is trained may be missing.

    Args:
        net: what takes them.
        path: of the file.
        content: of :func:`read_weights`, where the file has been read already.
        key: where in the file the weights stand, such as ``state_dict_ema``; looked for if empty.

    Returns:
        What was done to find them, in words; nothing where the file fitted as it was.

    Raises:
        SettingError: a file that cannot be read without executing it, or that fits in no way or in several.
    """
    state, notes = find_weights(path, read_weights(path) if content is None else content, net, key)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:  # a module with a loading rule of its own
        raise SettingError(str(path), " ".join(str(error).split()), "weights of this network") from error
    return notes


def read_weights(path: Path) -> Mapping[str, Any]:
    """What a weights file holds, on the CPU, without executing anything in it.

    Raises:
        SettingError: no such file, damage, or a pickle that asks for more than tensors and plain values.
    """
    accepted = "safetensors, or a state dict written by torch.save"
    if path.suffix == ".safetensors":
        return read_safetensors(path, accepted)[0]
    _check_file(path, accepted)
    try:
        with open(path, "rb") as file:
            check_torch_file(file, str(path))
        with warnings.catch_warnings():  # about formats that are refused below
            warnings.simplefilter("ignore")
            content: object = torch.load(path, map_location="cpu", weights_only=True)
    except SettingError:
        raise
    except BoundsError as error:
        raise SettingError(str(path), f"a damaged or foreign file ({error})", accepted) from error
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|allowlist|class) `?([\w.]+)", str(error))
        # a truncated pickle names nothing
        given = f"a pickle that would run {name[1]}" if name else "a damaged or foreign file"
        raise SettingError(str(path), given, f"{accepted}: tensors and plain values only") from error
    except Exception as error:  # foreign bytes make the reader fail in any way
        raise SettingError(str(path), "a damaged or foreign file", accepted) from error
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise SettingError(str(path), f"a file that holds a {type(content).__name__}", accepted)
    return content


def _check_file(path: Path, accepted: str) -> None:
    """Refuse what cannot be read to its end, or not within memory."""
    try:
        check_memory(check_regular(path), str(path), "a file of weights")
    except FileNotFoundError as error:
        raise SettingError(str(path), "no such file", accepted) from error
    except IsADirectoryError as error:
        raise SettingError(str(path), "a damaged or foreign file", accepted) from error
    except OSError as error:
        raise SettingError(str(path), error.strerror or error, accepted) from error


def save_weights(net: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the weights as safetensors, unless the file holds just these already."""
    # a copy of each: tied weights share memory, which safetensors does not store
    tensors = {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}
    content = to_bytes(tensors, metadata)
    if not os.path.isfile(path) or path.read_bytes() != content:
        write_atomic(path, content)
