"""Exchange formats against the forms of published files and logs, and counts against naive loops."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softdefend.core.errors import SettingError
from softdefend.evaluation.exchange import (
    STANDARD,
    after_each,
    check_standard,
    log_lines,
    read_known,
    robustbench,
)
from softdefend.evaluation.table import AttackColumns, Table, read_table

# RobustBench/robustbench at 78fcc9e, model_info/cifar10/L2/Rice2020Overfitting.json
PUBLISHED = {
    "link": "https://arxiv.org/abs/2002.11569",
    "name": "Overfitting in adversarially robust deep learning",
    "authors": "Leslie Rice, Eric Wong, J. Zico Kolter",
    "additional_data": False,
    "number_forward_passes": 1,
    "dataset": "cifar10",
    "venue": "ICML 2020",
    "architecture": "PreActResNet-18",
    "eps": "0.5",
    "clean_acc": "88.67",
    "reported": "71.6",
    "autoattack_acc": "67.68",
    "unreliable": False,
}

N = 40


def make_table(names: tuple[str, ...] = STANDARD) -> Table:
    random = np.random.default_rng(0)
    label = random.integers(0, 4, N)
    clean = np.where(random.random(N) < 0.8, label, (label + 1) % 4)
    attacks = {}
    for name in names:
        said = np.where(random.random(N) < 0.75, clean, (label + 2) % 4)
        distance = (random.random(N) * 0.03).astype(np.float32)
        attacks[name] = AttackColumns(said, distance, (clean == label) & (said == label))
    return Table(label, clean, attacks)


def rate(count: int) -> dict[str, Any]:
    return {"count": count, "n": N, "rate": count / N}


def make_result(table: Table, **more: Any) -> dict[str, Any]:
    attacks = {
        name: {**rate(int(columns.robust.sum())), "seconds": 1.25 * (i + 1)}
        for i, (name, columns) in enumerate(table.attacks.items())
    }
    return {
        "n": N,
        "norm": "linf",
        "eps": "8/255",
        "name_of_data": "cifar-10-batches-py",
        "clean": rate(int(table.right.sum())),
        "attacks": attacks,
        "worst": rate(table.after_each()[-1][1]),
        **more,
    }


def count_naively(table: Table, names: tuple[str, ...]) -> int:
    total = 0
    for i in range(N):
        said = [table.clean_prediction[i], *(table.attacks[name].prediction[i] for name in names)]
        total += all(word == table.label[i] for word in said)
    return total


def test_records_are_counted_one_by_one():
    table = make_table()
    for done, (name, count) in enumerate(table.after_each()):
        assert name == ("clean", *STANDARD)[done]
        assert count == count_naively(table, STANDARD[:done])
    survived, worst, shortest = table.survived, table.worst_prediction, table.smallest_distance
    for i in range(N):
        each = [table.attacks[name] for name in STANDARD]
        assert survived[i] == sum(bool(columns.robust[i]) for columns in each)
        fell = [columns for columns in each if not columns.robust[i]]
        if table.clean_prediction[i] != table.label[i]:
            assert worst[i] == table.clean_prediction[i]
        else:
            assert worst[i] == (fell[0].prediction[i] if fell else table.label[i])
        wanted = min((columns.distance[i] for columns in fell), default=np.inf)
        assert shortest[i] == wanted
    assert (worst == table.label).sum() == table.after_each()[-1][1]


def test_records_are_read_as_they_are_written(tmp_path):
    table = make_table(("fgsm", "pgd-20"))
    columns: dict[str, Any] = {
        "index": np.arange(N),
        "label": table.label,
        "clean_prediction": table.clean_prediction,
    }
    for name, attack in table.attacks.items():
        columns |= {f"{name}/{part}": getattr(attack, part) for part in ("prediction", "distance", "robust")}
    path = tmp_path / "last.parquet"
    assert read_table(path) is None
    pq.write_table(pa.table(columns), path)
    read = read_table(path)
    assert read is not None
    assert list(read.attacks) == ["fgsm", "pgd-20"]
    assert read.after_each() == table.after_each()
    np.testing.assert_array_equal(read.smallest_distance, table.smallest_distance)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(SettingError, match="an unreadable table"):
        read_table(path)


def test_the_fields_are_those_of_published_files():
    table = make_table()
    content = robustbench(make_result(table), table, full=N, architecture="resnet18", unreliable=False)
    assert set(content) == {*PUBLISHED, "footnote"}  # 131 of 236 published files have a footnote
    assert content["clean_acc"] == round(100 * table.right.mean(), 2)
    assert content["autoattack_acc"] == round(100 * count_naively(table, STANDARD) / N, 2)
    assert isinstance(content["autoattack_acc"], float)
    assert (content["dataset"], content["eps"], content["architecture"]) == ("cifar10", "8/255", "resnet18")
    assert content["number_forward_passes"] == 1
    assert content["unreliable"] is False
    json.dumps(content, allow_nan=False)


def sort_key(content: dict[str, Any]) -> float:
    """How RobustBench's leaderboard reads a file: the first of these that is there, as a number."""
    return next(float(content[field]) for field in ("external", "autoattack_acc") if field in content)


def test_what_beats_the_ensemble_is_external():
    table = make_table((*STANDARD, "pgd-50x10"))
    content = robustbench(make_result(table), table, full=N)
    assert content["autoattack_acc"] == round(100 * count_naively(table, STANDARD) / N, 2)
    assert content["external"] == round(100 * count_naively(table, (*STANDARD, "pgd-50x10")) / N, 2)
    assert content["external"] < content["autoattack_acc"]
    assert sort_key(content) == content["external"]
    alone = make_table()
    content = robustbench(make_result(alone), alone, full=N)
    assert "external" not in content
    assert "unreliable" not in content
    assert sort_key(content) == content["autoattack_acc"]


def test_images_made_elsewhere_that_do_more_are_external():
    table = make_table()
    result = make_result(table)
    worst = result["worst"]["count"]
    content = robustbench(result, table, full=N, transferred=worst - 1)
    assert content["external"] == round(100 * (worst - 1) / N, 2)
    same = robustbench(result, table, full=N)
    assert robustbench(result, table, full=N, transferred=N) == same


def test_what_people_wrote_into_the_file_is_kept(tmp_path):
    path = tmp_path / "mine.json"
    assert read_known(path) == {}
    path.write_text(json.dumps(PUBLISHED))
    table = make_table()
    result = make_result(table, eps="0.5", norm="l2", name_of_data="digits")
    content = robustbench(result, table, full=N, architecture="small_cnn", known=read_known(path))
    for field in ("link", "name", "authors", "additional_data", "venue", "architecture", "reported"):
        assert content[field] == PUBLISHED[field]
    assert content["eps"] == 0.5
    assert content["dataset"] == "digits"
    assert content["clean_acc"] == round(100 * table.right.mean(), 2)
    for wrong in ("{", "[1]"):
        path.write_text(wrong)
        with pytest.raises(SettingError, match="--robustbench"):
            read_known(path)


@pytest.mark.parametrize("changed", [None, "clean_acc", "autoattack_acc", "eps"])
def test_verdicts_on_other_figures_are_dropped(changed):
    """They are kept beside the same figures, however these are written: as text, or eps as a number."""
    table = make_table()
    known = {k: str(v) for k, v in robustbench(make_result(table), table, full=N).items()}
    known |= {"eps": 8 / 255, "external": 12.5, "unreliable": True, "name": "mine"}
    if changed:
        known[changed] = "0.25"
    content = robustbench(make_result(table), table, full=N, known=known)
    assert {"external", "unreliable"} & content.keys() == (set() if changed else {"external", "unreliable"})
    assert content["name"] == "mine"
    again = robustbench(make_result(table), table, full=N, known=known, unreliable=False)
    assert again["unreliable"] is False


def as_ensemble(table: Table) -> Table:
    """The attacks of ``table`` as members of one, each shown only what the ones before it left."""
    left, fooled = table.right, {}
    for name, columns in table.attacks.items():
        fooled[name] = left & (columns.prediction != table.label)
        left = left & ~fooled[name]
    one = AttackColumns(table.worst_prediction, table.smallest_distance, left, fooled)
    return Table(table.label, table.clean_prediction, {"autoattack": one})


def test_an_ensemble_counts_as_its_members(tmp_path):
    apart = make_table()
    table = as_ensemble(apart)
    assert table.after_each() == apart.after_each()
    assert table.after_each()[1][0] == "apgd-ce"
    members = [
        {"name": name, "robust": rate(count), "seconds": 1.25 * (i + 1)}
        for i, (name, count) in enumerate(apart.after_each()[1:])
    ]
    result = make_result(table)
    result["attacks"]["autoattack"] |= {"members": members, "seconds": 12.5}
    assert after_each(result, table) == after_each(result, None) == after_each(make_result(apart), apart)
    ours, theirs = (robustbench(r, t, full=N) for r, t in ((result, table), (make_result(apart), apart)))
    assert ours == theirs
    assert log_lines(result, None)[0].startswith("using standard version")
    # as it is written: null where a member was not given the sample
    fooled = table.attacks["autoattack"].fooled
    columns: dict[str, Any] = {"label": table.label, "clean_prediction": table.clean_prediction}
    for part in ("prediction", "distance", "robust"):
        columns[f"autoattack/{part}"] = getattr(table.attacks["autoattack"], part)
    given = table.right
    for name, flags in fooled.items():
        columns[f"autoattack/{name}/fooled"] = pa.array(flags, mask=~given)
        columns[f"autoattack/{name}/forwards"] = pa.array(np.ones(N, np.int64), mask=~given)
        given = given & ~flags
    pq.write_table(pa.table(columns), tmp_path / "best.parquet")
    read = read_table(tmp_path / "best.parquet")
    assert read is not None
    assert list(read.attacks) == ["autoattack"]
    assert read.after_each() == table.after_each()


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"attacks": ("pgd-20",)}, "an evaluation with pgd-20"),
        ({"attacks": STANDARD[:3]}, "an evaluation with apgd-ce, apgd-t, fab-t"),
        ({"attacks": ("autoattack-rand",)}, "an evaluation with autoattack-rand"),
        ({"n": 39}, "an evaluation on 39 of 40 images"),
        ({"precision": "fast"}, "an evaluation with precision fast"),
    ],
    ids=str,
)
def test_other_evaluations_may_not_be_called_autoattack(change, given):
    good = {"attacks": STANDARD, "n": 40, "full": 40, "precision": "exact"}
    check_standard(**good)
    check_standard(**{**good, "attacks": ("autoattack", "fgsm")})
    with pytest.raises(SettingError, match=f"^--robustbench: got {given}; accepted: --attacks autoattack on"):
        check_standard(**{**good, **change})


def test_the_log_has_the_references_lines():
    table = make_table()
    lines = log_lines(make_result(table), table)
    assert lines[0] == "using standard version including apgd-ce, apgd-t, fab-t, square."
    # the pattern by which scripts read fra31/auto-attack's log
    found = [
        re.fullmatch(r"robust accuracy after ([A-Z-]+): ([\d.]+)% \(total time ([\d.]+) s\)", x)
        for x in lines
    ]
    steps = [match.groups() for match in found if match]
    counts = [count_naively(table, STANDARD[: i + 1]) for i in range(4)]
    totals = ["1.2", "3.8", "7.5", "12.5"]  # of 1.25, 2.5, 3.75 and 5 seconds
    assert steps == [
        (name.upper(), f"{100 * count / N:.2f}", total)
        for name, count, total in zip(STANDARD, counts, totals, strict=True)
    ]
    assert lines[1] == f"initial accuracy: {100 * table.right.mean():.2f}%"
    assert lines[-1] == f"robust accuracy: {100 * counts[-1] / N:.2f}%"
    # The original moves an image only once an attack has fooled the network on it.
    moved = [
        distance
        for columns in table.attacks.values()
        for right, robust, distance in zip(table.right, columns.robust, columns.distance, strict=True)
        if right and not robust
    ]
    assert lines[-2] == f"max Linf perturbation: {max(moved):.5f}"


def test_where_nothing_was_fooled_nothing_was_moved():
    table = make_table()
    for columns in table.attacks.values():
        columns.robust[:] = table.right
    assert log_lines(make_result(table), table)[-2] == "max Linf perturbation: 0.00000"


def test_a_single_attack_needs_no_records():
    table = make_table(("pgd-20",))
    result = make_result(table)
    assert after_each(result, None) == after_each(result, table)
    assert log_lines(result, None)[0] == "using custom version including pgd-20."
    several = make_result(make_table())
    with pytest.raises(SettingError, match="table"):
        after_each(several, None)
