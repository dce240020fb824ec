"""A second set of batch normalization for a network, put in the place of its own for some forwards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SecondNorms(nn.Module):
    """Weights and statistics of batch normalization beside a network's own, at first equal to them.

    The network's layers stay what they are, so its weights on disk, its copies and its averages know nothing
    of the second set. Modes and frozen parameters are those of the network's layers.

    Args:
        net: the network; layers of TorchScript keep their own.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        own = [module for module in net.modules() if isinstance(module, _BatchNorm)]
        self.layers = nn.ModuleList(copy.deepcopy(own))
        self._pairs = list(zip(own, list(self.layers), strict=True))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the network normalizes with the second set. Only pointers change."""
        before = [(dict(own._parameters), dict(own._buffers)) for own, _ in self._pairs]
        for own, second in self._pairs:
            for name, weight in second._parameters.items():
                mine = own._parameters[name]
                if weight is not None and mine is not None:
                    # As the attack freezes the network's own; its graph would hold these otherwise.
                    own._parameters[name] = weight if mine.requires_grad else _without_gradient(weight)
            own._buffers.update(second._buffers)
        try:
            yield
        finally:
            for (own, _), (parameters, buffers) in zip(self._pairs, before, strict=True):
                own._parameters.update(parameters)
                own._buffers.update(buffers)

    def tensors(self) -> dict[str, Tensor]:
        """The live weights and statistics, without gradient."""
        return {name: value.detach() for name, value in self.state_dict(keep_vars=True).items()}


def _without_gradient(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)
