"""A check of what a network returns, before a long run is spent on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream


def check_logits(
    net: nn.Module,
    image_shape: Sequence[int],
    num_classes: int | None,
    device: torch.device | str,
    *,
    least: int = 2,
) -> int:
    """Run two random images through ``net`` in eval mode and refuse outputs that the losses cannot use.

    Every module's training flag is restored; BatchNorm statistics are not touched.

    Args:
        net: the network, already on ``device``.
        image_shape: (c, h, w) of one image.
        num_classes: k, the length of the logits; None where the network decides.
        device: where the images are made.
        least: the smallest k to accept where the network decides.

    Returns:
        k.

    Raises:
        SettingError: the network fails on such images, or returns something other than finite floating
            point logits [b,k]; probabilities are refused because every loss applies a softmax itself.
    """
    image = torch.rand((2, *image_shape), generator=stream(0, "check-logits")).to(device)
    width = f"{least} or more" if num_classes is None else str(num_classes)
    accepted = f"a network that maps images {list(image.shape)} to logits [2, {width}]"
    try:
        logits = _eval_forward(net, image)
    except Exception as error:  # a network's own code may fail in any way
        raise SettingError("net", f"a network that fails on one forward pass ({error})", accepted) from error
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        given = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise SettingError("net", f"a network that returns {given}", accepted + ", floating point")
    fits = logits.dim() == 2 and len(logits) == len(image)
    if not fits or not (logits.shape[1] >= least if num_classes is None else logits.shape[1] == num_classes):
        raise SettingError("net", f"a network that returns shape {list(logits.shape)}", accepted)
    if not bool(logits.isfinite().all()):
        raise SettingError("net", "a network that returns NaN or infinity", "finite logits")
    if _are_probabilities(logits.float()):
        accepted = "logits: leave out the network's last softmax (or sigmoid), the loss applies it"
        raise SettingError("net", "a network that returns probabilities", accepted)
    return logits.shape[1]


@torch.no_grad()
def _eval_forward(net: nn.Module, image: Tensor) -> object:
    training = {module: module.training for module in net.modules()}
    net.eval()
    try:
        output: object = net(image)
        return output
    finally:
        for module, mode in training.items():
            module.training = mode


def _are_probabilities(rows: Tensor) -> bool:
    in_range = ((rows >= 0) & (rows <= 1)).all()
    # wide enough for a softmax taken in bfloat16
    return bool(in_range and ((rows.sum(dim=1) - 1).abs() < 1e-2).all())
