"""Averages of the weights over the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from softdefend.core.errors import SettingError
from softdefend.core.rule import RunInfo
from softdefend.execution.average import NetworkAverage
from softdefend.execution.batch_norm import statistics
from softdefend.execution.network_mode import is_frozen, set_mode
from softdefend.weights.base import WEIGHTS, WeightRule

EMABatchNorm = Literal["copy", "average"]
SWABatchNorm = Literal["reestimate", "copy"]


@WEIGHTS.register("EMA")
class EMA(WeightRule):
    """Exponential moving average of the weights; the average predicts, the plain weights train.

    In the first steps of the average the decay is min(decay, (1 + t) / (10 + t)), so that the first weights
    are soon forgotten. (Rebuilds of Gowal et al., arXiv 2010.03593, use the same formula after copying the
    weights for the first 2.5% of the run.)

    Args:
        decay: weight of the old average per step, in [0, 1).
        start: fraction of the run, in [0, 1), up to which the average is a copy of the plain weights.
        warmup: use the smaller decay of the first steps; if not, the decay is the same from the start.
        bn: statistics of batch normalization: ``copy`` (those of the plain network, at every step) or
            ``average`` (averaged as the weights are).

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "Gowal et al. 2020, arXiv 2010.03593"

    def __init__(
        self, decay: float = 0.995, start: float = 0.0, warmup: bool = True, bn: EMABatchNorm = "copy"
    ) -> None:
        for name, value in (("decay", decay), ("start", start)):
            if not 0 <= value < 1:
                raise SettingError(f"weight.{name}", value, "a number in [0, 1)")
        if bn not in get_args(EMABatchNorm):
            raise SettingError("weight.bn", repr(bn), " or ".join(get_args(EMABatchNorm)))
        self.decay, self.start, self.warmup, self.bn = decay, start, warmup, bn
        self._begun = start == 0

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        self._begins = self.start * run.epochs

        self._average = NetworkAverage(self.net, buffers=self.bn == "average")
        self._updates = 0

    def advance(self, epoch: float) -> None:
        # 1e-9: a product such as 0.525 * 200 may round to just above a whole number of epochs.
        self._begun = epoch >= self._begins - 1e-9

    def after_step(self) -> None:
        if not self._begun:
            self._updates = 0
        self._average.move(self._decay())
        self._updates += 1

    def _decay(self) -> float:
        """That of the next update; 0, which copies, for the first."""
        if self._updates == 0:
            return 0.0
        warm = (1 + self._updates) / (10 + self._updates)
        return min(self.decay, warm) if self.warmup else self.decay

    @property
    def prediction(self) -> nn.Module:
        return self._average.net

    def state_dict(self) -> dict[str, Any]:
        return {"averaged": self._average.net.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.net.load_state_dict(state["averaged"])
        self._updates = state["updates"]


@WEIGHTS.register("SWA")
class SWA(WeightRule):
    """Stochastic weight averaging: the equally weighted mean of the weights at the ends of epochs predicts.

    The plain weights are trained, and predict until the first average. The mean has no batch-normalization
    statistics of its own; :func:`reestimate` measures them after every average.

    Args:
        start: fraction of the run, in [0, 1], after which averaging begins: the first averaged epoch,
            counted from zero, is the ceiling of ``start * epochs``, at most the last one. The reference's
            0.275 is epoch 55 of 200.
        every: epochs between averages, >= 1. In between, the last average predicts.
        bn: statistics of batch normalization: ``reestimate`` (one forward of all training images per
            average) or ``copy`` (those of the plain network).

    Raises:
        SettingError: a value outside these ranges.
    """

    source = "Izmailov et al., UAI 2018, arXiv 1803.05407; in adversarial training Chen et al., ICLR 2021"

    def __init__(self, start: float = 0.275, every: int = 1, bn: SWABatchNorm = "reestimate") -> None:
        if not 0 <= start <= 1:
            raise SettingError("weight.start", start, "a number in [0, 1]")
        if every < 1:
            raise SettingError("weight.every", every, "a whole number >= 1")
        if bn not in get_args(SWABatchNorm):
            raise SettingError("weight.bn", repr(bn), " or ".join(get_args(SWABatchNorm)))
        self.start, self.every, self.bn = start, every, bn

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        # 1e-9: a product such as 0.275 * 200 may round to just above a whole number of epochs.
        self.first_epoch = min(math.ceil(self.start * run.epochs - 1e-9), run.epochs - 1)
        with torch.no_grad():
            self.averaged = AveragedModel(self.net)  # torch's own choice without a function: the plain mean
        if self.bn == "reestimate" and _has_scripted_statistics(self.net):
            accepted = "copy for a TorchScript network, whose batch normalization cannot be measured anew"
            raise SettingError("weight.bn", self.bn, accepted)
        self.averaged.n_averaged = self.averaged.n_averaged.cpu()
        self._forward, self._processes = run.forward(self.averaged.module), run.processes

    def end_epoch(self, epoch: int, images: Callable[[], Iterator[Tensor]]) -> None:
        if epoch < self.first_epoch or (epoch - self.first_epoch) % self.every:
            return
        self.averaged.update_parameters(self.net)  # and copies every buffer
        if self.bn == "reestimate":
            reestimate(self.averaged.module, images, self._forward)
            self._processes.copy_first_(statistics(self.averaged.module))

    @property
    def prediction(self) -> nn.Module:
        module: nn.Module = self.averaged.module if int(self.averaged.n_averaged) else self.net
        return module

    def state_dict(self) -> dict[str, Any]:
        return {"averaged": self.averaged.module.state_dict(), "averages": int(self.averaged.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averaged.module.load_state_dict(state["averaged"])
        self.averaged.n_averaged.fill_(state["averages"])


def _has_scripted_statistics(net: nn.Module) -> bool:
    scripted = (module for module in net.modules() if isinstance(module, torch.jit.ScriptModule))
    return any(getattr(module, "running_mean", None) is not None for module in scripted)


@torch.no_grad()
def reestimate(
    net: nn.Module,
    images: Callable[[], Iterator[Tensor]],
    forward: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Measure the running statistics of batch normalization anew: their mean over all batches.

    Every batch counts the same, as in ``torch.optim.swa_utils.update_bn``, whatever its size. Unlike there,
    everything but batch normalization is in eval mode: the statistics are those of the network that will
    predict, without dropout, and no random number is drawn. Frozen layers, which stay in eval mode where the
    network is trained, keep their statistics. A network without batch normalization is not touched; any other
    is left in eval mode.

    Args:
        net: the network.
        images: gives one pass over images, batches [b, c, h, w].
        forward: ``net`` in the wanted precision; ``net`` itself when None.
    """
    present = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not present:
        return
    learned = [layer for layer in present if not is_frozen(layer)]
    set_mode(net, "train")
    layers = [layer for layer in learned if layer.training]  # others keep themselves in eval mode
    net.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # a cumulative mean
        layer.reset_running_stats()
        layer.train()
    for image in images() if layers else ():
        (forward or net)(image)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    net.eval()
