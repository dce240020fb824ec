"""Networks from RobustBench's checkpoints, whatever these nest, prefix and normalize by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.core.weight_files import read_weights
from softdefend.core.weight_names import find_weights
from softdefend.models import normalize
from softdefend.models.robustbench import (
    STATISTICS_NAMES,
    UNUSED,
    Layout,
    choose_layout,
    names_there,
)

_DEPTH = 6
"""Of nested mappings."""


@dataclass(frozen=True)
class RobustBenchNetwork:
    """A network of RobustBench's, by the arguments of :func:`load_robustbench` that say which."""

    architecture: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """What tells it from networks by other names or factories."""
        return f"robustbench:{self.architecture}"

    @property
    def shown(self) -> str:
        """The architecture without an activation, as tables show it."""
        return self.architecture.removesuffix("-ReLU").removesuffix("-SiLU")


def load_robustbench(
    architecture: str,
    weights: Path,
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    key: str = "",
) -> tuple[nn.Module, list[str]]:
    """A network of RobustBench's with the weights of a file, in eval mode on the CPU.

    It normalizes by the statistics in the file (``mu`` and ``sigma``, or ``mean`` and ``std``), or by those
    of DeepMind's code where the weights are in its layout, or by ``mean`` and ``std``; else not at all.

    Args:
        architecture: see :data:`~softdefend.models.robustbench.ACCEPTED`.
        weights: a state dict from torch.save, perhaps nested, or safetensors. A pickle runs nothing.
        num_classes: of the data.
        in_channels: of the images.
        mean, std: of each channel, where code outside of the file normalizes; both or neither.
        key: where in the file the weights stand; looked for if empty.

    Returns:
        The network, and what had to be done to find its weights, in words.

    Raises:
        SettingError: an unknown architecture, or weights that cannot be read or do not fit.
    """
    content = read_weights(weights)
    layout = choose_layout(architecture, _names(content))
    found = _statistics(weights, content, in_channels)
    beside = {*STATISTICS_NAMES, *STATISTICS_NAMES.values()} if found else set()
    used = _without(content, beside | {*UNUSED})
    net = layout.build(num_classes, in_channels)
    chosen, said = _choose(found, (mean, std), layout, num_classes, in_channels)
    state, notes = find_weights(weights, used, net, key, names_there(net))
    net.load_state_dict(state)
    if any(part in name.split(".") for name in _names(content) for part in UNUSED):
        notes.append(f"left out {' and '.join(UNUSED)}, which no forward uses")
    return (normalize(net, *chosen) if chosen else net).eval(), [*notes, said]


_Statistics = tuple[Sequence[float], Sequence[float]]


def _choose(
    found: _Statistics | None, given: _Statistics, layout: Layout, num_classes: int, in_channels: int
) -> tuple[_Statistics | None, str]:
    """What the network normalizes by, and that in words."""
    if len(given[0]) != len(given[1]):
        numbers = f"{len(given[0])} numbers beside {len(given[1])} of --std"
        raise SettingError("--mean", numbers, "as many of both")
    known = found or (layout.statistics.get(num_classes) if in_channels == 3 else None)
    if given[0] and known:
        where = "the file has statistics" if found else "DeepMind's code has its own"
        raise SettingError("--mean", f"{list(given[0])}, where {where}", "neither --mean nor --std")
    if given[0] and len(given[0]) != in_channels:
        numbers = f"{len(given[0])} numbers for {in_channels} channels"
        raise SettingError("--mean", numbers, "one number for each channel")
    if given[0]:
        return given, "normalizes as told"
    if found:
        return found, "normalizes by the file's statistics"
    if known:
        return known, "normalizes as DeepMind's code does"
    if layout.statistics:
        images = f"{num_classes} classes and {in_channels} channels"
        accepted = "--mean and --std that its code normalizes by"
        raise SettingError("--mean", f"nothing for {images} in DeepMind's layout", accepted)
    return None, "does not normalize"


def _mappings(content: Mapping[str, Any], depth: int = _DEPTH) -> Iterator[Mapping[str, Any]]:
    """The mapping of a file, and those in it."""
    yield content
    for value in content.values() if depth else ():
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            yield from _mappings(value, depth - 1)


def _names(content: Mapping[str, Any]) -> list[str]:
    return [name for one in _mappings(content) for name, value in one.items() if isinstance(value, Tensor)]


def _statistics(path: Path, content: Mapping[str, Any], channels: int) -> _Statistics | None:
    """The normalization in a file.

    Raises:
        SettingError: two that differ.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for one in _mappings(content):
        for name, mean in one.items():
            above, dot, last = name.rpartition(".")
            std = one.get(f"{above}{dot}{STATISTICS_NAMES.get(last)}")
            if not (isinstance(mean, Tensor) and isinstance(std, Tensor)):
                continue
            if mean.numel() == std.numel() == channels:
                found.append((mean.float().flatten(), std.float().flatten()))
    if not found:
        return None
    for mean, std in found[1:]:
        if not (torch.equal(mean, found[0][0]) and torch.equal(std, found[0][1])):
            raise SettingError(str(path), "two normalizations that differ", "a file with one")
    return found[0][0].tolist(), found[0][1].tolist()


def _without(content: Mapping[str, Any], parts: set[str], depth: int = _DEPTH) -> dict[str, Any]:
    """What a file holds, but for tensors whose names have one of some parts."""
    kept: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and depth:
            kept[name] = _without(value, parts, depth - 1)
        elif not (isinstance(value, Tensor) and parts & {*str(name).split(".")}):
            kept[name] = value
    return kept
