"""Networks to attack in place of one whose gradients mislead (Athalye et al., arXiv 1802.00420)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softdefend.attacks.losses import described
from softdefend.core.errors import SettingError, did_you_mean

Backward = Literal["identity"] | Callable[[Tensor], Tensor]
"""What stands in for a layer, or a whole network, in the backward pass: a differentiable function of its
input, or the identity."""


def adapt(
    net: nn.Module,
    *,
    backward: Mapping[str, Backward] | Callable[[Tensor], Tensor] | None = None,
    eot: int = 1,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> nn.Module:
    """A network that answers as ``net`` does, and whose gradients an attack can use.

    Any attack takes it, and ``Transfer(adapt(net, ...), attack)`` attacks it while ``net`` is judged. The
    parameters are those of ``net`` itself, shared.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k].
        backward: backward pass differentiable approximation. By layer name (as in ``net.named_modules()``)
            what stands in for the layer in the backward pass, as a function of its first argument that
            returns a tensor of the layer's shape; or one function [b, c, h, w] -> [b, k] for the whole
            network. Forward passes change in no bit.
        eot: forwards whose logits are averaged in every call, >= 1, for networks that draw random numbers
            (expectation over transformation). An attack counts such a call as one.
        transform: a function of the user's that draws random numbers, [b, c, h, w] -> [b, c, h, w]; every
            one of the ``eot`` forwards sees the images through it.

    Raises:
        SettingError: an unknown layer, something that is no function, fewer than one forward.
    """
    if not isinstance(net, nn.Module):
        raise SettingError("net", f"a {type(net).__name__}", "a torch.nn.Module")
    if isinstance(eot, bool) or not isinstance(eot, int) or eot < 1:
        raise SettingError("eot", repr(eot), "a whole number >= 1")
    if transform is not None and not callable(transform):
        raise SettingError("transform", f"a {type(transform).__name__}", "a function of images")
    shared = {id(t): t for t in itertools.chain(net.parameters(), net.buffers())}
    made = copy.deepcopy(net, shared)
    if isinstance(backward, Mapping):
        _replace_layers(made, backward)
    elif backward is not None:
        made.forward = _Replaced("net", made.forward, _function("backward", backward))
    return Adapted(made, eot, transform).train(net.training)


class Adapted(nn.Module):
    """What :func:`adapt` returns."""

    def __init__(self, net: nn.Module, eot: int, transform: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.net, self.eot, self.transform = net, eot, transform

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b, c, h, w] -> logits [b, k]."""
        logits = self._once(image)
        for _ in range(self.eot - 1):
            logits = logits + self._once(image)
        return logits if self.eot == 1 else logits / self.eot

    def _once(self, image: Tensor) -> Tensor:
        if self.transform is not None:
            seen: Any = self.transform(image)
            if not isinstance(seen, Tensor) or seen.shape[:1] != image.shape[:1]:
                given = f"a function that returns {described(seen)}"
                raise SettingError("transform", given, f"one of as many images, {list(image.shape)}")
            image = seen
        logits: Tensor = self.net(image)
        return logits


def _replace_layers(net: nn.Module, backward: Mapping[str, Backward]) -> None:
    layers = {name: layer for name, layer in net.named_modules(remove_duplicate=False) if name}
    for name, stand_in in backward.items():
        if name not in layers:
            known = ", ".join(layers) or "none: give a function for the whole network"
            raise SettingError("backward", repr(name), known + did_you_mean(str(name), list(layers)))
        layer, function = layers[name], _function(f"backward[{name!r}]", stand_in)
        layer.forward = _Replaced(name, layer.forward, function)


def _function(setting: str, backward: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(backward, str) and backward == "identity":
        return nn.Identity()
    if not callable(backward):
        raise SettingError(setting, repr(backward), "identity, or a differentiable function of the input")
    function: Callable[[Tensor], Tensor] = backward
    return function


class _Replaced:
    """The forward of a layer, with another function's gradient.

    In place of ``forward`` of the layer itself: the network's structure, and a layer that stands in it twice,
    stay as they are.
    """

    def __init__(self, name: str, forward: Callable[..., Any], backward: Callable[[Tensor], Tensor]) -> None:
        self.name, self.forward, self.backward = name, forward, backward

    def __call__(self, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        with torch.no_grad():
            # A copy: layers that work in place would change what the stand-in sees.
            result = self.forward(value.detach().clone(), *rest, **named)
        if not isinstance(result, Tensor):
            given = f"a layer that returns {described(result)}"
            raise SettingError(f"backward[{self.name!r}]", given, "one that returns a tensor")
        if not torch.is_grad_enabled():
            return result
        smooth: Any = self.backward(value)
        if not isinstance(smooth, Tensor) or smooth.shape != result.shape:
            given = f"a function that returns {described(smooth)}"
            raise SettingError(f"backward[{self.name!r}]", given, f"the layer's shape {list(result.shape)}")
        replaced: Tensor = _WithGradientOf.apply(result, smooth)  # type: ignore[no-untyped-call]
        return replaced


class _WithGradientOf(torch.autograd.Function):
    """The first argument in the forward pass, the second in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, smooth: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]
