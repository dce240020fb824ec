"""Networks from outside the package: timm's, and the user's own ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import Any

from torch import nn

from softdefend.core.errors import SettingError


def from_timm(name: str, num_classes: int, in_channels: int) -> nn.Module:
    """Make a network by ``timm.create_model``, with fresh weights and logits of length ``num_classes``.

    Raises:
        SettingError: timm is not installed, or knows no such model.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        accepted = "a built-in network, or install timm: pip install 'softdefend[timm]'"
        raise SettingError("net.name", f"timm:{name} without timm", accepted) from error
    try:
        net: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=num_classes, in_chans=in_channels
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise SettingError(
            "net.name", f"timm:{name} ({error})", "timm:NAME with a NAME timm can build"
        ) from error
    return net


def from_user(path: str, num_classes: int, in_channels: int) -> nn.Module:
    """Make a network by the user's factory, written ``package.module:function``.

    The module is looked for in the working directory too. ``num_classes`` and ``in_channels`` are passed as
    keywords as far as the function accepts them.

    Raises:
        SettingError: no such module or function, a function that asks for other arguments, or a result that
            is not an ``nn.Module``; an error inside the user's code, with its file and line.
    """
    factory = _find(path)
    offered = {"num_classes": num_classes, "in_channels": in_channels}
    keywords = _keywords(path, factory, offered)
    try:
        net = factory(**keywords)
    except Exception as error:
        raise SettingError(
            "net.name", f"{path}, which raised {_describe(error)}", "a function that runs"
        ) from error
    if not isinstance(net, nn.Module):
        given = f"{path}, which returned {type(net).__name__}"
        raise SettingError("net.name", given, "a function that returns a torch.nn.Module")
    return net


def _describe(error: Exception) -> str:
    """What an error says, and where it was raised."""
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {text}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({last.filename}, line {last.lineno})"


def _find(path: str) -> Callable[..., Any]:
    module_name, _, function_name = path.partition(":")
    accepted = "package.module:function, importable from here"
    if not module_name or module_name.startswith(".") or not function_name:
        raise SettingError("net.name", path, accepted)
    sys.path.insert(0, "")
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingError("net.name", f"{path} ({error})", accepted) from error
    except Exception as error:
        raise SettingError(
            "net.name", f"{path}, whose import raised {_describe(error)}", "a module that can be imported"
        ) from error
    finally:
        sys.path.remove("")
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        problem = "is not callable" if hasattr(module, function_name) else "does not exist"
        raise SettingError("net.name", f"{path}: {function_name} {problem}", accepted)
    return function


def _keywords(path: str, factory: Callable[..., Any], offered: dict[str, int]) -> dict[str, int]:
    """Those of the offered keywords that the factory takes."""
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some functions written in C have no signature to read
        return {}
    parameters = signature.parameters.values()
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    arguments = {name: value for name, value in offered.items() if everything or name in by_keyword}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        accepted = "a function whose only required arguments are num_classes and in_channels"
        raise SettingError("net.name", f"{path}{signature} ({error})", accepted) from error
    return arguments
