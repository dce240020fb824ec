"""Studies on digits: every run is made and gathered, a second call makes none again."""

from __future__ import annotations

import json

import pytest

from softdefend.core.errors import SettingError
from softdefend.core.store import ResultStore
from softdefend.experiments import pipeline
from softdefend.experiments.config import resolve
from softdefend.experiments.reproduce import (
    ABLATED,
    ablation,
    make_quick,
    markdown,
    noise,
    reproduce,
    robust_rate,
    table1,
)
from softdefend.labels import SGLR

FAST = ["--runtime.threads", "1", "--progress", "false", "--optim.epochs", "2", "--data.train_size", "64"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table1")
    rows = reproduce(make_quick(table1()), folder, FAST)
    return folder, rows


@pytest.mark.slow
def test_the_central_table_has_five_rows_with_best_last_and_their_difference(made):
    folder, rows = made
    assert [row["recipe"] for row in rows] == [
        *("PGD-AT", "PGD-AT + SGLR", "TRADES", "TRADES + SGLR"),
        "TRADES + SGLR, r 0.7",
    ]
    for row in rows:
        for which in ("best", "last"):
            result = json.loads(
                (folder / f"{row['name']}-seed0" / "evaluation" / f"{which}.json").read_text()
            )
            assert row[which]["clean"] == result["clean"]["rate"]
            assert row[which]["pgd-20"] == result["attacks"]["pgd-20"]["rate"]
        assert len(row["curve"]) == 2
    table = (folder / "table.md").read_text().splitlines()
    assert len(table) == 2 + 5
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    best, last = 100 * rows[0]["best"]["clean"], 100 * rows[0]["last"]["clean"]
    assert cells[2:5] == [f"{best:.1f}", f"{last:.1f}", f"{best - last:+.1f}"]
    for name in ("curves", "figure"):
        assert "<svg" in (folder / f"{name}.svg").read_text()
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_finished_runs_are_kept(made, monkeypatch):
    folder, rows = made
    monkeypatch.setattr("softdefend.training.step.TrainStep.__call__", None)  # a step would fail
    again = reproduce(make_quick(table1()), folder, FAST)
    assert [row["last"] for row in again] == [row["last"] for row in rows]


@pytest.mark.slow
def test_rows_of_an_earlier_call_join_those_made_now(made, tmp_path):
    """As where one machine made four rows and another makes the fifth."""
    folder, rows = made
    for row in rows[1:]:
        (tmp_path / f"{row['name']}-seed0.json").write_text(
            (folder / f"{row['name']}-seed0.json").read_text()
        )
    again = reproduce(make_quick(table1()), tmp_path, FAST, only=["pgd-at"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["pgd-at-seed0"]
    assert [(row["name"], row["last"]) for row in again] == [(row["name"], row["last"]) for row in rows]
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + 5


@pytest.mark.slow
def test_a_row_made_under_another_protocol_stays_out_of_the_table(made, tmp_path, caplog):
    caplog.set_level("INFO", logger="softdefend")
    folder, rows = made
    differing = {
        "sglr-reference": ("epochs", 4),
        "trades-sglr": ("optim", {"lr": 0.05}),
        "trades-sglr-paper": ("attack", {"steps": 7}),
    }
    for name, (setting, value) in differing.items():
        content = ResultStore(folder).read(f"{name}-seed0")
        inputs = content.pop("inputs")
        assert setting in inputs["protocol"]
        inputs["protocol"][setting] = value
        ResultStore(tmp_path).write(f"{name}-seed0", inputs, content)
    (tmp_path / "trades-seed0.json").write_text(json.dumps({"name": "trades", "seed": 0}))  # no row of ours
    again = reproduce(make_quick(table1()), tmp_path, FAST, only=["pgd-at"])
    assert [row["name"] for row in again] == ["pgd-at"]
    left_out = [line for line in caplog.messages if "another protocol" in line]
    assert {line.split(",")[0] for line in left_out} == {*differing, "trades"}
    assert {row["name"] for row in rows} == {*differing, "trades", "pgd-at"}


@pytest.mark.parametrize(
    "override", ["--seed=5", "--name", "--folder=x", "--resume=y", "--evaluate.attacks", "--preset=trades"]
)
def test_what_a_study_sets_itself_is_no_override(tmp_path, override):
    with pytest.raises(SettingError, match=override.partition("=")[0]):
        reproduce(make_quick(table1()), tmp_path, [override, "5"])
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_is_not_in_the_study_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"--only: got 'mart'.*trades-sglr"):
        reproduce(table1(), tmp_path, only=["mart"])


def test_a_wrong_word_is_found_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "train", None)
    with pytest.raises(SettingError, match=r"optim\.lr"):
        reproduce(make_quick(table1()), tmp_path, [*FAST, "--optim.lr", "-1"])
    assert not list(tmp_path.iterdir())


def test_every_run_of_every_study_resolves_to_what_its_row_says():
    for study in (table1(), ablation(), noise()):
        assert len({run.name for run in study.runs}) == len(study.runs)
        for run in study.runs:
            experiment = resolve([*study.protocol, *run.arguments])
            if "factor" in run.factors and run.factors["factor"] != "none":
                value = getattr(experiment.recipe.label, run.factors["factor"])
                assert str(value).removesuffix(".0") == run.factors["value"]
            if "noise" in run.factors:
                percent = round(100 * experiment.data.noise_rate)
                assert run.factors["noise"] == f"symmetric {percent}%"


def test_one_factor_at_a_time_differs_from_the_reference_in_one():
    reference, *others = ablation().runs
    base = vars(resolve(list(reference.arguments)).recipe.label)
    for run in others:
        tried = vars(resolve(list(run.arguments)).recipe.label)
        assert [key for key in base if base[key] != tried[key]] == [run.factors["factor"]]
    assert set(ABLATED) <= set(vars(SGLR()))


def test_human_labels_take_part_where_a_file_is_given(tmp_path):
    study = noise(tmp_path / "cifar10n.npz")
    assert [run.factors["noise"] for run in study.runs[-4::2]] == ["CIFAR-10N aggregate", "CIFAR-10N worst"]
    assert len(study.runs) == len(noise().runs) + 4
    assert len(make_quick(study).runs) == len(noise().runs)


def test_a_choice_is_read_off_validation_images():
    study = ablation()
    figures = {"epoch": 1, "clean": 0.1, "pgd-20": 0.1, "val_clean": 0.5, "val_robust": 0.25}
    row = {"factor": "r", "value": "0.3", "seed": 0, "best": figures, "last": figures, "hours": 1.0}
    assert markdown(study, [row]).splitlines()[2].split("|")[4:7] == [" 50.0 ", " 50.0 ", " +0.0 "]


def test_an_evaluation_without_the_attack_is_refused():
    with pytest.raises(SettingError, match="without autoattack"):
        robust_rate({"attacks": {"pgd-20": {"rate": 0.5}}}, "autoattack")
