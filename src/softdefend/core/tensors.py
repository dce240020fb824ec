"""Tensors that hold no plain numbers, and are refused before anything is computed with them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.masked import MaskedTensor


def unusual_form(tensor: Tensor) -> str | None:
    """What a tensor is that most operations refuse, such as ``a sparse tensor``; None for a plain one."""
    if isinstance(tensor, MaskedTensor):
        return "a masked tensor"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_meta:
        return "a tensor on the meta device, which has no values"
    if tensor.is_quantized:
        return "a quantized tensor"
    if tensor.layout != torch.strided:
        name = str(tensor.layout).removeprefix("torch.").lstrip("_")
        return "a sparse tensor" if "sparse" in name else f"a tensor in the layout {name}"
    return None
