"""Activation checkpointing: blocks whose activations are computed again in the backward pass, not kept."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from softdefend.core.errors import SettingError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def recompute_blocks(net: nn.Module) -> int:
    """Have each repeated block of a network keep its input alone between forward and backward pass.

    Blocks are the modules of one class, not one of torch's own, of which a list or sequence holds several,
    such as the residual blocks of a ResNet or the layers of a transformer; of blocks within blocks the inner
    ones. Their class is replaced by one of the same name that computes the same numbers, so that copies of
    the network do so too. Running statistics of batch normalization move once, and dropout is the same in
    both computations.

    Args:
        net: changed in place.

    Returns:
        How many blocks there are.

    Raises:
        SettingError: there are none.
    """
    repeated = _repeated(net)
    found = [block for block in net.modules() if type(block) in repeated and not _holds_repeated(block)]
    for block in found:
        kind: Any = type(block)
        block.__class__ = _recomputed(kind)
    if not found and not any(hasattr(type(block), "recomputes") for block in net.modules()):
        accepted = "false for a network without repeated blocks"
        raise SettingError("runtime.recompute", f"true with {type(net).__name__}", accepted)
    return len(found)


def _repeated(net: nn.Module) -> set[type]:
    """The classes of blocks."""
    kinds: set[type] = set()
    for module in net.modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            counts = Counter(type(child) for child in module if _is_block(child))
            kinds |= {kind for kind, count in counts.items() if count > 1}
    return kinds


def _is_block(module: nn.Module) -> bool:
    own = type(module).__module__.startswith("torch.")
    done = hasattr(type(module), "recomputes")
    return not own and not done and any(True for _ in module.parameters())


def _holds_repeated(block: nn.Module) -> bool:
    return bool(_repeated(block))


def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """A class that is ``kind`` but for what it keeps."""

    def forward(self: nn.Module, *args: Any, **keywords: Any) -> Any:
        plain = kind.forward.__get__(self)
        if not torch.is_grad_enabled():
            return plain(*args, **keywords)
        contexts = lambda: (nullcontext(), _statistics_kept(self))  # noqa: E731
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **keywords)

    if kind not in _MADE:
        about = {"recomputes": True, "__module__": kind.__module__, "__doc__": kind.__doc__}
        _MADE[kind] = type(kind.__name__, (kind,), {"forward": forward, **about})
    return _MADE[kind]


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Let batch normalization move copies of its running statistics: the first computation has moved them."""
    layers = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = [(layer, name, getattr(layer, name)) for layer in layers for name in _STATISTICS]
    try:
        for layer, name, value in before:
            setattr(layer, name, None if value is None else value.clone())
        yield
    finally:
        for layer, name, value in before:
            setattr(layer, name, value)
