"""Activation checkpointing: blocks whose activations are computed again in the backward pass, not kept."""

from __future__ import annotations

import contextlib
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from softdefend.core.errors import SettingError

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


def keep_blocks(net: nn.Module) -> None:
    """Undo :func:`recompute_blocks`."""
    for module in net.modules():
        if hasattr(type(module), "recomputes"):
            module.__class__ = type(module).__bases__[0]


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
        contexts = lambda: (nullcontext(), _Again(self))  # noqa: E731
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **keywords)

    if kind not in _MADE:
        about = {"recomputes": True, "__module__": kind.__module__, "__doc__": kind.__doc__}
        _MADE[kind] = type(kind.__name__, (kind,), {"forward": forward, **about})
    return _MADE[kind]


class _Again(contextlib.AbstractContextManager[None]):
    """The second computation of a block: with the normalization that the first one had, which an objective
    may have put in the place of the network's own, and with copies of its running statistics, which the first
    one has moved.

    Args:
        block: as it is now, before the first computation.
    """

    def __init__(self, block: nn.Module) -> None:
        layers = [module for module in block.modules() if isinstance(module, _BatchNorm)]
        self._first = [(layer, dict(layer._parameters), dict(layer._buffers)) for layer in layers]
        self._before: list[tuple[_BatchNorm, dict[str, Any], dict[str, Any]]] = []

    def __enter__(self) -> None:
        for layer, parameters, buffers in self._first:
            self._before.append((layer, dict(layer._parameters), dict(layer._buffers)))
            layer._parameters.update(parameters)
            layer._buffers.update({k: None if v is None else v.clone() for k, v in buffers.items()})

    def __exit__(self, *error: object) -> None:
        while self._before:
            layer, parameters, buffers = self._before.pop()
            layer._parameters.update(parameters)
            layer._buffers.update(buffers)
