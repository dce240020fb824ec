"""An average of the network that is trained, as its own teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softdefend.execution.network_mode import frozen_copy


class OwnAverage:
    """A frozen copy of a network in eval mode that follows its weights and buffers.

    Args:
        live: the network that is trained. It changes in place.
    """

    def __init__(self, live: nn.Module) -> None:
        self.net = frozen_copy(live)
        # Everything in a network changes in place, so its tensors can be looked up once.
        # A tensor that stands under two names is averaged once.
        named = zip(self.net.state_dict().values(), live.state_dict().values(), strict=True)
        pairs = list({(ours.data_ptr(), ours.shape): (ours, now) for ours, now in named}.values())
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Average with weight ``decay`` of the old values; 0 copies the live ones."""
        averages, live = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, live, 1 - decay)
        for count, now in self._copied:  # batches that BatchNorm has seen
            count.copy_(now)

    def state_dict(self) -> dict[str, Tensor]:
        """Live tensors, by names that no other part of a rule's state has."""
        return {f"teacher.{name}": value for name, value in self.net.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` gave, in place."""
        self.net.load_state_dict({name.removeprefix("teacher."): value for name, value in state.items()})
