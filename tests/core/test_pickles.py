"""The bounded reader of pickles: plain data as the standard library reads them, and nothing else."""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softdefend.core.pickles import PickleError, read_pickle


class Nothing:
    """A world without names."""

    def find(self, module: str, name: str) -> object:
        if name == "encode":
            return name
        raise PickleError(f"the name {module}.{name}")

    def call(self, function: object, arguments: tuple[Any, ...]) -> object:
        text, _ = arguments  # how Python 3 writes bytes for Python 2
        return text.encode("latin-1")

    def build(self, item: object, state: object) -> None:
        raise PickleError("a state")

    def persistent(self, name: object) -> object:
        raise PickleError("a persistent id")


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(min_size=1)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
    ),
    max_leaves=20,
)


@given(values, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_are_read_as_the_standard_library_reads_them(value: object, protocol: int) -> None:
    data = pickle.dumps([value, value], protocol)
    found, end = read_pickle(b"ab" + data + b"more", Nothing(), 2)
    assert found == pickle.loads(data) == [value, value]
    assert end == 2 + len(data)


@given(values, st.integers(0, pickle.HIGHEST_PROTOCOL), st.data())
def test_a_damaged_pickle_is_refused_or_another_value(
    value: object, protocol: int, data: st.DataObject
) -> None:
    content = bytearray(pickle.dumps([value, value], protocol))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PickleError):
        read_pickle(bytes(content), Nothing())


def test_strings_of_python_2_are_bytes() -> None:
    data = b"(dp0\nS'it\\'s \\xff'\np1\nS\"x\"\np2\nsU\x02ab(lp3\nI1\naI01\naL7L\naF2.5\nas."
    assert read_pickle(data, Nothing())[0] == {b"it's \xff": b"x", b"ab": [1, True, 7, 2.5]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_is_no_plain_data_is_refused(protocol: int) -> None:
    for value in (print, complex(1, 2), {1, 2}, frozenset("a"), Nothing()):
        with pytest.raises(PickleError):
            read_pickle(pickle.dumps(value, protocol), Nothing())
