"""A reader of arrays, lists and strings in a pickle that runs nothing that the pickle names."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from softdefend.core.errors import SettingError

_PLAIN_CODE = re.compile(r"[biuf][1248]")


def load(path: Path) -> dict[str, object]:
    """Read the dictionary in a pickle of Python 2 or 3; keys are strings, arrays numpy arrays.

    Only the globals with which numpy arrays are pickled are admitted, and even these are not numpy's own
    functions but the stand-ins below, which build an array from a type code, a shape and bytes or fail. So a
    pickle can neither name code nor reach an object that has any.

    Raises:
        SettingError: naming the refused global, or saying why the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a dictionary")
        return {_text(key): _value(value) for key, value in content.items()}
    except SettingError as error:
        raise SettingError("data.source", f"{path} with {error.given}", error.accepted) from None
    except Exception as error:  # a damaged pickle makes the machine fail in any way
        raise SettingError(
            "data.source", f"{path} ({error or type(error).__name__})", "an intact pickle of arrays"
        ) from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        admitted = _ADMITTED.get((module, name))
        if admitted is None:
            raise _refused(f"the global {module}.{name}")
        return admitted

    def persistent_load(self, pid: object) -> object:
        raise _refused("a persistent id")


class _Function:
    """A callable without attributes, so that a pickle that "restores its state" cannot change it."""

    __slots__ = ("_call",)
    _call: Callable[..., object]

    def __init__(self, call: Callable[..., object]) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: object) -> None:
        raise _refused("a changed function")

    def __call__(self, *args: object) -> object:
        return self._call(*args)


class _Dtype:
    """numpy.dtype(code, align, copy), for booleans, integers and floats only."""

    __slots__ = ("value",)

    def __init__(self, code: object) -> None:
        text = _text(code)
        if not _PLAIN_CODE.fullmatch(text):
            raise _refused(f"an array of type {text!r}")
        self.value = np.dtype(text)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.value = self.value.newbyteorder(">" if _text(state[1]) == ">" else "<")


class _Array:
    """numpy.ndarray, empty until its state is set."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _version, shape, dtype, column_major, data = state
        self.value = _array(data, dtype, shape, "F" if column_major else "C")


def _array(data: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if (
        not isinstance(data, bytes | bytearray)
        or not isinstance(dtype, _Dtype)
        or not isinstance(shape, tuple)
    ):
        raise _refused("an array that does not consist of bytes")
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if _text(order) == "F" else "C")


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.value = _array(data, dtype, shape, order)
    return array


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind is not _NDARRAY:
        raise _refused("an array of a foreign class")
    return _Array()


def _encode(text: object, encoding: object) -> bytes:
    """_codecs.encode, the way in which Python 3 writes byte strings for Python 2."""
    if _text(encoding) not in ("latin1", "latin-1"):
        raise _refused(f"the encoding {_text(encoding)}")
    return _text(text).encode("latin-1")


def _no_call(*args: object) -> object:
    raise _refused("a call of numpy.ndarray")


_NDARRAY = _Function(_no_call)
_BUILTINS = {"list": list, "dict": dict, "bytes": bytes, "str": str, "int": int}
_ADMITTED: dict[tuple[str, str], object] = {
    ("_codecs", "encode"): _Function(_encode),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Function(lambda code, *flags: _Dtype(code)),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Function(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Function(_from_buffer) for core in ("core", "_core")},
    **{(module, name): kind for module in ("builtins", "__builtin__") for name, kind in _BUILTINS.items()},
}


def _refused(what: str) -> SettingError:
    return SettingError("data.source", what, "arrays, lists, strings and numbers only; nothing was executed")


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, str):
        return value
    raise TypeError(f"a {type(value).__name__} where text is expected")


def _value(value: object) -> object:
    return value.value if isinstance(value, _Array | _Dtype) else value
