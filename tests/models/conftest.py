"""Naive layers on a network's own weights, written with torch.nn.functional only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _randomise(net: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics that make every layer matter, so that a swapped or missing one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            positive = name.endswith("running_var") or value.dim() == 1
            value.copy_(0.5 + noise if positive else (noise - 0.5) / max(1, value[0].numel()) ** 0.5)
    return {name: value.double() for name, value in net.state_dict().items()}


@pytest.fixture
def randomise() -> Callable[[nn.Module], dict[str, Tensor]]:
    return _randomise


@pytest.fixture
def bn_relu() -> Callable[[dict[str, Tensor], str, Tensor], Tensor]:
    return lambda state, name, x: batch_norm(state, name, x).clamp(min=0)


@pytest.fixture
def bn() -> Callable[[dict[str, Tensor], str, Tensor], Tensor]:
    return batch_norm


def batch_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    column = {
        key: state[f"{name}.{key}"].view(1, -1, 1, 1)
        for key in ("weight", "bias", "running_mean", "running_var")
    }
    scaled = (x - column["running_mean"]) / torch.sqrt(column["running_var"] + 1e-5)
    return scaled * column["weight"] + column["bias"]


@pytest.fixture
def conv2d() -> Callable[..., Tensor]:
    def apply(state: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    return apply
