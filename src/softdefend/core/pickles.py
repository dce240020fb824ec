"""A reader of pickles that runs nothing of itself, in time and memory that the pickle's own bytes bound.

The readers of the standard library make a memo as long as a pickle says, and hash and copy what it nests for
ever. Here each operation and each value costs bytes of the pickle.
"""

from __future__ import annotations

import codecs
import mmap
import struct
from collections.abc import Callable
from typing import Any, Protocol

from softdefend.core.errors import SettingError

MOST_STEPS = 1_000_000
"""Operations that a pickle may have, and values in the arguments of its calls. Weights have some thousand
operations, CIFAR-100 has 300,000; so many take about a second."""

_MOST_DEEP = 50
_LONGEST_KEY = 4096
_LONGEST_INTEGER = 1024


class PickleError(ValueError):
    """A pickle that is damaged, or asks for more than plain data."""


class BoundsError(PickleError):
    """A pickle or archive that would take more time or memory than its bytes are worth."""


class UnreadableError(PickleError):
    """A pickle that ends too early, or has an operation that plain data do not need."""


class World(Protocol):
    """What a pickle's names stand for. Every method refuses what it does not want by raising an error."""

    def find(self, module: str, name: str) -> object:
        """What stands for a global name."""

    def call(self, function: object, arguments: tuple[Any, ...]) -> object:
        """What a call returns of something that the pickle has from here."""

    def build(self, item: object, state: object) -> None:
        """Give an object its state."""

    def persistent(self, name: object) -> object:
        """What stands outside of the pickle under a name."""


def read_pickle(data: bytes | mmap.mmap, world: World, start: int = 0) -> tuple[Any, int]:
    """The value of a pickle, and where it ends.

    Python 2's strings come as bytes.

    Args:
        data: holds the pickle from ``start`` on.
        world: makes what is neither plain value nor list, tuple or dictionary.
        start: of the pickle.

    Raises:
        BoundsError: it is too long, or nested too often.
        UnreadableError: it ends too early, or has an operation that plain data do not need.
        PickleError: it is damaged otherwise.
        SettingError: ``world`` raised it.
    """
    machine = _Machine(data, world, start)
    try:
        value = machine.run()
        _check_depth(value)
        return value, machine.at
    except (PickleError, SettingError):
        raise
    except IndexError:
        raise UnreadableError("it ends too early") from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise PickleError(f"{type(error).__name__}: {error}") from None


class _Machine:
    def __init__(self, data: bytes | mmap.mmap, world: World, start: int) -> None:
        self.data, self.world, self.at = data, world, start
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        """What the stack was at each open mark."""
        self.memo: dict[int, Any] = {}
        self.looked_at = 0

    def run(self) -> Any:
        for _ in range(MOST_STEPS):
            code = self.data[self.at]
            self.at += 1
            if code == ord("."):
                return self.stack.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise UnreadableError(f"the operation {chr(code)!r}, which plain data do not need")
            operation(self)
        raise BoundsError(f"more than {MOST_STEPS} operations")

    # --- bytes ---------------------------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count] if count >= 0 else b""
        if len(part) != count:
            raise IndexError
        self.at += count
        return part

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        text = self.take(end - self.at)
        self.at += 1
        return text

    def integer(self, size: int) -> int:
        if size > _LONGEST_INTEGER:
            raise BoundsError(f"an integer of {size} bytes")
        return int.from_bytes(self.take(size), "little", signed=True)

    # --- values --------------------------------------------------------------------------------------------

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def open_mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError(f"items for a {type(target).__name__}")
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TypeError(f"named items for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            target[key] = value

    def remember(self, index: int) -> None:
        if not 0 <= index <= MOST_STEPS:
            raise BoundsError(f"a memo of {index} entries")
        self.memo[index] = self.stack[-1]

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(arguments, tuple):
            raise TypeError(f"arguments that are a {type(arguments).__name__}")
        self.look_at(arguments)
        self.stack.append(self.world.call(function, arguments))

    def build(self) -> None:
        (state,) = self.pop(1)
        self.look_at(state)
        self.world.build(self.stack[-1], state)

    def look_at(self, value: object) -> None:
        """Refuse what is nested so often that to hash, copy or compare it would take for ever."""
        pending = [(value, 0)]
        while pending:
            item, depth = pending.pop()
            if isinstance(item, tuple | list | dict):
                inner = [*item, *item.values()] if isinstance(item, dict) else item
                self.looked_at += len(inner)
                if depth > _MOST_DEEP or self.looked_at > MOST_STEPS:
                    raise BoundsError("values that are nested too often")
                pending += [(one, depth + 1) for one in inner]


def _check_depth(value: object) -> None:
    """Refuse a value so deep that others would fall over it; nothing is looked through twice."""
    level: list[Any] = [value]
    seen = set[int]()
    for _ in range(_MOST_DEEP):
        held = {id(item): item for item in level if isinstance(item, tuple | list | dict)}
        fresh = [item for key, item in held.items() if key not in seen]
        if not fresh:
            return
        seen.update(held)
        level = [one for item in fresh for one in (item.values() if isinstance(item, dict) else item)]
    raise BoundsError(f"values nested more than {_MOST_DEEP} deep")


def _check_key(key: object) -> None:
    """Refuse a key that takes long to hash or compare; it may come many times."""
    parts = key if isinstance(key, tuple) else (key,)
    lengths = [len(part) for part in parts if isinstance(part, str | bytes)]
    if len(parts) > 16 or max(lengths, default=0) > _LONGEST_KEY:
        raise BoundsError("a key longer than any name")
    if any(isinstance(part, tuple) for part in parts):
        raise BoundsError("a key of nested tuples")


def _text_integer(line: bytes) -> int | bool:
    return line == b"01" if line in (b"00", b"01") else int(line.removesuffix(b"L"))


def _text_string(line: bytes) -> bytes:
    if len(line) < 2 or line[:1] not in (b'"', b"'") or line[-1:] != line[:1]:
        raise PickleError("a string without quotes")
    return codecs.escape_decode(line[1:-1])[0]


def _names(machine: _Machine) -> None:
    name, module = (machine.pop(1)[0] for _ in range(2))
    if not isinstance(name, str) or not isinstance(module, str):
        raise TypeError("a global whose name is no text")
    machine.stack.append(machine.world.find(module, name))


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _dictionary(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append({})
    machine.update(items)


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    """An operation that puts one value on the stack."""

    def operation(machine: _Machine) -> None:
        made = value(machine)  # before we ask for the stack, which a mark may change
        machine.stack.append(made)

    return operation


def _skip(count: int) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        machine.take(count)

    return operation


def _drop_mark(machine: _Machine) -> None:
    machine.pop_mark()


_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    ord(code): operation
    for code, operation in {
        "\x80": _skip(1),  # the protocol
        "\x95": _skip(8),  # the size of a frame
        "(": _Machine.open_mark,
        "0": _pop,
        "1": _drop_mark,
        "2": _push(lambda m: m.stack[-1]),
        "N": _push(lambda m: None),
        "\x88": _push(lambda m: True),
        "\x89": _push(lambda m: False),
        "I": _push(lambda m: _text_integer(m.line())),
        "L": _push(lambda m: int(m.line().removesuffix(b"L"))),
        "J": _push(lambda m: m.number("<i")),
        "K": _push(lambda m: m.number("<B")),
        "M": _push(lambda m: m.number("<H")),
        "\x8a": _push(lambda m: m.integer(m.number("<B"))),
        "\x8b": _push(lambda m: m.integer(m.number("<i"))),
        "F": _push(lambda m: float(m.line())),
        "G": _push(lambda m: m.number(">d")),
        "S": _push(lambda m: _text_string(m.line())),
        "U": _push(lambda m: m.take(m.number("<B"))),
        "T": _push(lambda m: m.take(m.number("<i"))),
        "C": _push(lambda m: m.take(m.number("<B"))),
        "B": _push(lambda m: m.take(m.number("<I"))),
        "\x8e": _push(lambda m: m.take(m.number("<Q"))),
        "\x96": _push(lambda m: bytearray(m.take(m.number("<Q")))),
        "V": _push(lambda m: m.line().decode("raw-unicode-escape")),
        "\x8c": _push(lambda m: m.take(m.number("<B")).decode("utf-8", "surrogatepass")),
        "X": _push(lambda m: m.take(m.number("<I")).decode("utf-8", "surrogatepass")),
        "\x8d": _push(lambda m: m.take(m.number("<Q")).decode("utf-8", "surrogatepass")),
        ")": _push(lambda m: ()),
        "t": _push(lambda m: tuple(m.pop_mark())),
        "\x85": _push(lambda m: tuple(m.pop(1))),
        "\x86": _push(lambda m: tuple(m.pop(2))),
        "\x87": _push(lambda m: tuple(m.pop(3))),
        "]": _push(lambda m: []),
        "l": _push(_Machine.pop_mark),
        "a": lambda m: m.extend(m.pop(1)),
        "e": lambda m: m.extend(m.pop_mark()),
        "}": _push(lambda m: {}),
        "d": _dictionary,
        "s": lambda m: m.update(m.pop(2)),
        "u": lambda m: m.update(m.pop_mark()),
        "p": lambda m: m.remember(int(m.line())),
        "q": lambda m: m.remember(m.number("<B")),
        "r": lambda m: m.remember(m.number("<I")),
        "\x94": lambda m: m.remember(len(m.memo)),
        "g": _push(lambda m: m.memo[int(m.line())]),
        "h": _push(lambda m: m.memo[m.number("<B")]),
        "j": _push(lambda m: m.memo[m.number("<I")]),
        "\x8f": _push(lambda m: set()),
        "c": _push(lambda m: m.world.find(m.line().decode(), m.line().decode())),
        "\x93": _names,
        "R": _Machine.call,
        "\x81": _Machine.call,  # of a class, whose new object is asked for
        "b": _Machine.build,
        "P": _push(lambda m: m.world.persistent(m.line().decode())),
        "Q": _push(lambda m: m.world.persistent(m.pop(1)[0])),
    }.items()
}
