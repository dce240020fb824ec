"""The values of images that attacks may change, where they are not all: from a file, and as attacks take
them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from softdefend.core.arrays import read_array
from softdefend.core.digest import checksum
from softdefend.core.errors import SettingError
from softdefend.core.files import check_regular, read_bytes
from softdefend.core.safetensors_files import open_safetensors
from softdefend.data import DataSettings
from softdefend.data.decode import picture

_LARGEST = 2**28
"""Bytes of a file."""
_FILES = "a .npy or .safetensors file of zeros and ones, or a PNG picture, black where nothing may change"


def read_mask(path: Path) -> Tensor:
    """The mask in a file, bool, of any shape.

    Args:
        path: ``.npy``; ``.safetensors`` with one tensor, or one called ``mask``; ``.png``, whose pixels may
            change where they are not black.

    Raises:
        SettingError: no such file, another kind, or values other than 0 and 1.
    """
    try:
        check_regular(path, _LARGEST)
        values = _values(path)
    except SettingError as error:  # of a picture
        raise SettingError("--mask", f"{path} ({error.given})", _FILES) from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingError("--mask", f"{path} ({reason})", _FILES) from error
    if values.dtype != torch.bool and not bool(((values == 0) | (values == 1)).all()):
        raise SettingError("--mask", f"{path}, values other than 0 and 1", _FILES)
    return values.bool()


def _values(path: Path) -> Tensor:
    kind = path.suffix.lower()
    if kind == ".npy":
        array = read_array(path)
        if array.dtype.kind not in "buif":
            raise ValueError(f"an array of {array.dtype}")
        return torch.from_numpy(array.astype(bool) if array.dtype.kind == "b" else array.astype(np.float64))
    if kind == ".safetensors":
        with open_safetensors(path) as file:
            names = list(file.keys())
            name = names[0] if len(names) == 1 else "mask"
            if name not in names:
                raise ValueError("several tensors, none of them called mask" if names else "no tensor")
            tensor: Tensor = file.get_tensor(name)
            return tensor
    if kind == ".png":
        colors = picture(read_bytes(path, _LARGEST), path.name, "RGB", DataSettings())
        return torch.from_numpy((np.array(colors) > 0).any(axis=2))
    raise ValueError("another kind of file")


def check_mask(mask: Tensor, n: int, shape: tuple[int, ...], setting: str = "--mask") -> None:
    """Refuse a mask that does not fit the images, or leaves nothing free.

    Args:
        mask: bool.
        n: images of the data.
        shape: of one, (c, h, w).
        setting: what the caller knows it by.

    Raises:
        SettingError: such a mask.
    """
    c, h, w = shape
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((h, w), (1, h, w), (c, h, w), (n, c, h, w)):
        given = f"{mask.dtype} {list(mask.shape)}".removeprefix("torch.")
        accepted = f"bool [{h}, {w}], [{c}, {h}, {w}] or, one for each image, [{n}, {c}, {h}, {w}]"
        raise SettingError(setting, given, accepted)
    if not bool(mask.any()):
        raise SettingError(setting, "a mask without a value that may change", "one with some")


def mask_digest(mask: Tensor) -> str:
    """sha256 (hex) of shape and values."""
    return checksum([("mask", mask.cpu())])
