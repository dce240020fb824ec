"""Functions of the user's own, by the name ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from softdefend.core.errors import SettingError


def find_function(setting: str, path: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names; the module is looked for in the working directory
    too.

    Args:
        setting: what the user knows the name by.
        path: the name.

    Raises:
        SettingError: no such module or function, or a module whose import fails, with file and line.
    """
    module_name, _, function_name = path.partition(":")
    accepted = "package.module:function, importable from here"
    if not module_name or module_name.startswith(".") or not function_name:
        raise SettingError(setting, path, accepted)
    sys.path.insert(0, "")
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingError(setting, f"{path} ({error})", accepted) from error
    except (Exception, SystemExit) as error:
        raise SettingError(
            setting, f"{path}, whose import raised {describe_raised(error)}", "a module that can be imported"
        ) from error
    finally:
        sys.path.remove("")
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        problem = "is not callable" if hasattr(module, function_name) else "does not exist"
        raise SettingError(setting, f"{path}: {function_name} {problem}", accepted)
    return function


def describe_raised(error: BaseException) -> str:
    """What an error of the user's code says, and where it was raised."""
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {text}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({last.filename}, line {last.lineno})"
