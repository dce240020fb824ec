"""Fused kernels for Hopper GPUs: the forward and the image gradient that attacks ask for, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.execution.fused.residual import KINDS, FusedNet
from softdefend.execution.fused.threat import FusedThreat

__all__ = ["FusedNet", "FusedThreat", "agree", "fused", "refusal"]

_LOGITS, _GRADIENTS = 0.15, 0.3
"""Largest difference of an image's logits, and of a batch's gradients, as shares of their lengths, from those
of the network in float32, where the network in bfloat16 does not differ by more than half of it."""
_BEYOND, _MOST = 2.0, 0.9
"""Where it does (the gradients of a deep network with drawn weights by a half), how many times as much the
kernels may, and the bound of that: what is nothing but zeros differs by 1."""
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
    if any(isinstance(module, nn.SiLU) for module in net.modules()):
        return "fused kernels have relu between the layers, not silu"
    return None


def fused(net: nn.Module, image_shape: tuple[int, ...], device: torch.device) -> FusedNet | None:
    """The network in fused kernels, with its weights as they are now; None where there are none for it."""
    if refusal(net, image_shape, device) is not None:
        return None
    assert isinstance(net, nn.Sequential)
    return KINDS[type(net[1])](net)


def agree(kernels: FusedNet, net: nn.Module, image: Tensor) -> bool:
    """Whether kernels do what the network does in evaluation mode on images [b, c, h, w]: logits of each and
    gradients, as near to float32 as bfloat16 comes. A compiler's mistake in one size of tile shows here.
    Reads the device."""

    def bfloat16(image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16):
            logits: Tensor = net(image)
        return logits.float()

    true = _look(lambda image: net(image).float(), image)
    allowed = [
        max(least, min(_BEYOND * error, _MOST))
        for least, error in zip((_LOGITS, _GRADIENTS), _apart(_look(bfloat16, image), true), strict=True)
    ]
    for _ in range(_LOOKS):
        found = _apart(_look(kernels, image), true)
        if not all(error <= most for error, most in zip(found, allowed, strict=True)):
            return False
    return True


def _apart(found: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The largest relative error of an image's logits, and that of the gradients; NaN is no number's equal
    and refused by every bound."""
    logits = torch.linalg.vector_norm(found[0] - true[0], dim=1) / torch.linalg.vector_norm(true[0], dim=1)
    return float(logits.max()), float((found[1] - true[1]).norm() / true[1].norm())


def _look(forward: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a cross-entropy in the images."""
    image = image.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logits = forward(image)
        label = torch.arange(len(image), device=image.device) % logits.shape[1]
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, label, reduction="sum"), image)
    return logits.detach(), grad
