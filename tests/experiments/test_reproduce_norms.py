"""The study of norms on digits: three threats and their union, a run that starts from another one."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from softdefend.cli.evaluate import FLAGS, EvaluateFlags
from softdefend.core.digest import file_digest
from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.experiments import pipeline
from softdefend.experiments.config import resolve
from softdefend.experiments.reproduce import make_quick, norms, reproduce

FAST = [
    *("--runtime.threads", "1", "--progress", "false", "--optim.epochs", "2", "--data.train_size", "64"),
    *("--evaluate.size", "32", "--data.validation", "20", "--validate.test_size", "0"),
    *("--evaluate.attacks", "[pgd-2, fgsm]"),
]
ENDS = {"linf": "", "l2": "-l2-0.5", "l1": "-l1-2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("norms")
    return folder, reproduce(make_quick(norms()), folder, FAST, only=["linf", "e-at-tuned"])


def test_the_table_counts_each_threat_and_their_union_image_by_image(made):
    folder, rows = made
    assert [row["name"] for row in rows] == ["linf", "e-at-tuned"]
    for row in rows:
        for which in ("best", "last"):
            tables = {
                norm: pq.read_table(
                    folder / f"{row['name']}-seed0/evaluation/{which}{end}.parquet"
                ).to_pandas()
                for norm, end in ENDS.items()
            }
            robust = {norm: table["pgd-2/robust"] & table["fgsm/robust"] for norm, table in tables.items()}
            expected = {norm: flags.mean() for norm, flags in robust.items()}
            expected["union"] = np.logical_and.reduce(list(robust.values())).mean()
            expected["clean"] = (tables["l1"].clean_prediction == tables["l1"].label).mean()
            assert {name: row[which][name] for name in expected} == pytest.approx(expected)
            assert len(tables["l2"]) == 32
    head = (folder / "table.md").read_text().splitlines()[0]
    assert [cell.strip() for cell in head.split("|") if cell.strip().endswith("last")] == [
        f"{measure} last" for measure in ("clean", "linf", "l2", "l1", "union")
    ]
    (pair,) = json.loads((folder / "differences.json").read_text())["pairs"]
    union = pair["differences"]["union"]
    assert (union["first"], union["second"]) == tuple(row["last"]["union"] for row in rows)
    assert "<svg" in (folder / "figure.svg").read_text()


def test_fine_tuning_starts_at_the_last_weights_and_keeps_its_own_schedule(made):
    folder, rows = made
    config = yaml.safe_load((folder / "e-at-tuned-seed0/config.yaml").read_text())
    assert config["init_sha256"] == file_digest(folder / "linf-seed0/last.safetensors")
    assert [len(row["curve"]) for row in rows] == [2, 3]
    rates = [line["lr"] for line in rows[1]["curve"]]
    assert rates == pytest.approx([0.01, 0.001, 0.0001])


def test_what_a_run_starts_from_has_to_be_there_and_of_the_same_settings(made, tmp_path):
    with pytest.raises(SettingError, match=r"^--only: got e-at-tuned without linf.*linf-seed0"):
        reproduce(make_quick(norms()), tmp_path, FAST, only=["e-at-tuned"])
    (tmp_path / "linf-seed0").symlink_to(made[0] / "linf-seed0")
    with pytest.raises(SettingError, match=r"^--only: got e-at-tuned without linf"):
        reproduce(make_quick(norms()), tmp_path, [*FAST, "--optim.lr", "0.05"], only=["e-at-tuned"])
    assert [path.name for path in tmp_path.iterdir()] == ["linf-seed0"]
    # Rows of two machines join: one has made PGD-AT and sends its row.
    shutil.copytree(made[0] / "e-at-tuned-seed0", tmp_path / "e-at-tuned-seed0")
    shutil.copy(made[0] / "linf-seed0.json", tmp_path)
    rows = reproduce(make_quick(norms()), tmp_path, FAST, only=["e-at-tuned"])
    assert [(row["name"], row["last"]) for row in rows] == [(row["name"], row["last"]) for row in made[1]]


@pytest.mark.parametrize("quick", [False, True])
def test_every_run_is_trained_in_balls_that_it_is_evaluated_in(quick):
    study = make_quick(norms()) if quick else norms()
    balls = {threat.norm: threat for threat in study.threats}
    assert balls["linf"] == (ThreatModel("linf", "0.1") if quick else ThreatModel("linf", "8/255"))
    if not quick:
        assert balls == {
            norm: ThreatModel(norm, eps) for norm, eps in [("linf", "8/255"), ("l2", "128/255"), ("l1", "12")]
        }
    for run in study.runs:
        experiment = resolve([*study.protocol, *run.arguments, *run.fixed])
        recipe = experiment.recipe
        assert recipe.threat == balls[run.name if run.name in balls else "linf"]
        step = recipe.attack.step_size
        assert (step is None) == (run.name in ("l2", "l1"))
        if run.name in balls:
            assert type(recipe.objective).__name__ == "PGDAT"
            continue
        trained = {norm: getattr(recipe.objective, norm) for norm in balls}
        expected = {norm: str(ball.eps) for norm, ball in balls.items()}
        assert trained == (expected | {"l2": None} if "e-at" in run.name else expected)
    hows = [resolve([*run.arguments]).recipe.objective.how for run in study.runs[3:]]
    assert hows == ["mixed", "max", "average", "msd", "mixed"]


@pytest.mark.parametrize("word", ["--threat.eps", "--objective.l1", "--objective.init_args.l2", "--preset"])
def test_balls_are_no_override(tmp_path, word):
    with pytest.raises(SettingError, match=f"^{word}: got"):
        reproduce(make_quick(norms()), tmp_path, [word, "1"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--evaluate.targeted", "next"], r"evaluate\.targeted: got next"),
        (["--evaluate", '{"targeted": "3"}'], r"evaluate\.targeted: got 3"),
        (["--evaluate.attacks", "[]"], r"evaluate\.attacks: got none"),
        (["--evaluate.attacks", "[pgd-2, hop-skip-jump-10]"], r"threat\.norm: got l1"),
        (["--evaluate.attacks", "[autoattack-plus]"], r"threat\.norm: got l1"),
    ],
)
def test_an_evaluation_without_the_figures_of_the_table_is_refused_before_a_training(tmp_path, words, said):
    with pytest.raises(SettingError, match=f"^{said}"):
        reproduce(make_quick(norms()), tmp_path, words, only=["linf"])
    assert list(tmp_path.iterdir()) == []


def test_in_parallel_a_run_waits_for_its_start_and_other_threats_for_the_run(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(pipeline, "run_all", lambda given, parallel, spread: jobs.extend(given))
    words = ["--config", "digits_demo", "--threat.eps", "0.1"]
    runs = {name: [*words, f"--folder={tmp_path / name}"] for name in ("a", "b")}
    threats = make_quick(norms()).threats
    pipeline.train_all(runs, parallel=2, after={"b": "a"}, threats=threats)
    assert {job.name: job.after for job in jobs} == {
        "a": (),
        "b": ("a",),
        "a, other threats": ("a",),
        "b, other threats": ("b",),
    }
    flags = FLAGS.read(jobs[3].command("cuda")[4:]).make(EvaluateFlags)
    assert flags.run == (str(tmp_path / "b"),)
    assert [ThreatModel(*each) for each in zip(flags.norm, flags.eps, strict=True)] == list(threats[1:])
