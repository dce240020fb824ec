"""What would stop a training step from being captured as a CUDA graph, as far as a CPU can tell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Notes operations that would stop a device, or copy to it, in the middle of a step."""

    STOPS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = any(index is not None and index.dtype == torch.bool for index in _indices(name, args))
        if name in self.STOPS or masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _indices(name, args):
    """Of an advanced indexing; with boolean ones the result's shape depends on data."""
    return args[1] if name in ("index", "index_put_") else ()


@contextlib.contextmanager
def as_on_a_device(trainer) -> Iterator[None]:
    """Leaves out what reads the host on a CPU only: torch's check of labels, the CPU's optimizer."""

    def one_hot(label: Tensor, num_classes: int = -1) -> Tensor:
        if num_classes < 0:
            return unpatched(label, num_classes)  # counts the classes, on any device
        return (label[..., None] == torch.arange(num_classes, device=label.device)).long()

    unpatched = F.one_hot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "one_hot", one_hot)
        patch.setattr(trainer.optimizer, "step", lambda: None)
        yield


def python_values(thing: object, path: str = "", seen: frozenset[int] = frozenset()) -> dict[str, Any]:
    """Numbers, texts and truths that an object holds, by where it holds them; none of its networks'."""
    if thing is None or isinstance(thing, (bool, int, float, complex, str)):
        return {path: thing}
    if id(thing) in seen or isinstance(thing, (Tensor, nn.Module)):
        return {}
    parts = _parts(thing)
    seen = seen | {id(thing)}
    inside = [python_values(part, f"{path}.{name}", seen) for name, part in parts.items()]
    return {key: value for found in inside for key, value in found.items()} | {f"{path}#": len(parts)}


def places(thing: object, path: str = "", seen: frozenset[int] = frozenset()) -> dict[str, int]:
    """Where on the device the tensors of an object lie; none of its networks'."""
    if isinstance(thing, Tensor):
        return {path: thing.data_ptr()}
    if id(thing) in seen or isinstance(thing, nn.Module):
        return {}
    inside = [places(part, f"{path}.{name}", seen | {id(thing)}) for name, part in _parts(thing).items()]
    return {key: value for found in inside for key, value in found.items()}


def _parts(thing: object) -> dict[object, object]:
    if isinstance(thing, dict):
        return dict(thing)
    if isinstance(thing, (list, tuple)):
        return dict(enumerate(thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: getattr(thing, field.name) for field in fields(thing)}
    ours = type(thing).__module__.partition(".")[0] not in ("torch", "builtins", "functools", "collections")
    return dict(vars(thing)) if ours and hasattr(thing, "__dict__") else {}
