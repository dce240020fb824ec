"""Fused kernels for Hopper GPUs: the forward and the image gradient that attacks ask for, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.fused.residual import KINDS, FusedNet
from softdefend.fused.threat import FusedThreat

__all__ = ["FusedNet", "FusedThreat", "agree", "fused", "refusal"]

_LOGITS, _GRADIENTS = 0.15, 0.3
"""Largest difference of an image's logits, and of a batch's gradients, as shares of their lengths, from those
of the network in bfloat16. Rounding makes about a tenth of it."""
_LOOKS = 3
"""Comparisons: a race does not show every time."""


def refusal(net: nn.Module, image_shape: tuple[int, ...], device: torch.device) -> str | None:
    """Why a network on images of shape (c, h, w) has no fused kernels on a device; None where it has."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "a GPU of compute capability 9 is needed"
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


def agree(kernels: FusedNet, net: nn.Module, image: Tensor) -> bool:
    """Whether kernels do what the network does, in evaluation mode under autocast, on images [b, c, h, w]:
    logits of each and gradients. A compiler's mistake in one size of tile shows here. Reads the device."""

    def bfloat16(image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16):
            logits: Tensor = net(image)
        return logits.float()

    wanted, true = _look(bfloat16, image)
    return all(_close(*_look(kernels, image), wanted, true) for _ in range(_LOOKS))


def _close(logits: Tensor, grad: Tensor, wanted: Tensor, true: Tensor) -> bool:
    apart = torch.linalg.vector_norm(logits - wanted, dim=1)
    near = bool((apart <= _LOGITS * torch.linalg.vector_norm(wanted, dim=1)).all())
    return near and bool((grad - true).norm() <= _GRADIENTS * true.norm())


def _look(forward: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a cross-entropy in the images."""
    image = image.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logits = forward(image)
        label = torch.arange(len(image), device=image.device) % logits.shape[1]
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, label, reduction="sum"), image)
    return logits.detach(), grad
