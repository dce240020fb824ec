"""Averages of the weights over the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from softdefend.errors import SettingError
from softdefend.rule import RunInfo
from softdefend.weights.base import WeightRule

Tensors = tuple[Tensor, ...] | list[Tensor]


class EMA(WeightRule):
    """Exponential moving average of the weights; the average predicts, the plain weights train.

    Batch-normalisation statistics are the live network's, copied at every step. In the first steps the
    decay is min(decay, (1 + t) / (10 + t)), so that the start is forgotten. (Rebuilds of Gowal et al.,
    arXiv 2010.03593, use the same formula after copying the weights for the first 2.5% of the run.)

    Args:
        decay: weight of the old average per step, in [0, 1).

    Raises:
        SettingError: ``decay`` outside [0, 1).
    """

    def __init__(self, decay: float = 0.995) -> None:
        if not 0 <= decay < 1:
            raise SettingError("weight.decay", decay, "a number in [0, 1)")
        self.decay = decay

    def setup(self, run: RunInfo) -> None:
        super().setup(run)

        @torch.no_grad()
        def move(averaged: Tensors, live: Tensors, _: Tensor | int) -> None:
            torch._foreach_lerp_(averaged, live, 1 - min(self.decay, self._warm()))

        self.averaged = AveragedModel(self.net, multi_avg_fn=move)
        # torch reads this count at every update: on the CPU that costs no device sync.
        self.averaged.n_averaged = self.averaged.n_averaged.cpu()

    def _warm(self) -> float:
        updates = int(self.averaged.n_averaged)
        return (1 + updates) / (10 + updates)

    def after_step(self) -> None:
        self.averaged.update_parameters(self.net)

    @property
    def prediction(self) -> nn.Module:
        module: nn.Module = self.averaged.module
        return module

    def state_dict(self) -> dict[str, Any]:
        return {"averaged": self.averaged.module.state_dict(), "updates": int(self.averaged.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averaged.module.load_state_dict(state["averaged"])
        self.averaged.n_averaged.fill_(state["updates"])
