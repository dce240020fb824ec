from __future__ import annotations

import builtins
import os
import pickle
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from softdefend.core.errors import SettingError
from softdefend.data.sources import unpickle
from softdefend.data.sources.unpickle import load


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[[bytes], dict[str, object]]:
    def read(content: bytes) -> dict[str, object]:
        (tmp_path / "batch").write_bytes(content)
        return load(tmp_path / "batch")

    return read


Loaded = Callable[[bytes], dict[str, object]]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "<f4", ">f8", "?", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_protocol_come_back(loaded: Loaded, protocol: int, dtype: str, order: str) -> None:
    array = np.asarray(np.arange(24).reshape(4, 6) % 5, dtype=dtype, order=order)  # type: ignore[call-overload]
    found = loaded(pickle.dumps({"data": array, "names": ["a", b"b\xff", 3]}, protocol))
    assert isinstance(found["data"], np.ndarray)
    assert found["data"].dtype == array.dtype
    np.testing.assert_array_equal(found["data"], array)


def test_keys_become_strings_and_plain_values_stay(loaded: Loaded) -> None:
    content = {
        b"labels": [1, 2, 3],
        "name": "x",
        b"raw": b"\x00\xff",
        "empty": b"",
        "pair": (1, 2.5),
        "no": None,
    }
    for protocol in range(2, 6):
        found = loaded(pickle.dumps(content, protocol))
        assert found == {
            **{k: v for k, v in content.items() if isinstance(k, str)},
            "labels": [1, 2, 3],
            "raw": b"\x00\xff",
        }


class Calls:
    """Unpickles by calling whatever it was told to."""

    def __init__(self, call: object, *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[object, ...]:
        return self.call, self.args


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (os.system, "system"),
        (subprocess.Popen, "Popen"),
        (builtins.eval, "eval"),
        (builtins.getattr, "getattr"),
        (builtins.open, "open"),
    ],
)
def test_a_payload_is_refused_by_name_and_never_run(
    loaded: Loaded, tmp_path: Path, protocol: int, call: object, named: str
) -> None:
    mark = tmp_path / "executed"
    args = {
        "system": (f"touch {mark}",),
        "Popen": (["touch", str(mark)],),
        "eval": (f"open({str(mark)!r}, 'w')",),
        "getattr": (mark, "touch"),
        "open": (str(mark), "w"),
    }[named]
    with pytest.raises(SettingError, match=rf"batch with the global \w+\.{named}; .*nothing was executed"):
        loaded(pickle.dumps({"data": Calls(call, *args)}, protocol))
    assert not mark.exists()


def text(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


REDUCE = {
    # The admitted names, used for what they are not admitted for.
    "object array": text("numpy", "dtype") + b"(X\x02\x00\x00\x00O8tR",
    "structured array": text("numpy", "dtype") + b"(X\x05\x00\x00\x00u1,u1tR",
    "subclass": text("numpy._core.multiarray", "_reconstruct")
    + text("builtins", "list").join([b"(", b"K\x00\x85U\x01btR"]),
    "ndarray called": text("numpy", "ndarray") + b"(K\x05tR",
    "unpacking codec": text("_codecs", "encode") + b"(U\x03abcU\x0azlib_codectR",
    "foreign module, known name": text("shutil", "_reconstruct"),
    "dotted name": text("numpy", "dtype.__class__"),
    "dunder": text("builtins", "__import__"),
    "changed function": text("_codecs", "encode") + b"N}X\x05\x00\x00\x00_callK\x01s\x86b",
    "changed function's dictionary": text("_codecs", "encode") + b"}X\x05\x00\x00\x00_callK\x01sb",
    "changed type": text("builtins", "dict") + b"N}X\x04\x00\x00\x00keysK\x01s\x86b",
    "persistent id": b"U\x01xQ",
    "persistent text id": b"Px\n",
    "extension": b"\x82\x01",
    "called list": b"](K\x01tR",
}


@pytest.mark.parametrize("kind", REDUCE)
def test_admitted_names_cannot_be_turned_to_anything_else(loaded: Loaded, kind: str) -> None:
    good = pickle.dumps({b"x": b"abc", "y": np.arange(3)}, 2)
    with pytest.raises(SettingError, match=r"^data\.source: got .*batch"):
        loaded(b"\x80\x02}X\x01\x00\x00\x00x" + REDUCE[kind] + b"s.")
    assert str(loaded(good)["x"]) == "b'abc'"
    assert builtins.dict.keys is type({}).keys


def test_arrays_of_objects_are_refused(loaded: Loaded) -> None:
    with pytest.raises(
        SettingError, match="an array of type 'O8'; accepted: arrays, lists, strings and numbers"
    ):
        loaded(pickle.dumps({"data": np.array([{}, []], dtype=object)}, 2))


def test_an_array_of_a_list_in_place_of_bytes_is_refused(loaded: Loaded) -> None:
    rebuild, args, state = np.arange(4, dtype=np.uint8).__reduce__()

    class Forged:
        def __reduce__(self) -> tuple[object, ...]:
            return rebuild, args, (*state[:4], [1, 2, 3, 4])

    with pytest.raises(SettingError, match="an array that does not consist of bytes"):
        loaded(pickle.dumps({"data": Forged()}, 2))


@pytest.mark.parametrize("shape", [(5,), (2, 3), (-1, -1), (1 << 62, 8)])
def test_an_array_whose_bytes_do_not_fit_its_shape_is_refused(loaded: Loaded, shape: tuple[int, ...]) -> None:
    array = np.arange(4, dtype=np.uint8)
    rebuild, args, state = array.__reduce__()
    changed = (state[0], shape, *state[2:])

    class Forged:
        def __reduce__(self) -> tuple[object, ...]:
            return rebuild, args, changed

    with pytest.raises(SettingError, match="an intact pickle of arrays"):
        loaded(pickle.dumps({"data": Forged()}, 2))


@pytest.mark.parametrize("content", [b"", b"\x80", b"garbage", b"\x80\x02}.", b"\x80\x7f.", b"\x80\x02]."])
def test_damaged_pickles_are_refused_and_an_empty_one_is_empty(loaded: Loaded, content: bytes) -> None:
    if content == b"\x80\x02}.":
        assert loaded(content) == {}
        return
    with pytest.raises(SettingError, match="an intact pickle of arrays"):
        loaded(content)


def test_a_pickle_cut_anywhere_is_refused(loaded: Loaded) -> None:
    whole = pickle.dumps({"data": np.arange(50, dtype=np.uint8), "labels": list(range(50))}, 2)
    for length in range(0, len(whole), 7):
        with pytest.raises(SettingError):
            loaded(whole[:length])


DOUBLED = b"K\x01q\x00" + b"h\x00\x86q\x00" * 60
"""1, (1, 1), ((1, 1), (1, 1)) and so on: 2**60 numbers."""
ENCODE = text("_codecs", "encode") + b"q\x010X" + (100_000).to_bytes(4, "little") + b"a" * 100_000 + b"q\x02"
ENCODED = b"h\x01h\x02X\x06\x00\x00\x00latin1\x86R0"
BOMBS = {
    "a memo of 2**30 entries": b"K\x01r" + (2**30).to_bytes(4, "little"),
    "a key of doubled tuples": b"}" + DOUBLED + b"K\x01s",
    "a call with doubled tuples": text("numpy", "dtype") + DOUBLED + b"\x85R",
    "a state of doubled tuples": text("numpy", "dtype") + b"U\x02u1\x85R" + DOUBLED + b"b",
    "a tuple in tuples": b")" + b"\x85" * 500_000,
    "lists in lists": b"]" * 400_000 + b"a" * 399_999,
    "many operations": b"K\x010" * 1_500_000,
    "long integers": b"\x8b" + (2_000_000).to_bytes(4, "little") + b"\x7f" * 2_000_000,
    "long digits": b"L" + b"9" * 2_000_000 + b"L\n",
    "many bytes of no content": text("builtins", "bytes")
    + b"J"
    + (2**31 - 1).to_bytes(4, "little")
    + b"\x85R",
    "a length beyond the end": b"\x8e" + (2**40).to_bytes(8, "little") + b"x",
    "a long key": b"}X" + (10**6).to_bytes(4, "little") + b"k" * 10**6 + b"K\x01s",
    "marks and no end": b"(" * 1_000_000,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_little_time_and_memory_go_into_a_pickle_that_asks_for_much(loaded: Loaded, kind: str) -> None:
    content = b"\x80\x02}U\x01x" + BOMBS[kind] + b"s."
    began = time.process_time()
    with pytest.raises(SettingError, match=r"^data\.source: got .*batch"):
        loaded(content)
    assert time.process_time() - began < 5
    if len(content) < 200_000:  # to watch what is made takes longer than to make it
        tracemalloc.start()
        try:
            with pytest.raises(SettingError):
                loaded(content)
            assert tracemalloc.get_traced_memory()[1] < 1e6
        finally:
            tracemalloc.stop()


def test_a_text_is_not_encoded_more_often_than_it_is_there(loaded: Loaded) -> None:
    once = b"\x80\x02}U\x01x" + ENCODE + b"0" + ENCODED.removesuffix(b"0") + b"s."
    assert loaded(once) == {"x": b"a" * 100_000}
    with pytest.raises(SettingError, match="one text encoded many times"):
        loaded(b"\x80\x02}U\x01x" + ENCODE + b"0" + ENCODED * 1000 + b"s.")


@pytest.mark.parametrize("kind", ["device", "pipe", "too large"])
def test_what_is_no_regular_file_or_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "batch"
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"x" * 100)
        monkeypatch.setattr(unpickle, "_LARGEST", 99)
    given = "100 bytes, where 99 are the most" if kind == "too large" else "no regular file"
    with pytest.raises(SettingError, match=rf"batch \({given}\); accepted: an intact pickle of arrays"):
        load(path)
