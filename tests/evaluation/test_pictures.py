"""Gallery and examples are those of the evaluation beside them, as many as are asked for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from checkpoint_tools import QUICK, make_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from softdefend.core.threat import Budget, ThreatModel
from softdefend.evaluation import pictures
from softdefend.evaluation.accuracy import measure_accuracies
from softdefend.evaluation.pictures import renew_pictures
from softdefend.evaluation.table import read_table

GALLERY, EXAMPLES = "last-gallery.safetensors", "last-examples.safetensors"


@pytest.fixture
def case(bundle, tmp_path):
    checkpoint = make_checkpoint(tmp_path, bundle)
    result = measure_accuracies(checkpoint, QUICK)
    return checkpoint, result, read_table(tmp_path / "evaluation" / "last.parquet"), tmp_path / "evaluation"


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_they_are_made_once_for_each_number(case):
    checkpoint, result, table, folder = case
    renew_pictures(checkpoint, QUICK, result, table)
    before = times(folder)
    assert before.keys() == {GALLERY, EXAMPLES}
    assert len(load_file(folder / EXAMPLES)["label"]) == 2
    renew_pictures(checkpoint, replace(QUICK, microbatch=3), result, table)
    assert times(folder) == before
    renew_pictures(checkpoint, replace(QUICK, examples=3), result, table)
    assert len(load_file(folder / EXAMPLES)["label"]) == 3
    renew_pictures(checkpoint, replace(QUICK, examples=0), result, table)
    assert times(folder) == {}


def test_their_metadata_say_of_which_evaluation_they_are(case, bundle):
    checkpoint, result, table, folder = case
    renew_pictures(checkpoint, QUICK, result, table)
    for name in (GALLERY, EXAMPLES):
        with safe_open(folder / name, "pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["inputs"]) == {"evaluation": result["key"], "images": 2}
        assert json.loads(metadata["classes"]) == list(bundle.classes)
    with safe_open(folder / GALLERY, "pt") as file:
        metadata = file.metadata()
    assert metadata["attacks"] == "2"
    assert (metadata["asked"], metadata["eps"], metadata["norm"]) == ("2", "0.1", "linf")
    assert (metadata["weights"], metadata["test_data"]) == (result["weights"], result["test_data"])


@pytest.mark.parametrize("name", [GALLERY, EXAMPLES])
def test_damaged_pictures_and_those_of_another_evaluation_are_made_again(case, name):
    checkpoint, result, table, folder = case
    renew_pictures(checkpoint, QUICK, result, table)
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    renew_pictures(checkpoint, QUICK, result, table)
    assert (folder / name).read_bytes() == good
    renew_pictures(checkpoint, QUICK, {**result, "key": "0" * 64}, table)
    assert (folder / name).read_bytes() != good


def test_examples_show_the_attack_of_the_evaluation_though_less_was_asked(case, monkeypatch):
    checkpoint, result, table, _ = case
    asked, shown = [], pictures.shown_attack
    monkeypatch.setattr(pictures, "shown_attack", lambda names, k: asked.append(names) or shown(names, k))
    renew_pictures(checkpoint, replace(QUICK, attacks=("pgd-3",)), result, table)
    assert asked == [("fgsm", "pgd-3")]


def test_there_are_none_without_records_or_under_another_threat(case, bundle, tmp_path):
    checkpoint, result, table, folder = case
    renew_pictures(checkpoint, QUICK, result, None)
    other = make_checkpoint(tmp_path, bundle, threat=ThreatModel("l2", Budget("0.1")))
    renew_pictures(other, QUICK, result, table)
    assert times(folder) == {}
    best = make_checkpoint(tmp_path, bundle, which="best")
    renew_pictures(best, QUICK, result, table)
    assert times(folder).keys() == {"best-gallery.safetensors", "best-examples.safetensors"}
