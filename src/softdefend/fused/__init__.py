"""Fused kernels for Hopper GPUs: the forward and the image gradient that attacks ask for, in bfloat16."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from softdefend.fused.residual import KINDS, FusedNet

__all__ = ["FusedNet", "fused", "refusal"]


def refusal(net: nn.Module, image_shape: tuple[int, ...], device: torch.device) -> str | None:
    """Why a network on images of shape (c, h, w) has no fused kernels on a device; None where it has."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "a GPU of compute capability 9.0 or later is needed"
    if find_spec("triton") is None:
        return "the package triton is needed, which torch's CUDA builds bring along"
    channels, height, width = image_shape
    if height != width or width not in (16, 32, 64, 128):
        return f"images of {height}x{width}; 16, 32, 64 or 128 pixels square have fused kernels"
    if channels > 14:
        return f"images of {channels} channels; up to 14 have fused kernels"
    if not isinstance(net, nn.Sequential) or len(net) != 2 or type(net[1]) not in KINDS:
        return "only the built-in residual networks have fused kernels"
    return None


def fused(net: nn.Module, image_shape: tuple[int, ...], device: torch.device) -> FusedNet | None:
    """The network in fused kernels, with its weights as they are now; None where there are none for it."""
    if refusal(net, image_shape, device) is not None:
        return None
    assert isinstance(net, nn.Sequential)
    return KINDS[type(net[1])](net)
