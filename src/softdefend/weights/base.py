"""What a weight rule is: the answer to 'at which weights?'"""

from __future__ import annotations

from torch import nn


class WeightRule:
    """Chooses the weights that predict. This base is the plain rule: the trained weights themselves."""

    def setup(self, net: nn.Module) -> None:
        """Called once before training, and before a resume's ``load_state_dict``."""
        self.net = net

    def after_step(self) -> None:
        """Called after every update of the network."""

    @property
    def prediction(self) -> nn.Module:
        """The network that validation, selection and release use."""
        return self.net

    def state_dict(self) -> dict[str, object]:
        """Everything that must survive a crash, besides the network itself."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take back what :meth:`state_dict` gave, in place."""


class Plain(WeightRule):
    """The trained weights, no averaging."""
