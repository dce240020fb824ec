"""The study of settings on digits: pairs, differences, transfer, rows from two machines."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from softdefend.core.errors import SettingError
from softdefend.core.store import ResultStore
from softdefend.evaluation.table import read_table
from softdefend.experiments.config import resolve
from softdefend.experiments.paired import difference
from softdefend.experiments.reproduce import make_quick, reproduce, settings

FAST = [
    *("--runtime.threads", "1", "--progress", "false", "--optim.epochs", "2", "--data.train_size", "64"),
    *("--evaluate.size", "32", "--data.validation", "20", "--validate.test_size", "0"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    return folder, reproduce(make_quick(settings()), folder, FAST, only=["l2"])


def test_a_setting_is_a_pair_of_runs(made):
    folder, rows = made
    assert [(row["setting"], row["recipe"]) for row in rows] == [("l2", "PGD-AT"), ("l2", "PGD-AT + SGLR")]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "l2_pgd-at-seed0",
        "l2_sglr-reference-seed0",
    ]


def test_differences_are_those_of_the_evaluations_image_by_image(made):
    folder, rows = made
    content = json.loads((folder / "differences.json").read_text())
    (pair,) = content["pairs"]
    assert (pair["reference"], pair["other"], pair["seed"]) == ("l2 pgd-at", "l2 sglr-reference", 0)
    tables = [
        read_table(folder / f"l2_{name}-seed0/evaluation/last.parquet")
        for name in ("pgd-at", "sglr-reference")
    ]
    for measure in ("pgd-20", "pgd-10", "pgd-30-margin", "apgd-ce-5", "square-20"):
        expected = difference(*(one.attacks[measure].robust for one in tables))
        assert pair["differences"][measure]["p"] == expected.p
        assert pair["differences"][measure]["error"] == expected.error
        assert rows[0]["last"][measure] == pytest.approx(expected.first)
    assert pair["differences"]["clean"]["won"] == difference(*(one.right for one in tables)).won
    for run, rate, other in zip(rows, pair["transfer"], reversed(rows), strict=True):
        assert run["last"]["transfer"] == rate
        assert rate >= run["last"]["pgd-30-margin"] - 0.2  # images of another network are weaker
        assert other["name"] != run["name"]
    table = (folder / "differences.md").read_text().splitlines()
    assert table[0].count("|") == 3 + 6 + 1 + 1
    assert "±" in table[2]
    assert "McNemar" in table[-1]
    assert "<svg" in (folder / "differences.svg").read_text()


def test_the_result_file_keeps_percentages_and_differences(made, tmp_path, monkeypatch):
    folder, rows = made
    benchmarks, output = Path(__file__).parents[2] / "benchmarks", tmp_path / "settings.json"
    monkeypatch.syspath_prepend(benchmarks)
    monkeypatch.setattr(sys, "argv", ["settings.py", str(folder), "--output", str(output)])
    try:
        assert runpy.run_path(str(benchmarks / "settings.py"))["main"]() == 0
    finally:
        for name in ("collect", "common"):
            sys.modules.pop(name, None)
    content = json.loads(output.read_text())
    assert [row["name"] for row in content["rows"]] == [row["name"] for row in rows]
    for joined, row in zip(content["rows"], rows, strict=True):
        assert joined["last"]["pgd-20"] == pytest.approx(100 * row["last"]["pgd-20"], abs=0.01)
    ((found,), (expected,)) = (
        [pair["differences"]["pgd-20"] for pair in pairs]
        for pairs in (content["pairs"], json.loads((folder / "differences.json").read_text())["pairs"])
    )
    for name in ("lost", "won", "p", "error"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)


def test_rows_of_two_machines_join(made, tmp_path):
    """One machine made PGD-AT, the other makes SGLR; there is no run of the first to make images on."""
    folder, rows = made
    shutil.copy(folder / "l2_pgd-at-seed0.json", tmp_path)
    shutil.copytree(folder / "l2_sglr-reference-seed0", tmp_path / "l2_sglr-reference-seed0")
    again = reproduce(make_quick(settings()), tmp_path, FAST, only=["l2 sglr-reference"])
    assert [row["name"] for row in again] == [row["name"] for row in rows]
    (pair,) = json.loads((tmp_path / "differences.json").read_text())["pairs"]
    assert pair["transfer"] is None
    assert (
        pair["differences"]
        == json.loads((folder / "differences.json").read_text())["pairs"][0]["differences"]
    )


def test_a_run_made_later_attacks_its_partner_too(made, tmp_path):
    folder, rows = made
    shutil.copytree(folder, tmp_path / "all")
    content = json.loads((folder / "l2_pgd-at-seed0.json").read_text())
    content["last"].pop("transfer")
    ResultStore(tmp_path / "all").write("l2_pgd-at-seed0", content["inputs"], content)
    again = reproduce(make_quick(settings()), tmp_path / "all", FAST, only=["l2 sglr-reference"])
    assert [row["last"]["transfer"] for row in again] == [row["last"]["transfer"] for row in rows]


def test_every_run_resolves_to_its_setting():
    study = settings()
    made = {run.name: resolve([*study.protocol, *run.protocol, *run.arguments]) for run in study.runs}
    assert made["preact-resnet18 pgd-at"].net.name == "preact_resnet18"
    assert made["wrn34-10 pgd-at"].net.name == "wrn34_10"
    assert made["wrn34-10 pgd-at"].optim.epochs >= 40
    assert (made["l2 sglr-reference"].recipe.threat.norm, float(made["l2 pgd-at"].recipe.threat.eps)) == (
        "l2",
        0.5,
    )
    assert type(made["fgsm-rs pgd-at"].recipe.objective).__name__ == "FGSMRS"
    assert type(made["fgsm-rs sglr-reference"].recipe.label).__name__ == "SGLR"
    assert made["svhn pgd-at"].optim.lr == 0.01
    for first, second in study.pairs:
        one, other = made[first], made[second]
        assert (one.data, one.net, one.optim, one.recipe.threat) == (
            *(other.data, other.net, other.optim, other.recipe.threat),
        )
        assert type(one.recipe.objective) is type(other.recipe.objective)


@pytest.mark.parametrize(
    ("words", "only", "said"),
    [
        ([], ["l3"], r"^--only: got 'l3'; accepted: cifar10, preact-resnet18, .*l2 pgd-at"),
        (["--data.source", "x"], [], r"^--data\.source: got one source for runs on .*hf:uoft-cs/cifar10"),
    ],
    ids=["only", "source"],
)
def test_bad_words_are_refused_before_anything_runs(tmp_path, words, only, said):
    with pytest.raises(SettingError, match=said):
        reproduce(settings(), tmp_path, words, only=only)
    assert list(tmp_path.iterdir()) == []
