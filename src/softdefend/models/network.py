"""What may be given as a network from Python."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from softdefend.core.errors import SettingError
from softdefend.core.tensors import unusual_form


class FunctionNetwork(nn.Module):
    """A function of images as a network. The modules that it is seen to use become its own, so that they are
    put into eval mode and moved to the device with it.

    Args:
        function: images [b, c, h, w] to logits [b, k].
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.used = nn.ModuleList(dict.fromkeys(_modules_of(function)))

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b,c,h,w] -> logits [b,k]."""
        logits: Tensor = self.function(image)
        return logits


def as_network(net: object) -> nn.Module:
    """A module as it is, and any other function of images as a :class:`FunctionNetwork`.

    Raises:
        SettingError: a class, a state dict, or something that cannot be called.
    """
    if isinstance(net, nn.Module):
        return net if hasattr(net, "training") else FunctionNetwork(net.forward)  # frozen TorchScript
    if isinstance(net, type):
        raise SettingError("net", f"the class {net.__name__}", f"an object of it, as {net.__name__}()")
    if isinstance(net, Mapping):
        accepted = "the network itself, after net.load_state_dict(weights)"
        raise SettingError("net", f"a {type(net).__name__}, perhaps of weights", accepted)
    if not callable(net):
        given = repr(net) if isinstance(net, (str, int, float, type(None))) else f"a {type(net).__name__}"
        raise SettingError("net", given, "a torch.nn.Module, or a function of images [b, c, h, w]")
    owner = getattr(net, "__self__", None)
    if isinstance(owner, nn.Module) and net in (owner.forward, owner.__call__):
        return as_network(owner)
    return FunctionNetwork(net)


def _modules_of(function: object, depth: int = 2) -> Iterator[nn.Module]:
    """The modules in a function's variables, in an object's attributes, and in those of what they call."""
    if isinstance(function, nn.Module):
        if hasattr(function, "training"):
            yield function
        return
    found: list[Any] = []
    if isinstance(function, functools.partial):
        found += [function.func, *function.args, *function.keywords.values()]
    elif inspect.ismethod(function):
        found += [function.__self__, function.__func__]
    elif inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        found += [*variables.nonlocals.values(), *variables.globals.values()]
    elif not isinstance(function, type):
        found += list(getattr(function, "__dict__", {}).values())
    for one in found if depth else ():
        if isinstance(one, (list, tuple)):
            yield from (module for module in one if isinstance(module, nn.Module))
        elif not inspect.ismodule(one):
            yield from _modules_of(one, depth - 1)


def check_parameters(net: nn.Module) -> None:
    """Refuse parameters and buffers that cannot be computed with: without values, sparse, of inference mode;
    and modules without a mode.

    Raises:
        SettingError: naming the first.
    """
    for name, module in net.named_modules():
        if not hasattr(module, "training"):
            given = f"a network whose {name} is frozen TorchScript" if name else "frozen TorchScript"
            raise SettingError("net", given, "the module it was made from")
    accepted = "a network whose parameters and buffers are plain tensors"
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if is_lazy(tensor):
            continue  # made at the first forward
        if form := unusual_form(tensor):
            raise SettingError("net", f"a network whose {name} is {form}", accepted)
        if tensor.is_inference():
            given = f"a network whose {name} was made in inference mode"
            raise SettingError("net", given, f"{accepted}, made outside of torch.inference_mode()")


def check_state(net: nn.Module) -> None:
    """Refuse a network whose state no file of weights can hold.

    Raises:
        SettingError: naming the first entry that is no tensor, such as one from ``get_extra_state``.
    """
    for name, value in net.state_dict().items():
        if not isinstance(value, Tensor):
            given = f"a network whose state has {name}, a {type(value).__name__}"
            accepted = "a network whose state_dict() holds tensors (no get_extra_state)"
            raise SettingError("net", given, accepted)
