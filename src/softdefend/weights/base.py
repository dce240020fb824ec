"""What a weight rule is: the answer to 'at which weights?'"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import Tensor, nn

from softdefend.core.registry import Registry
from softdefend.core.rule import Rule, RunInfo


class WeightRule(Rule):
    """Chooses the weights at which the gradient is taken, and those that predict. In this base both are the
    trained weights."""

    setting: ClassVar[str] = "weight"
    passes: int = 1
    """How often a step makes the forwards and gradients of an update: twice where weights are perturbed."""
    net: nn.Module

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        assert run.net is not None
        self.net = run.net

    def perturbs(self, phase: str) -> bool:
        """Whether the gradient is taken at perturbed weights in this phase."""
        return False

    def perturbed(self, loss: Tensor) -> AbstractContextManager[None]:
        """A context in which the network has the weights where the gradient is to be taken. On leaving it has
        the trained weights again, plus the update that was made inside.

        Args:
            loss: the objective's at the trained weights; its graph is freed.
        """
        return nullcontext()

    def end_epoch(self, epoch: int, images: Callable[[], Iterator[Tensor]]) -> None:
        """Called after the last step of ``epoch`` (zero-based), before validation.

        Args:
            images: gives one pass over the training images as they are, batches [b, c, h, w], of which each
                process gets its share.
        """

    @property
    def prediction(self) -> nn.Module:
        """The network that is validated, selected and written."""
        return self.net


WEIGHTS: Registry[type[WeightRule]] = Registry("weights")
"""Every weight rule by the name of its class."""


@WEIGHTS.register("Plain")
class Plain(WeightRule):
    """The trained weights, no averaging."""
