"""A reader of arrays, lists and strings in a pickle that runs nothing that the pickle names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from softdefend.core.errors import SettingError
from softdefend.core.files import read_bytes
from softdefend.core.pickles import read_pickle

_LARGEST = 2**30
"""Bytes of a file; those of CIFAR have at most 155 million."""
_LONGEST_NAME = 4096
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
        data = read_bytes(path, _LARGEST)
        content, _ = read_pickle(data, _Arrays(len(data)))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a dictionary")
        return {_text(key): _value(value) for key, value in content.items()}
    except SettingError as error:
        raise SettingError("data.source", f"{path} with {error.given}", error.accepted) from None
    except (OSError, TypeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError("data.source", f"{path} ({reason})", "an intact pickle of arrays") from None


class _Arrays:
    """The world of a pickle of ``size`` bytes that holds numpy arrays."""

    def __init__(self, size: int) -> None:
        self._to_encode = size

    def find(self, module: str, name: str) -> object:
        if (module, name) == ("_codecs", "encode"):
            return _Function(self._encode)
        admitted = _ADMITTED.get((module, name))
        if admitted is None:
            raise _refused(f"the global {module}.{name}")
        return admitted

    def call(self, function: object, arguments: tuple[Any, ...]) -> object:
        if not isinstance(function, _Function):
            raise _refused("a call of what is no function")
        return function.call(*arguments)

    def build(self, item: object, state: object) -> None:
        if not isinstance(item, _Dtype | _Array):
            raise _refused("a changed function or type")
        item.set_state(state)

    def persistent(self, name: object) -> object:
        raise _refused("a persistent id")

    def _encode(self, text: object, encoding: object) -> bytes:
        """_codecs.encode, the way in which Python 3 writes byte strings for Python 2."""
        if _text(encoding) not in ("latin1", "latin-1"):
            raise _refused(f"the encoding {_text(encoding)}")
        if not isinstance(text, str):
            raise TypeError("an encoding of what is no text")
        self._to_encode -= len(text)
        if self._to_encode < 0:  # each text is encoded once, and takes its length in the file
            raise _refused("one text encoded many times")
        return text.encode("latin-1")


class _Function:
    """What a pickle may call."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self.call = call


class _Dtype:
    """numpy.dtype(code, align, copy), for booleans, integers and floats only."""

    __slots__ = ("value",)

    def __init__(self, code: object) -> None:
        text = _text(code)
        if not _PLAIN_CODE.fullmatch(text):
            raise _refused(f"an array of type {text!r}")
        self.value = np.dtype(text)

    def set_state(self, state: Any) -> None:
        self.value = self.value.newbyteorder(">" if _text(state[1]) == ">" else "<")


class _Array:
    """numpy.ndarray, empty until its state is set."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = np.empty(0, np.uint8)

    def set_state(self, state: Any) -> None:
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


def _no_call(*args: object) -> object:
    raise _refused("a call of numpy.ndarray")


_NDARRAY = _Function(_no_call)
_ADMITTED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Function(lambda code, *flags: _Dtype(code)),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Function(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Function(_from_buffer) for core in ("core", "_core")},
    # Python 3 writes an empty byte string for Python 2 as a call without arguments.
    **{(module, "bytes"): _Function(lambda: b"") for module in ("builtins", "__builtin__")},
}


def _refused(what: str) -> SettingError:
    return SettingError("data.source", what, "arrays, lists, strings and numbers only; nothing was executed")


def _text(value: object) -> str:
    """A name or code, which Python 2 wrote as bytes."""
    if isinstance(value, bytes | str) and len(value) > _LONGEST_NAME:
        raise ValueError("a text longer than any name")
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, str):
        return value
    raise TypeError(f"a {type(value).__name__} where text is expected")


def _value(value: object) -> object:
    return value.value if isinstance(value, _Array | _Dtype) else value
