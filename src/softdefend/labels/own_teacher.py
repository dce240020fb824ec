"""Label rules whose teacher is an average of the network that is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from softdefend.core.rule import RunInfo
from softdefend.execution.average import NetworkAverage
from softdefend.labels.base import LabelRule


class OwnTeacher(LabelRule):
    """Keeps an average of the network over its training, which predicts in eval mode.

    Attributes:
        teacher: the average.
    """

    extra_units = 1.0

    def setup(self, run: RunInfo) -> None:
        super().setup(run)
        assert run.net is not None
        self._average = NetworkAverage(run.net)
        self.teacher = self._average.net
        self._forward = run.forward(self.teacher)
        self._cached: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def logits(self, image: Tensor) -> Tensor:
        """The teacher's logits of a batch, from one forward a step: a step asks for them more than once."""
        if self._cached is None or self._cached[0] is not image:
            self._cached = image, self._forward(image)
        return self._cached[1]

    def follow(self, decay: float) -> None:
        """After a step: average with weight ``decay`` of the old values; 0 copies the trained network."""
        self._cached = None
        self._average.move(decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._cached = None
        self.teacher.load_state_dict({name.removeprefix("teacher."): value for name, value in state.items()})
