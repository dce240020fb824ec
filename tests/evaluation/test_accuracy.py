"""Accuracies against counts by hand, and what counts as evaluated before."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace

import pytest
from checkpoint_tools import CPU, QUICK, THREAT, make_checkpoint, make_source

from softdefend.attacks import PGD
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import Resident, subset
from softdefend.evaluation import Evaluator, accuracy
from softdefend.evaluation.accuracy import (
    cost_lines,
    eps_curve,
    evaluate_attacks,
    find_accuracies,
    measure_accuracies,
    per_class,
    summary_line,
)
from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.table import read_table


def test_the_file_holds_what_the_evaluator_finds(bundle, tmp_path):
    made = make_checkpoint(tmp_path, bundle)
    result = measure_accuracies(made, QUICK)
    assert result == json.loads((tmp_path / "evaluation" / "last.json").read_text())
    evaluator = Evaluator(made.net, Resident(bundle.test, "cpu"), THREAT, batch_size=10)
    wanted = evaluator([accuracy.parse(name) for name in QUICK.attacks])
    assert result["clean"] == asdict(wanted.clean)
    for name in QUICK.attacks:
        assert asdict(wanted.robust(name)).items() <= result["attacks"][name].items()
    assert result["worst"]["count"] == int(wanted.worst.sum())
    assert (result["which"], result["epoch"], result["split"]) == ("last", 3, "test")
    assert result["eps_curve"] == []
    table = read_table(tmp_path / "evaluation" / "last.parquet")
    assert table is not None
    assert table.clean_prediction.tolist() == wanted.clean_prediction.tolist()
    assert not (tmp_path / "evaluation" / "last.state").exists()


def test_classes_are_counted_one_by_one(bundle, tmp_path):
    made = make_checkpoint(tmp_path, bundle)
    evaluation = Evaluator(made.net, made.data, THREAT)([PGD(steps=3)])
    classes = (*bundle.classes, "one without images")
    rows = per_class(evaluation, classes)
    assert [row["class"] for row in rows] == list(bundle.classes)
    for number, row in enumerate(rows):
        mine = [i for i, label in enumerate(bundle.test.labels.tolist()) if label == number]
        clean = [i for i in mine if evaluation.clean_prediction[i] == number]
        robust = [i for i in clean if evaluation.attacks["pgd-3"].prediction[i] == number]
        assert row["n"] == len(mine)
        assert (row["clean"], row["robust"]) == (len(clean) / len(mine), len(robust) / len(mine))


def test_the_curve_is_what_single_evaluations_find(bundle, tmp_path):
    made = make_checkpoint(tmp_path, bundle)
    evaluator = Evaluator(made.net, made.data, THREAT, batch_size=10)
    evaluation = evaluator([PGD(steps=3)])
    index = subset(bundle.test.labels, 12)
    points = eps_curve(evaluator, index, evaluation)
    assert points[0]["value"] == 0
    assert points[0]["count"] == int((evaluation.clean_prediction == evaluation.label)[index].sum())
    assert [point["eps"] for point in points[1:]] == ["0.025", "0.05", "0.075", "0.1", "0.125", "0.15", "0.2"]
    for point in points[1::3]:
        threat = ThreatModel("linf", Budget(point["eps"]))
        alone = Evaluator(made.net, made.data, threat, batch_size=10)([PGD(steps=20)], index=index)
        assert (point["count"], point["n"]) == (int(alone.worst.sum()), 12)


ASKED = replace(QUICK, size=16, curve_size=8)


@pytest.mark.parametrize(
    ("change", "enough"),
    [
        ({}, True),
        ({"attacks": ("pgd-3",)}, True),
        ({"attacks": ("pgd-3", "fgsm")}, True),
        ({"attacks": ("pgd-4",)}, False),
        ({"attacks": (*QUICK.attacks, "pgd-4")}, False),
        ({"size": 7}, True),
        ({"size": 17}, False),
        ({"size": None}, False),
        ({"curve_size": 0}, True),
        ({"curve_size": 9}, False),
        ({"seed": 1}, False),
        ({"batch_size": 9}, False),
        ({"precision": "fast"}, False),
        ({"microbatch": 3, "examples": 5, "compile": False}, True),
    ],
    ids=str,
)
def test_a_result_that_holds_more_than_is_asked_will_do(bundle, tmp_path_factory, change, enough):
    folder = tmp_path_factory.getbasetemp() / "covering"
    made = make_checkpoint(folder, bundle)
    known = find_accuracies(made, ASKED) or measure_accuracies(made, ASKED)
    assert find_accuracies(made, replace(ASKED, **change)) == (known if enough else None)


def test_other_weights_and_edited_files_are_no_result(bundle, tmp_path):
    made = make_checkpoint(tmp_path, bundle)
    known = measure_accuracies(made, QUICK)
    path = tmp_path / "evaluation" / "last.json"
    path.write_text(json.dumps(known | {"clean": known["clean"] | {"rate": 1.0}}))
    assert find_accuracies(made, QUICK) is None
    path.write_text(json.dumps(known))
    assert find_accuracies(made, QUICK) == known
    assert find_accuracies(Checkpoint(make_source(tmp_path, bundle, seed=1), CPU), QUICK) is None


def test_what_is_replaced_is_kept_where_it_is_of_the_same_weights(bundle, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="softdefend")
    made = make_checkpoint(tmp_path, bundle)
    first = measure_accuracies(made, QUICK)
    rows = (tmp_path / "evaluation" / "last.parquet").read_bytes()
    caplog.clear()
    second = measure_accuracies(made, replace(QUICK, seed=1))
    kept = tmp_path / "evaluation" / "earlier" / "last-1.json"
    assert json.loads(kept.read_text()) == first != second
    assert kept.with_suffix(".parquet").read_bytes() == rows
    assert f"last: what was evaluated before is kept as {kept}" in caplog.messages
    measure_accuracies(Checkpoint(make_source(tmp_path, bundle, seed=1), CPU), QUICK)
    assert [path.name for path in kept.parent.glob("*.json")] == ["last-1.json"]


def test_a_kept_result_is_told_as_it_was_when_it_was_made(bundle, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="softdefend")
    made = make_checkpoint(tmp_path, bundle)
    settings = replace(QUICK, attacks=("fgsm", "autoattack"), size=6)
    result = evaluate_attacks(made, settings)
    lines = list(caplog.messages)
    assert [line.split(":")[0].strip() for line in lines] == ["fgsm", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert cost_lines(result) == lines
    caplog.clear()
    assert evaluate_attacks(made, settings) == result
    before = "last: as evaluated before, on 6 images; nothing is attacked anew"
    assert caplog.messages == [before, *lines]


def test_the_summary_has_every_attack():
    result = {
        "epoch": 7,
        "clean": {"rate": 0.5},
        "attacks": {"fgsm": {"rate": 0.25}, "pgd-3": {"rate": 0.125}},
    }
    assert summary_line("best", result) == "best (epoch 7): clean 50.0%  fgsm 25.0%  pgd-3 12.5%"
    assert summary_line("last", {**result, "epoch": None}).startswith("last: clean 50.0%")
