"""Checks of a network and of what it returns, before a long run is spent on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.tensors import unusual_form

_MOST_SAID = 300
"""Characters of somebody else's error in ours: TorchScript quotes whole files."""


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
    accepted = f"a network that maps images {list(image.shape)} to floating point logits [2, {width}]"
    with in_eval_mode(net), torch.no_grad():
        logits = logits_of(net, image, accepted)
    k = logits.shape[1]
    if not (k >= least if num_classes is None else k == num_classes):
        raise SettingError("net", f"a network that returns shape {list(logits.shape)}", accepted)
    check_values(logits)
    return k


@contextlib.contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Eval mode; every module's own is put back after."""
    training = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def logits_of(net: nn.Module, image: Tensor, accepted: str) -> Tensor:
    """The float32 logits [b, k] of ``image`` [b, c, h, w].

    Args:
        net: the network.
        image: what it gets; a network may write into it.
        accepted: what would have been a network, for the message.

    Raises:
        SettingError: the network fails, or returns something other than floating point [b, k] with k >= 1.
    """
    try:
        logits: object = net(image)
    except (Exception, SystemExit) as error:  # a network's own code may fail in any way
        given = f"a network that fails on a forward pass ({describe_error(error)})"
        raise SettingError("net", given, accepted) from error
    if not isinstance(logits, Tensor):
        raise SettingError("net", f"a network that returns {type(logits).__name__}", accepted)
    if form := unusual_form(logits):
        raise SettingError("net", f"a network that returns {form}", accepted)
    if not logits.is_floating_point():
        raise SettingError("net", f"a network that returns {logits.dtype}", accepted)
    if logits.ndim != 2 or len(logits) != len(image) or logits.shape[1] < 1:
        raise SettingError("net", f"a network that returns shape {list(logits.shape)}", accepted)
    return logits.float()


def check_values(logits: Tensor) -> None:
    """Refuse logits [b, k] that no loss can use: not finite, or probabilities.

    Log-probabilities are logits like any other: the softmax that every loss applies leaves them as they are.

    Raises:
        SettingError: see above.
    """
    if not bool(logits.isfinite().all()):
        raise SettingError("net", "a network that returns NaN or infinity", "finite logits")
    in_range = ((logits >= 0) & (logits <= 1)).all()
    # Wide enough for a softmax taken in bfloat16.
    if bool(in_range and ((logits.sum(dim=1) - 1).abs() < 1e-2).all()):
        accepted = (
            "logits, or log-probabilities: leave out the network's last softmax, which the losses apply "
            "themselves, or return the logarithm of what it gives"
        )
        raise SettingError("net", "a network that returns probabilities", accepted)


def describe_error(error: BaseException) -> str:
    """An error of somebody else's code in one line that is not too long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]} ..."
