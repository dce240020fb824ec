"""The mode of a network for one forward: batch normalization, frozen parameters, TF32."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BNMode = Literal["train", "batch", "eval"]
"""How batch normalization behaves in a forward: ``train`` uses the batch's statistics and updates the
running ones, ``batch`` uses the batch's and leaves the running ones, ``eval`` uses the running ones."""

_FROZEN = "softdefend_frozen"
"""The attribute of layers that are kept frozen: copies of a network have it too."""


def set_mode(net: nn.Module, mode: BNMode) -> None:
    """Put the network in training (``train``, ``batch``) or evaluation mode.

    ``batch`` normalizes by the batch's statistics and leaves the running ones as they are. Layers that
    :func:`keep_frozen` found stay in evaluation mode.
    """
    net.train(mode != "eval")
    for module in net.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.track_running_stats = mode != "batch"
            if getattr(module, _FROZEN, False):
                module.eval()


def keep_frozen(net: nn.Module) -> None:
    """Have :func:`set_mode` keep batch normalization frozen that is frozen now: training would move its
    statistics. A layer that stays in evaluation mode by its own ``train`` needs no such care."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            setattr(module, _FROZEN, _looks_frozen(module))


def is_frozen(layer: _BatchNorm) -> bool:
    """Whether a layer was frozen when :func:`keep_frozen` looked; or now, where it has not looked yet."""
    return bool(getattr(layer, _FROZEN, _looks_frozen(layer)))


def _looks_frozen(layer: _BatchNorm) -> bool:
    """Whether it is in evaluation mode and has parameters, none of which is trained."""
    learned = [parameter.requires_grad for parameter in layer.parameters()]
    return bool(learned) and not any(learned) and not layer.training


def frozen_copy(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parameters are not trained."""
    with torch.no_grad():  # copies of a TorchScript network are no leaves otherwise
        made = copy.deepcopy(net).eval()
    for parameter in made.parameters():  # TorchScript has no requires_grad_ of a whole network
        parameter.requires_grad_(False)
    return made


@contextlib.contextmanager
def frozen(net: nn.Module, mode: BNMode) -> Iterator[None]:
    """The network as an attack sees it: in ``mode`` and with frozen parameters; both restored after, module
    by module.

    Frozen parameters spare the attack their gradients, also in compiled code, which does not prune them
    by itself: 23 forward units per PGD-10 step instead of 33.
    """
    modes = [(module, module.training) for module in net.modules()]
    tracked = [(m, m.track_running_stats) for m in net.modules() if isinstance(m, _BatchNorm)]
    learned = [p for p in net.parameters() if p.requires_grad]
    set_mode(net, mode)
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
        for module, tracks in tracked:
            module.track_running_stats = tracks


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one: streams and graphs are of the current one unless they are told. No effect
    for a CPU."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def kernel_search(allowed: bool) -> Iterator[None]:
    """Have cuDNN choose its kernels by trial, or by rule: a trial for every size of batch costs seconds where
    sizes vary."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, allowed
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def tf32(allowed: bool, *, products: bool | None = None) -> Iterator[None]:
    """Allow or forbid TF32 in convolutions and matrix products; no effect on a CPU.

    torch allows it in convolutions unless told otherwise, so an fp32 evaluation has to forbid it.

    Args:
        allowed: in convolutions.
        products: in matrix products; as in convolutions when None.
    """
    wanted = allowed, allowed if products is None else products
    # The newer fp32_precision names cannot be mixed with the ones torch.compile still reads.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = wanted
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
