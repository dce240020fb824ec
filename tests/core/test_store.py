"""A result is found again by what it was made from, and by nothing else."""

from __future__ import annotations

import json

import pytest

from softdefend.core.store import ResultStore


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "results")


def test_equal_inputs_find_a_result_without_making_it_again(store):
    made = []

    def make():
        made.append(1)
        return {"rate": 0.5}

    first = store.compute("best", {"weights": "a", "steps": (1, 2)}, make)
    again = store.compute("best", {"steps": [1, 2], "weights": "a"}, make)
    assert made == [1]
    assert first == again
    assert again["rate"] == 0.5


@pytest.mark.parametrize("other", [{"weights": "b"}, {"weights": "a", "more": 1}, {}])
def test_other_inputs_do_not(store, other):
    store.write("best", {"weights": "a"}, {"rate": 0.5})
    assert store.find("best", other) is None
    assert store.find("last", {"weights": "a"}) is None


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", '{"inputs": {}, "key": "0"}', "[" * 100_000])
def test_damaged_and_foreign_files_count_as_absent(store, text):
    store.folder.mkdir()
    store.path("best").write_text(text)
    assert store.read("best") is None
    assert store.compute("best", {"weights": "a"}, lambda: {"rate": 1})["rate"] == 1


def test_a_file_whose_inputs_were_edited_counts_as_absent(store):
    store.write("best", {"eps": "8/255"}, {"rate": 0.5})
    content = json.loads(store.path("best").read_text())
    content["inputs"]["eps"] = "4/255"
    store.path("best").write_text(json.dumps(content))
    assert store.find("best", {"eps": "4/255"}) is None


def test_what_is_replaced_is_kept_once_with_its_companions(store):
    store.write("best", {"attack": "pgd"}, {"rate": 0.5})
    rows = store.folder / "best.parquet"
    rows.write_bytes(b"rows")
    kept = store.set_aside("best", rows)
    assert json.loads(kept.read_text())["rate"] == 0.5
    assert kept.with_suffix(".parquet").read_bytes() == b"rows"
    assert store.set_aside("best", rows) is None
    store.write("best", {"attack": "apgd"}, {"rate": 0.4})
    assert store.set_aside("best", rows) not in (None, kept)


def test_numbers_that_json_cannot_write_are_an_error_and_write_nothing(store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write("best", {}, {"rate": float("nan")})
    assert not store.path("best").exists()
