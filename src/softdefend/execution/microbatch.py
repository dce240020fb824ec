"""How many images a network can compute at once: a matter of memory, never of results."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softdefend.execution.network_mode import frozen

CPU_MICROBATCH = 256
"""On a CPU: beyond this nothing gets faster, and a wide network's activations stay below some gigabytes."""
_MOST, _PROBE, _SHARE = 1024, 16, 0.5
"""More than 1,024 at once fill a GPU no better. Captured steps keep as much again as their forwards need."""


def fitting_microbatch(net: nn.Module, image: Tensor) -> int:
    """How many images' forward and input gradient fit into the free memory of their device, a power of two up
    to 1024 on a GPU.

    Measured on a batch of 16: the peak of one forward and one gradient, to which the attacks' own copies of
    the images are added. An estimate: whoever uses it must be ready to halve it.

    Args:
        net: images to logits.
        image: at least one [m, c, h, w] on the device of ``net``.
    """
    if image.device.type != "cuda":
        return CPU_MICROBATCH
    shown = image[:1].expand(_PROBE, -1, -1, -1).clone().requires_grad_(True)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(image.device)
    torch.cuda.reset_peak_memory_stats(image.device)
    with frozen(net, "eval"), torch.enable_grad():
        _forward_and_gradient(net, shown)
    peak = torch.cuda.max_memory_allocated(image.device) - before
    copies = 16 * shown[0].numel() * shown.element_size()  # iterates, gradients and best points of a search
    free, _ = torch.cuda.mem_get_info(image.device)
    fitting = int(_SHARE * free / (peak / _PROBE + copies))
    return min(_MOST, 1 << max(fitting, 1).bit_length() - 1)


def _forward_and_gradient(net: nn.Module, image: Tensor) -> None:
    """One forward, and one gradient in the image where the network has one: refusing those that have none is
    left to the attacks that need it."""
    total = net(image).sum()
    if total.requires_grad:
        torch.autograd.grad(total, image, allow_unused=True)
