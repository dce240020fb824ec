"""Analyses and label audits of two small runs: what is measured, found again, written and shown."""

from __future__ import annotations

import csv
import html
import json
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from softdefend.analysis import (
    AnalysisRequest,
    AnalyzeSettings,
    analyze,
    analyze_runs,
    audit_run,
    label_audit,
    write_audit,
)
from softdefend.analysis.figures import surface_plot
from softdefend.analysis.label_scores import DEFAULT_SCORE, SCORES
from softdefend.analysis.parts.geometry import Geometry
from softdefend.analysis.parts.gradients import Gradients
from softdefend.analysis.probe import predict_training_images
from softdefend.core.errors import SettingError

QUICK = AnalyzeSettings(
    probe=40,
    whole=8,
    chunk=4,
    test=40,
    steps=2,
    bins=5,
    components=3,
    points=3,
    eigen_steps=5,
    linearity_steps=2,
    contrast_steps=20,
    batch_size=16,
)


def run_analysis(
    folders: list[Path], output: Path, settings: AnalyzeSettings = QUICK, **request: Any
) -> dict[str, Any]:
    """Analyze runs, and read what was written."""
    asked = AnalysisRequest(settings=settings, **request)
    analyze_runs([str(folder) for folder in folders], output, asked, torch.device("cpu"))
    found: dict[str, Any] = json.loads((output / "analysis.json").read_text())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Page(HTMLParser):
    """What is in a page: text, images, and everything that would be fetched or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.alts: list[str | None] = []
        self.foreign: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "img":
            self.alts.append(given.get("alt"))
        if tag in ("script", "link", "iframe") or not (given.get("src") or "data:").startswith("data:"):
            self.foreign.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def analyzed(refined, plain, tmp_path_factory) -> tuple[Path, dict[str, bytes], dict[str, bytes]]:
    """The results of every part for two runs, and the runs' bytes before and after."""
    output = tmp_path_factory.mktemp("output")
    before = contents(refined)
    run_analysis([refined, plain], output)
    return output, before, contents(refined)


def test_every_part_says_something_of_every_network(analyzed):
    found = json.loads((analyzed[0] / "analysis.json").read_text())
    assert list(found["overfitting"]) == ["refined", "plain"]
    for part in ("gradients", "labels", "information", "geometry"):
        networks = [(one["run"], one["weights"]) for one in found[part]]
        assert networks == [(run, which) for run in ("refined", "plain") for which in ("best", "last")]
    best, last = found["gradients"][:2]
    assert best["result"]["judged_by"] == "clean labels"
    assert set(last["result"]["last_layer"]["adversarial"]) == {"given", "refined"}
    assert set(best["result"]["last_layer"]["adversarial"]) == {"given"}
    wrong = last["result"]["memorisation"]["clean"]["wrong"]
    assert wrong == round(40 * last["result"]["last_layer"]["clean"]["given"]["fraction_wrong"])
    assert found["labels"][1]["result"]["targets"]["judged_by"] == "clean labels"
    assert found["labels"][3]["result"]["targets"] is None
    assert all(one["result"]["weights"]["clean"]["empirical"] > 0 for one in found["information"])
    center = found["geometry"][0]["result"]
    assert center["surface"]["loss"][1][1] == pytest.approx(center["loss"]["adversarial"], rel=1e-5)
    assert center["loss"]["adversarial"] >= center["loss"]["clean"]


def test_the_run_folder_is_left_as_it_was(analyzed):
    assert analyzed[1] == analyzed[2]


def test_the_page_needs_nothing_but_itself_and_describes_every_figure(analyzed):
    text = (analyzed[0] / "analysis.html").read_text()
    page = Page(text)
    assert page.foreign == []
    assert len(page.alts) >= 9
    assert all(alt and len(alt) > 20 for alt in page.alts)
    headings = ("Robust overfitting", "Gradient norms", "Label quality", "Information", "Geometry")
    assert all(any(heading in word for word in page.words) for heading in headings)
    assert 'name="viewport"' in text


def test_a_second_time_nothing_is_measured_again(analyzed, refined, plain, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    output = analyzed[0]
    before = contents(output)
    monkeypatch.setattr(analyze, "open_network", never)
    run_analysis([refined, plain], output)
    assert contents(output) == before


def test_an_interrupted_analysis_goes_on(refined, tmp_path, monkeypatch):
    asked = {"which": ("last",), "parts": ("gradients", "geometry")}
    calls: list[str] = []
    measure = Gradients.measure

    def counted(*given: object, **more: object) -> dict[str, object]:
        calls.append("gradients")
        return measure(*given, **more)

    def interrupted(*_: object, **__: object) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Gradients, "measure", counted)
    with monkeypatch.context() as once:
        once.setattr(Geometry, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_analysis([refined], tmp_path / "out", **asked)
    run_analysis([refined], tmp_path / "out", **asked)
    assert calls == ["gradients"]
    assert len(list((tmp_path / "out" / "results").iterdir())) == 2


def test_a_damaged_or_foreign_result_is_measured_again(refined, tmp_path):
    asked = {"which": ("last",), "parts": ("geometry",)}
    first = run_analysis([refined], tmp_path / "out", **asked)
    (path,) = (tmp_path / "out" / "results").iterdir()
    whole = path.read_text()
    for content in (whole[:-20], whole.replace('"seed": 0', '"seed": 1'), '{"result": {}, "epoch": 1}'):
        path.write_text(content)
        assert run_analysis([refined], tmp_path / "out", **asked) == first
        assert path.read_text() == whole


def test_other_settings_are_measured_anew(analyzed, refined):
    output = analyzed[0]
    before = set(contents(output / "results"))
    found = run_analysis([refined], output, replace(QUICK, points=0), parts=("geometry",), which=("last",))
    assert len(set(contents(output / "results")) - before) == 1
    assert found["geometry"][0]["result"]["surface"] is None


COURSES = [
    "Gradient norm towards the given labels by epoch",
    "Gradient norm towards the refined labels by epoch",
    "Wrong labels fitted by epoch",
    "Entropy of the targets by epoch",
    "ECE of the targets by epoch",
    "ECE of the predictions by epoch",
    "Information in the weights by epoch",
    "I(T; Y) by epoch, train, adversarial",
    "Largest Hessian eigenvalue by epoch",
]


def test_kept_checkpoints_show_the_course_over_training(tiny_run, analyzed, tmp_path):
    run = tiny_run(
        "--optim.epochs 4 --save.archive 1 --data.noise symmetric --data.noise_rate 0.3 --label SGLR "
        "--label.start 0.2"
    )
    rows = run_analysis([run], tmp_path / "out", which=("checkpoints",))["gradients"]
    page = Page((tmp_path / "out" / "analysis.html").read_text())
    drawn = {alt.split(". ")[0]: alt for alt in page.alts if alt and "by epoch" in alt}
    assert {f"Line chart: {title}" for title in COURSES} <= set(drawn)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    first, last = (rows[i]["result"]["last_layer"]["adversarial"]["given"]["wrong_mean"] for i in (0, -1))
    assert f"wrong labels: {first:.3g} at 1 to {last:.3g} at 4" in drawn[f"Line chart: {COURSES[0]}"]
    assert COURSES[0] not in (analyzed[0] / "analysis.html").read_text()  # best and last are no course


def test_a_reference_network_judges_where_the_truth_is_not_known(plain, tmp_path):
    asked = {"parts": ("gradients",), "which": ("last",)}
    unknown = run_analysis([plain], tmp_path, **asked)["gradients"][0]["result"]
    assert unknown["judged_by"] == "unknown"
    assert unknown["memorisation"] == {}
    judged = run_analysis([plain], tmp_path, **asked, reference=str(plain))["gradients"][0]["result"]
    assert judged["judged_by"].startswith("disagreement with")
    share = judged["last_layer"]["clean"]["given"]["fraction_wrong"]
    assert judged["memorisation"]["clean"]["wrong"] == round(40 * share) > 0


@pytest.fixture(scope="module")
def audited(refined, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("audit")
    write_audit(audit_run(str(refined), at=[10]), output, top=12)
    return output


def test_the_audit_ranks_every_label_and_knows_which_are_wrong(audited):
    with open(audited / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["index"]) for row in rows) == list(range(96))
    assert [int(row["rank"]) for row in rows] == list(range(1, 97))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores)
    assert sum(int(row["wrong"]) for row in rows) == round(0.3 * 96)


def test_the_audits_table_holds_ours_and_cleanlabs(audited):
    found = json.loads((audited / "audit.json").read_text())
    names = [line["name"] for line in found["comparison"]]
    assert {"margin (memory)", "margin (prediction)"} < set(names)
    assert sum(name.startswith("cleanlab") for name in names) == 4
    assert found["wrong"] == 29
    assert all(0 <= line["auroc"] <= 1 for line in found["comparison"])


def test_the_audits_gallery_shows_the_most_suspicious(audited):
    page = Page((audited / "audit.html").read_text())
    assert page.foreign == []
    assert sum("Training image" in (alt or "") for alt in page.alts) == 12


def test_a_run_without_a_memory_is_one_line(plain):
    with pytest.raises(SettingError, match=r"holds no label memory \(Hard and PGDAT\)"):
        audit_run(str(plain))


def test_predictions_rank_the_labels_of_a_run_without_a_memory(plain, tmp_path):
    audit = audit_run(str(plain), source="prediction")
    write_audit(audit, tmp_path)
    run = audit.network.run
    believed = predict_training_images(audit.network.net, run.train, 500)
    expected = SCORES[DEFAULT_SCORE](believed, run.bundle.train.labels).numpy()
    with open(tmp_path / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row["score"]) == pytest.approx(expected[int(row["index"])], abs=1e-4)
    assert "network's predictions" in html.unescape((tmp_path / "audit.html").read_text())
    assert json.loads((tmp_path / "audit.json").read_text())["source"] == "prediction"


def test_a_memory_that_has_not_moved_is_refused(tiny_run):
    run = tiny_run("--label SGLR --label.start 1")
    for path in sorted((run / "checkpoints").glob("step-*.ckpt"))[-1:]:
        path.unlink()  # the last epoch refines
    (run / "last.safetensors").unlink()
    with pytest.raises(SettingError, match="label memory still is the given labels"):
        audit_run(str(run))


def test_votes_that_are_not_there_are_refused_also_beside_stored_results(refined, tmp_path):
    asked = {"parts": ("labels",), "which": ("last",)}
    run_analysis([refined], tmp_path / "out", **asked)
    for name in ("train_votes", "test_votes"):
        with pytest.raises(SettingError, match=f"--{name}: got /nowhere.npz"):
            run_analysis([refined], tmp_path / "out", **asked, **{name: "/nowhere.npz"})


def test_a_surface_with_holes_is_drawn_and_said():
    axis = [-1.0, 0.0, 1.0]
    plot = surface_plot("Loss", axis, [[1.0, 2.0, None], [1.0, None, 2.0], [3.0, 2.0, 1.0]], "#000000")
    assert "Loss not finite at the network, 1 at the lowest, 3 at the highest point" in plot.alt
    nothing = surface_plot("Loss", axis, [[None] * 3] * 3, "#000000")
    assert "nowhere finite" in nothing.alt


def test_without_cleanlab_the_baseline_is_left_out_or_refused(refined, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    monkeypatch.setattr(label_audit, "cleanlab_is_installed", lambda: False)
    audit = audit_run(str(refined))
    assert not any(line["name"].startswith("cleanlab") for line in audit.comparison)
    with pytest.raises(SettingError, match=r"softdefend\[analysis\]"):
        audit_run(str(refined), baseline=True)
