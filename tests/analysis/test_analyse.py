"""The two commands from words to files."""

from __future__ import annotations

import csv
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from softdefend.analysis import command
from softdefend.analysis.figures import surface_plot
from softdefend.analysis.label_audit import DEFAULT_SCORE, SCORES
from softdefend.analysis.label_audit import predictions as all_predictions
from softdefend.cli import analyze, labels
from softdefend.core.errors import SettingError

_QUICK = """
    --probe 40 --whole 8 --chunk 4 --test 40 --steps 2 --bins 5 --components 3 --points 3 --eigen_steps 5
    --linearity_steps 2 --contrast_steps 20 --batch_size 16 --device cpu --progress false
"""
QUICK = _QUICK.split()


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
    analyze.run([str(refined), str(plain), "--output", str(output), *QUICK])
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
    monkeypatch.setattr(command, "open_subject", never)
    analyze.run([str(refined), str(plain), "--output", str(output), *QUICK])
    assert contents(output) == before


def test_an_interrupted_analysis_goes_on(refined, tmp_path, monkeypatch):
    words = [str(refined), "--output", str(tmp_path / "out"), "--which", "last", *QUICK]
    words += ["--parts", "gradients", "geometry"]
    calls: list[str] = []
    measure = command.gradients.measure

    def counted(*given: object, **more: object) -> dict[str, object]:
        calls.append("gradients")
        return measure(*given, **more)

    def interrupted(*_: object, **__: object) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.gradients, "measure", counted)
    with monkeypatch.context() as once:
        once.setattr(command.landscape, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            analyze.run(words)
    analyze.run(words)
    assert calls == ["gradients"]
    assert len(list((tmp_path / "out" / "results").iterdir())) == 2


def test_other_settings_are_measured_anew(analyzed, refined):
    output = analyzed[0]
    before = set(contents(output / "results"))
    analyze.run(
        [
            str(refined),
            "--output",
            str(output),
            *QUICK,
            "--parts",
            "geometry",
            "--which",
            "last",
            "--points",
            "0",
        ]
    )
    assert len(set(contents(output / "results")) - before) == 1
    assert json.loads((output / "analysis.json").read_text())["geometry"][0]["result"]["surface"] is None


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
    analyze.run([str(run), "--output", str(tmp_path / "out"), *QUICK, "--which", "checkpoints"])
    page = Page((tmp_path / "out" / "analysis.html").read_text())
    drawn = {alt.split(". ")[0]: alt for alt in page.alts if alt and "by epoch" in alt}
    assert {f"Line chart: {title}" for title in COURSES} <= set(drawn)
    rows = json.loads((tmp_path / "out" / "analysis.json").read_text())["gradients"]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    first, last = (rows[i]["result"]["last_layer"]["adversarial"]["given"]["wrong_mean"] for i in (0, -1))
    assert f"wrong labels: {first:.3g} at 1 to {last:.3g} at 4" in drawn[f"Line chart: {COURSES[0]}"]
    assert COURSES[0] not in (analyzed[0] / "analysis.html").read_text()  # best and last are no course


def test_a_reference_network_judges_where_the_truth_is_not_known(plain, tmp_path):
    words = [str(plain), "--output", str(tmp_path), *QUICK, "--parts", "gradients", "--which", "last"]
    analyze.run(words)
    unknown = json.loads((tmp_path / "analysis.json").read_text())["gradients"][0]["result"]
    assert unknown["judged_by"] == "unknown"
    assert unknown["memorisation"] == {}
    analyze.run([*words, "--reference", str(plain)])
    judged = json.loads((tmp_path / "analysis.json").read_text())["gradients"][0]["result"]
    assert judged["judged_by"].startswith("disagreement with")
    share = judged["last_layer"]["clean"]["given"]["fraction_wrong"]
    assert judged["memorisation"]["clean"]["wrong"] == round(40 * share) > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("RUN --parts nonsense", "--parts: got 'nonsense'"),
        ("RUN --which newest", "--which: got 'newest'"),
        ("RUN --probe 3", "--probe: got 3"),
        ("RUN --points 4", "--points: got 4"),
        ("RUN --span 0", "--span: got 0"),
        ("RUN --probe many", "probe: got many"),
        ("RUN --depth 3", "depth: got an unknown setting"),
        ("RUN --output RUN/analysis", "inside the run"),
        ("RUN --reference /no/such/run --parts gradients", "run folder: got /no/such/run"),
        ("/no/such/run", "run folder: got /no/such/run"),
        ("RUN --device tpu", "runtime.device: got 'tpu'"),
        ("", "run: got nothing"),
    ],
)
def test_analyze_refuses_in_one_line(words, said, refined):
    with pytest.raises(SettingError, match=re.escape(said)) as caught:
        analyze.run(words.replace("RUN", str(refined)).split())
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def audited(refined, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("audit")
    labels.run(
        ["audit", str(refined), "--output", str(output), "--top", "12", "--at", "10", "--device", "cpu"]
    )
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


def test_a_run_without_a_memory_is_one_line(plain, tmp_path):
    with pytest.raises(SettingError, match=r"holds no label memory \(Hard and PGDAT\)"):
        labels.run(["audit", str(plain), "--output", str(tmp_path), "--device", "cpu"])
    assert list(tmp_path.iterdir()) == []


def test_predictions_rank_the_labels_of_a_run_without_a_memory(plain, tmp_path):
    words = ["audit", str(plain), "--output", str(tmp_path), "--device", "cpu", "--source", "prediction"]
    labels.run(words)
    found = command.audit_run(str(plain), source="prediction")
    believed = all_predictions(found.subject, 500)
    expected = SCORES[DEFAULT_SCORE](believed, found.subject.run.bundle.train.labels).numpy()
    with open(tmp_path / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row["score"]) == pytest.approx(expected[int(row["index"])], abs=1e-4)
    assert "network's predictions" in (tmp_path / "audit.html").read_text().replace("&#x27;", "'")
    assert json.loads((tmp_path / "audit.json").read_text())["source"] == "prediction"


def test_a_memory_that_has_not_moved_is_refused(tiny_run):
    run = tiny_run("--label SGLR --label.start 1")
    for path in sorted((run / "checkpoints").glob("step-*.ckpt"))[-1:]:
        path.unlink()  # the last epoch refines
    (run / "last.safetensors").unlink()
    with pytest.raises(SettingError, match="label memory still is the given labels"):
        command.audit_run(str(run))


def test_votes_that_are_not_there_are_refused_also_beside_kept_results(refined, tmp_path):
    words = ["--parts", "labels", "--which", "last"]
    words = [str(refined), "--output", str(tmp_path / "out"), *QUICK, *words]
    analyze.run(words)
    for flag in ("--train_votes", "--test_votes"):
        with pytest.raises(SettingError, match=f"{flag}: got /nowhere.npz"):
            analyze.run([*words, flag, "/nowhere.npz"])


def test_a_surface_with_holes_is_drawn_and_said():
    axis = [-1.0, 0.0, 1.0]
    plot = surface_plot("Loss", axis, [[1.0, 2.0, None], [1.0, None, 2.0], [3.0, 2.0, 1.0]], "#000000")
    assert "Loss not finite at the network, 1 at the lowest, 3 at the highest point" in plot.alt
    nothing = surface_plot("Loss", axis, [[None] * 3] * 3, "#000000")
    assert "nowhere finite" in nothing.alt


def test_without_cleanlab_the_baseline_is_left_out_or_refused(refined, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    monkeypatch.setattr(command, "installed", lambda: False)
    found = command.audit_run(str(refined))
    assert not any(line["name"].startswith("cleanlab") for line in found.comparison)
    with pytest.raises(SettingError, match=r"softdefend\[analysis\]"):
        command.audit_run(str(refined), baseline=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("repair RUN", "labels: got 'repair'"),
        ("audit RUN --score luck", "--score: got 'luck'"),
        ("audit RUN --source luck", "--source: got 'luck'"),
        ("audit RUN --top 0", "--top: got 0"),
        ("audit RUN --output RUN", "inside the run"),
        ("audit", "run: got nothing"),
    ],
)
def test_the_audit_refuses_in_one_line(words, said, refined):
    with pytest.raises(SettingError, match=re.escape(said)):
        labels.run(words.replace("RUN", str(refined)).split())
