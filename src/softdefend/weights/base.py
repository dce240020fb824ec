"""What a weight rule is: the answer to 'at which weights?'"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from softdefend.core.registry import Registry
from softdefend.core.rule import Rule, RunInfo


class WeightRule(Rule):
    """Chooses the weights at which the gradient is taken, and those that predict. This base is the plain
    rule: the trained weights themselves, for both."""

    passes: int = 1
    """Updates' worth of forwards and gradients that a step costs: two where weights are perturbed."""
    net: nn.Module

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        assert run.net is not None
        self.net = run.net

    def perturbs(self, phase: str) -> bool:
        """Whether the gradient is taken elsewhere than at the trained weights in this phase."""
        return False

    def perturbed(self, loss: Tensor) -> AbstractContextManager[None]:
        """The network at the weights where the gradient is to be taken; on leaving, back at the trained
        ones plus whatever update was made inside.

        Args:
            loss: the objective's at the trained weights, with its graph, which is used up.
        """
        return nullcontext()

    def end_epoch(self, epoch: int, images: Callable[[], Iterator[Tensor]]) -> None:
        """Called after the last step of ``epoch`` (zero-based), before validation.

        Args:
            images: gives one pass over the training images as they are, batches [b, c, h, w].
        """

    @property
    def prediction(self) -> nn.Module:
        """The network that validation, selection and release use."""
        return self.net


WEIGHTS: Registry[type[WeightRule]] = Registry("weights")
"""Every weight rule by the name of its class."""


@WEIGHTS.register("Plain")
class Plain(WeightRule):
    """The trained weights, no averaging."""
