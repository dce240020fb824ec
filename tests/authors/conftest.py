"""What makes two programs draw and round alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import beside


@pytest.fixture
def exact_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    """The network of these runs, computing in double precision, and ours with all that follows its logits.

    TRADES' divergence has hardly any gradient near the image: in float32 two forms of it round to different
    signs, and steps along the sign soon go apart. Where nothing is rounded, a difference is one of method.
    """
    single = beside.network

    def network() -> nn.Module:
        net = single().double()
        net.register_forward_pre_hook(lambda _, given: (given[0].double(),))
        return net

    def not_narrower(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else single_precision(tensor)

    single_precision = Tensor.float
    monkeypatch.setattr(beside, "network", network)
    monkeypatch.setattr(Tensor, "float", not_narrower)
    return network


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Called between our run and theirs: their normal noise is then ours, in the order of drawing and to the
    last of it. Before scaling, so that a start of another size is seen."""
    draw, drawn = torch.randn, []

    def keep(*args: object, **kwargs: object) -> Tensor:
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn", keep)
    again = iter(drawn)
    yield lambda: monkeypatch.setattr(torch, "randn", lambda shape: next(again))
    assert drawn
    assert next(again, None) is None


@pytest.fixture
def echo_uniform(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Like ``echo`` for noise that is uniform in a ball: ours of [0, 1), which they stretch to their bounds.
    With ``channels`` they draw one channel after the other."""
    draw, drawn = torch.rand, []

    def keep(*args: object, **kwargs: object) -> Tensor:
        value = draw(*args, **kwargs)
        if "generator" in kwargs:  # the images of the run are drawn without
            drawn.append(value)
        return value

    monkeypatch.setattr(torch, "rand", keep)
    left: list[Tensor] = []

    def begin(channels: bool = False) -> None:
        assert drawn
        left.extend(part for value in drawn for part in (value.unbind(1) if channels else (value,)))

        def spread(self: Tensor, low: float, high: float) -> Tensor:
            assert low == -high
            return self.copy_((2 * left.pop(0) - 1) * high)

        monkeypatch.setattr(torch, "rand", draw)
        monkeypatch.setattr(Tensor, "uniform_", spread)

    yield begin
    assert not left
