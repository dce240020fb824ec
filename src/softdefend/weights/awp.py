"""Adversarial weight perturbation (Wu et al., NeurIPS 2020, arXiv 2004.05884)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.core.rule import RunInfo
from softdefend.weights.base import WEIGHTS, Plain, WeightRule

_TINY = 1e-20
"""Keeps a direction finite where a gradient vanishes; the authors' value."""


@torch.no_grad()
def ascent(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, each scaled to the length of its weights: ||w|| g / ||g||, and zero where g is zero.

    Args:
        weights, gradients: tensors of equal shapes.
    """
    lengths, steepness = torch._foreach_norm(list(weights)), torch._foreach_norm(list(gradients))
    ratios = torch._foreach_div(lengths, torch._foreach_add(steepness, _TINY))
    return list(torch._foreach_mul(list(gradients), ratios))


@WEIGHTS.register("AWP")
class AWP(WeightRule):
    """Takes the gradient where the loss is worst nearby, so that the weights settle in flat regions.

    Each step makes two forwards of the same adversarial images and targets. The first, at the trained weights
    w, gives the direction of the perturbation v, with ||v_l|| = gamma ||w_l|| in every layer. The second is
    made at w + v; its gradient updates w. Perturbed are the trainable parameters of more than one dimension:
    weights of convolutions and linear layers, no biases, no normalization. As in the authors' code the attack
    is made once, at w, and weight decay is of w + v.

    Args:
        gamma: length of the perturbation relative to each layer's weights, > 0; the authors' 0.01 for PGD-AT
            and 0.005 for TRADES.
        warmup: fraction of the run, in [0, 1], whose epochs are trained without perturbation, rounded up.
        average: a rule that averages the weights that AWP trains, such as EMA or SWA; none when None.

    Raises:
        SettingError: a value outside these ranges, or an ``average`` that perturbs weights itself.
    """

    source = "Wu et al., NeurIPS 2020, arXiv 2004.05884"
    passes = 2

    def __init__(self, gamma: float = 0.01, warmup: float = 0.0, average: WeightRule | None = None) -> None:
        if not (gamma > 0 and math.isfinite(gamma)):
            raise SettingError("weight.gamma", gamma, "a positive number")
        if not 0 <= warmup <= 1:
            raise SettingError("weight.warmup", warmup, "a number in [0, 1]")
        if average is not None and average.passes > 1:
            accepted = "a rule that averages, such as EMA or SWA, or null"
            raise SettingError("weight.average", type(average).__name__, accepted)
        self.gamma, self.warmup = gamma, warmup
        self.average = average
        self._inner: WeightRule = average or Plain()

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        self._inner.setup(run)
        self._processes = run.processes
        # 1e-9: a product such as 0.05 * 200 may round to just above a whole number of epochs.
        self.first_epoch = math.ceil(self.warmup * run.epochs - 1e-9)
        self.weights: list[Tensor] = [p for p in self.net.parameters() if p.requires_grad and p.ndim > 1]
        if not self.weights:
            given = f"{type(self.net).__name__} without trainable weights of two or more dimensions"
            raise SettingError("net", given, "some convolution or linear layer for AWP to perturb")

    def phase(self, epoch: int) -> str:
        return "perturbed" if epoch >= self.first_epoch else "plain"

    def perturbs(self, phase: str) -> bool:
        return phase == "perturbed"

    @contextlib.contextmanager
    def perturbed(self, loss: Tensor) -> Iterator[None]:
        gradients = torch.autograd.grad(loss, self.weights, materialize_grads=True)
        self._processes.average_(gradients)
        trained = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            moved = list(torch._foreach_add(trained, ascent(trained, gradients), alpha=self.gamma))
            torch._foreach_copy_(self.weights, moved)
        try:
            yield
        finally:
            # The difference is the update. Adding the trained weights to it restores them exactly where there
            # was no update; subtracting the perturbation would round.
            with torch.no_grad():
                torch._foreach_sub_(self.weights, moved)
                torch._foreach_add_(self.weights, trained)

    def advance(self, epoch: float) -> None:
        self._inner.advance(epoch)

    def after_step(self) -> None:
        self._inner.after_step()

    def end_epoch(self, epoch: int, images: Callable[[], Iterator[Tensor]]) -> None:
        self._inner.end_epoch(epoch, images)

    @property
    def prediction(self) -> nn.Module:
        return self._inner.prediction

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)
