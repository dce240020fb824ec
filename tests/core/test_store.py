"""A result is found again by what it was made from, and by nothing else."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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


@pytest.mark.parametrize("change", [{"rate": 0.9}, {"more": 1}, {"sha256": "0"}, {"inputs": [1]}])
def test_a_file_that_was_edited_anywhere_counts_as_absent(store, change):
    store.write("best", {"eps": "8/255"}, {"rate": 0.5})
    content = json.loads(store.path("best").read_text())
    assert store.read("best") == content
    store.path("best").write_text(json.dumps(content | change))
    assert store.read("best") is None
    assert store.find("best", {"eps": "8/255"}) is None


def test_a_file_that_was_only_written_in_another_style_is_the_same_result(store):
    content = store.write("best", {"eps": "8/255"}, {"rate": 1e-7, "rows": [{"b": 1, "a": 2}]})
    store.path("best").write_text(json.dumps(content, sort_keys=True, indent=4))
    assert store.find("best", {"eps": "8/255"}) == content


def test_inputs_that_are_ignored_may_differ_and_no_others(store):
    store.write("best", {"weights": "a", "attacks": ["pgd", "fgsm"]}, {"rate": 0.5})
    asked = {"weights": "a", "attacks": ["fgsm"]}
    assert store.find("best", asked) is None
    assert store.find("best", asked, ignoring=("attacks",))["inputs"]["attacks"] == ["pgd", "fgsm"]
    assert store.find("best", {"weights": "a"}, ignoring=("attacks",)) is not None
    assert store.find("best", {**asked, "weights": "b"}, ignoring=("attacks",)) is None


TENSORS = {
    "b": torch.arange(6).view(2, 3).T,
    "a": torch.tensor([0.5], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3)[:, :1],
}


def test_tensors_are_found_by_their_inputs_and_read_back(store):
    assert store.find_tensors("gallery", {"n": 2}) is None
    store.write_tensors("gallery", {"n": 2}, TENSORS, {"classes": "[]"})
    tensors, metadata = store.find_tensors("gallery", {"n": 2})
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert metadata["classes"] == "[]"
    assert json.loads(metadata["inputs"]) == {"n": 2}
    assert store.find_tensors("gallery", {"n": 3}) is None


def test_equal_tensors_make_equal_bytes_that_others_read(store, tmp_path):
    metadata = {name: name for name in "abcdefgh"}
    written = set()
    for _ in range(8):
        store.write_tensors("gallery", {"n": 2}, TENSORS, metadata)
        written.add(store.path("gallery", ".safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(store.path("gallery", ".safetensors"), "pt") as file:
        assert torch.equal(file.get_tensor("b"), TENSORS["b"])
        assert metadata.items() <= file.metadata().items()


def test_damaged_tensors_count_as_absent(store):
    store.write_tensors("gallery", {}, TENSORS)
    path = store.path("gallery", ".safetensors")
    whole = path.read_bytes()
    for spoiled in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
        path.write_bytes(spoiled)
        assert store.find_tensors("gallery", {}) is None
    save_file({"a": torch.zeros(1)}, path)
    assert store.find_tensors("gallery", {}) is None


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_what_is_no_regular_file_is_no_result(store, kind):
    store.folder.mkdir(parents=True)
    for suffix in (".json", ".safetensors"):
        if kind == "device":
            store.path("best", suffix).symlink_to("/dev/zero")
        else:
            os.mkfifo(store.path("best", suffix))
    assert store.read("best") is None
    assert store.find_tensors("best", {}) is None
    assert store.set_aside("best") is None
    assert store.compute("best", {}, lambda: {"rate": 1})["rate"] == 1
