"""Per-channel normalization as the first layer of a network, so that attacks work on pixels."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softdefend.core.errors import SettingError
from softdefend.core.hints import check_type
from softdefend.models.logits import in_eval_mode

_SAME = 0.01
"""Scales and shifts that differ by less are of one normalization."""
_EXACT = 1e-4
"""Largest deviation from a straight line, in units of its values."""


class Normalize(nn.Module):
    """``(image - mean) / std`` per channel.

    The statistics are persistent buffers: they are saved with the weights, so that a network read from a
    file cannot be run on pixels of the wrong scale, and they are never trained.

    Args:
        mean, std: one number per channel, in units of pixels in [0, 1].

    Raises:
        SettingError: the two differ in length or are empty, a number is not finite, a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = _numbers("mean", mean), _numbers("std", std)
        if not mean or len(mean) != len(std):
            given = f"{len(mean)} means and {len(std)} standard deviations"
            raise SettingError("normalization", given, "one mean and one standard deviation per channel")
        if not all(math.isfinite(value) for value in mean):
            raise SettingError("normalization mean", mean, "finite numbers")
        if not all(math.isfinite(value) and value > 0 for value in std):
            accepted = "positive finite numbers (a channel that never varies has std 0: use 1 for it)"
            raise SettingError("normalization std", std, accepted)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b,c,h,w] in [0, 1] -> the same shape, about zero mean and unit variance."""
        return (image - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def _numbers(name: str, values: Iterable[float]) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        given = f"a {type(values).__name__}, no list of numbers"
        raise SettingError(f"normalization {name}", given, "one number per channel, as [0.5]") from error


def normalize(net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """Put :class:`Normalize` before ``net``; the two layers are named ``normalize`` and ``net``.

    Args:
        net: takes normalized images [b, c, h, w].
        mean, std: one number per channel, in units of pixels in [0, 1].

    Returns:
        A network that takes pixels in [0, 1].

    Raises:
        SettingError: no network, or statistics that :class:`Normalize` refuses.
    """
    check_type("net", net, nn.Module)
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), net=net))


def stands_in_front(weights: Iterable[str], net: nn.Module) -> bool:
    """Whether weights by these names are those of :func:`normalize` around ``net``, not of ``net`` itself."""
    statistics = [f"normalize.{name}" for name in ("mean", "std")]
    return set(weights) == {*statistics, *(f"net.{name}" for name in net.state_dict())}


def find_normalizations(net: nn.Module, image: Tensor) -> list[tuple[list[float], list[float]]]:
    """Per-channel normalizations that an image passes, one after another, before the first trained layer.

    Looked at is what the network does, whatever its layers are called: the input and output of each module up
    to the first with trained weights are compared with the image. A normalization is given by the mean it
    subtracts and the number it divides by, each from the image on: two entries are a network that normalizes
    twice. TorchScript hides its modules; nothing is found there.

    Args:
        net: images to logits; one forward is made, in eval mode and without gradient.
        image: [b, c, h, w].
    """
    found: list[tuple[Tensor, Tensor]] = []
    reached = False

    def look(value: object) -> None:
        line = _line(image, value)
        if line is not None and not any(_close(line, other) for other in [_identity(image), *found]):
            found.append(line)

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal reached
        if not reached:
            look(inputs[0] if inputs else None)
        reached = reached or any(weight.requires_grad for weight in module.parameters(recurse=False))

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not reached:
            look(output)

    net = getattr(net, "_orig_mod", net)  # torch.compile would compile again for the hooks
    with in_eval_mode(net), torch.no_grad():
        _with_hooks(net, before, after, lambda: net(image.clone()))
    return [((-shift / scale).tolist(), (1 / scale).tolist()) for scale, shift in found]


def _with_hooks(
    net: nn.Module, before: Callable[..., None], after: Callable[..., None], run: Callable[[], object]
) -> None:
    handles: list[RemovableHandle] = []
    try:
        for module in net.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        run()
    finally:
        for handle in handles:
            handle.remove()


def _line(image: Tensor, value: object) -> tuple[Tensor, Tensor] | None:
    """Scale and shift [c] that make ``value`` of the image, channel by channel; None where none do."""
    if not isinstance(value, Tensor) or value.numel() != image.numel() or len(value) != len(image):
        return None
    x, y = (t.detach().double().reshape(image.shape).transpose(0, 1).flatten(1) for t in (image, value))
    centered = x - x.mean(1, keepdim=True)
    spread = centered.square().sum(1)
    scale = (centered * y).sum(1) / spread
    shift = y.mean(1) - scale * x.mean(1)
    off = (y - scale[:, None] * x - shift[:, None]).abs().amax(1)
    good = (off <= _EXACT * y.abs().amax(1)) & (scale.abs() > _EXACT)  # NaN, of an even image, is neither
    return (scale, shift) if bool(good.all()) else None


def _identity(image: Tensor) -> tuple[Tensor, Tensor]:
    ones = torch.ones(image.shape[1], dtype=torch.float64, device=image.device)
    return ones, torch.zeros_like(ones)


def _close(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    (scale, shift), (its_scale, its_shift) = one, other
    return bool(((scale - its_scale).abs() <= _SAME * its_scale.abs()).all()) and bool(
        ((shift - its_shift).abs() <= _SAME).all()
    )
