"""What the page says about failures, against counts by hand in small tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_tools import Page, read
from safetensors.numpy import save_file

from softdefend.core.errors import SettingError
from softdefend.evaluation.table import read_table
from softdefend.report.page import write_report
from softdefend.report.robustness import confusion_counts
from softdefend.report.runs import read_run

# eight images of two classes; the first attack takes images 1 and 6, the second 2 and 6
LABEL = np.array([0, 0, 0, 0, 1, 1, 1, 1])
CLEAN = np.array([0, 0, 0, 1, 1, 1, 1, 1])
FIRST = np.array([0, 1, 0, 1, 1, 1, 0, 1])
SECOND = np.array([0, 0, 1, 0, 1, 1, 0, 1])

ABOUT = {"weights": 64 * "a", "test_data": 64 * "b", "norm": "linf", "eps": "8/255"}

AUDIT = {
    **ABOUT,
    "epoch": 2,
    "verdict": "suspicious",
    "summary": "Suspicious: black box.",
    "findings": [
        {
            "check": "black box",
            "figure": 0.25,
            "threshold": "above 0.01",
            "verdict": "suspicious",
            "explanation": "Square finds more than the gradient.",
            "reference": "Athalye et al. 2018",
        },
        {
            "check": "more steps",
            "figure": None,
            "threshold": "above 0.05",
            "verdict": "not measured",
            "explanation": "No image.",
            "reference": "own",
        },
    ],
}


def rate(value: float) -> dict:
    return {"rate": value, "count": round(8 * value), "n": 8}


CORRUPTIONS = {
    **ABOUT,
    "epoch": 2,
    "n": 8,
    "clean": rate(0.875),
    "corruptions": {
        "gaussian_noise": {"mean": 0.6, "severities": [rate(x) for x in (0.875, 0.75, 0.75, 0.5, 0.125)]},
        "jpeg_compression": {"mean": 0.5, "severities": [rate(0.5)] * 5},
    },
    "mean": 0.55,
}
TRANSFER = {**ABOUT, "epoch": 2, "attacks": {"transfer-pgd-20-margin-theirs": rate(0.5)}}


def write_table(path: Path, second: np.ndarray = SECOND) -> None:
    columns = {"index": np.arange(8), "label": LABEL, "clean_prediction": CLEAN}
    for name, said in (("pgd-20", FIRST), ("square", second)):
        columns[f"{name}/prediction"] = said
        columns[f"{name}/distance"] = np.full(8, 0.03, np.float32)
        columns[f"{name}/robust"] = (CLEAN == LABEL) & (said == LABEL)
    pq.write_table(pa.table(columns), path)


def write_gallery(path: Path, **about: str) -> None:
    tensors = {
        "image": np.full((4, 1, 4, 4), 0.5, np.float32),
        "index": np.array([6, 1, 4, 0]),
        "label": np.array([1, 0, 1, 0]),
        "prediction": np.array([0, 1, 1, 0]),
        "survived": np.array([0, 1, 2, 2]),
        "distance": np.array([0.03, 0.02, np.inf, np.inf], np.float32),
        "hard": np.array([1, 1, 0, 0], np.uint8),
    }
    metadata = {"classes": json.dumps(["cat", "dog"]), "attacks": "2", **ABOUT, **about}
    save_file(tensors, path, metadata=metadata)


@pytest.fixture
def folder(make_run, make_evaluation) -> Path:
    """A run with everything beside its best checkpoint."""
    attacks = {
        "pgd-20": {**rate(0.625), "forwards": 1, "backwards": 1, "seconds": 1.0},
        "square": {**rate(0.625), "forwards": 1, "backwards": 1, "seconds": 2.0},
    }
    best = make_evaluation(0.875, 0.5)
    best |= {**ABOUT, "n": 8, "clean": rate(0.875), "attacks": attacks, "worst": rate(0.5)}
    folder: Path = make_run(best=best).folder
    place = folder / "evaluation"
    write_table(place / "best.parquet")
    write_gallery(place / "best-gallery.safetensors")
    for name, content in (("audit", AUDIT), ("corruptions", CORRUPTIONS), ("transfer", TRANSFER)):
        (place / f"best-{name}.json").write_text(json.dumps(content))
    return folder


def page(folder: Path, tmp_path: Path) -> Page:
    return read([read_run(folder)], tmp_path)


HEADINGS = [
    "Accuracy after each attack",
    "What is taken for what under attack",
    "Can the gradient be trusted?",
    "Transfer attacks",
    "Accuracy under common corruptions",
    "Hardest and easiest images",
]


def test_every_part_has_its_place(folder, tmp_path) -> None:
    shown = page(folder, tmp_path)
    assert [title for title in shown.text["h2"] if title in HEADINGS] == HEADINGS
    sources = shown.values("src")
    assert len(shown.values("alt")) == len(sources)
    assert all(source.startswith("data:") for source in sources)


def test_each_attack_takes_from_what_is_left(folder, tmp_path) -> None:
    """Seven of eight are right; the first attack leaves five, the second four of these."""
    (alt,) = [alt for alt in page(folder, tmp_path).values("alt") if alt.startswith("Bar chart")]
    assert alt.endswith("clean 87.5%, PGD-20 62.5%, Square 50.0%.")


def test_one_attack_alone_is_no_waterfall(folder, make_evaluation, tmp_path) -> None:
    path = folder / "evaluation" / "best.json"
    content = json.loads(path.read_text())
    content["attacks"].pop("square")
    path.write_text(json.dumps(content))
    table = pq.read_table(folder / "evaluation" / "best.parquet")
    kept = [name for name in table.column_names if not name.startswith("square")]
    pq.write_table(table.select(kept), folder / "evaluation" / "best.parquet")
    assert "Accuracy after each attack" not in page(folder, tmp_path).text["h2"]


def test_confusion_is_counted_in_the_worst_case(folder, tmp_path) -> None:
    table = read_table(folder / "evaluation" / "best.parquet")
    assert table is not None
    # class 0: image 0 stays, 1 and 2 are fooled, 3 was wrong before; class 1: image 6 is fooled
    assert confusion_counts(table, 2).tolist() == [[1, 3], [1, 3]]
    shown = page(folder, tmp_path)
    assert ["cat", "dog", "3", "75.0"] in shown.rows
    assert ["dog", "cat", "1", "25.0"] in shown.rows
    (alt,) = [alt for alt in shown.values("alt") if alt.startswith("Heat map")]
    assert "cat taken for dog, 3 images" in alt


def test_the_audit_is_told_in_full(folder, tmp_path) -> None:
    shown = page(folder, tmp_path)
    caught = [
        "black box",
        "✗ suspicious",
        "0.25",
        "above 0.01",
        "Square finds more than the gradient.",
        "Athalye et al. 2018",
    ]
    assert shown.rows.count(caught) == 2  # openly, and among all
    assert ["more steps", "not measured", "–", "above 0.05", "No image.", "own"] in shown.rows
    assert "Suspicious: black box." in shown.text["p"]


def test_corruptions_are_a_table_shaded_by_what_is_lost(folder, tmp_path) -> None:
    shown = page(folder, tmp_path)
    assert ["gaussian noise", "87.5", "75.0", "75.0", "50.0", "12.5", "60.0"] in shown.rows
    shares = [value for tag, key, value in shown.attributes if key == "style" and value.startswith("--share")]
    # 80 times the lost share of 0.875
    lost = [0, 1 / 7, 1 / 7, 3 / 7, 6 / 7, 0.275 / 0.875]
    assert shares[:6] == [f"--share:{round(80 * x)}" for x in lost]
    assert any("55.0%" in text and "not divided by AlexNet" in text for text in shown.text["p"])


def test_transfer_attacks_stand_beside_its_own(folder, tmp_path) -> None:
    assert ["PGD-AT", "transfer-pgd-20-margin-theirs", "50.00", "50.00"] in page(folder, tmp_path).rows


def test_the_gallery_says_what_became_of_each_image(folder, tmp_path) -> None:
    captions = page(folder, tmp_path).text["figcaption"]
    assert [text for text in captions if "withstands" in text] == [
        "dog✗ becomes catwithstands 0 of 2 at 0.03",
        "cat✗ becomes dogwithstands 1 of 2 at 0.02",
        "cat✓ stayswithstands 2 of 2",
        "dog✓ stayswithstands 2 of 2",
    ]


def test_what_is_about_older_weights_is_left_out(folder, tmp_path) -> None:
    for name in ("audit", "corruptions", "transfer"):
        path = folder / "evaluation" / f"best-{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "epoch": 1}))
    path = folder / "evaluation" / "best.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n": 9}))
    assert not set(HEADINGS) & set(page(folder, tmp_path).text["h2"])


@pytest.mark.parametrize("name", ABOUT)
def test_what_is_about_another_network_or_question_is_left_out(name, folder, tmp_path) -> None:
    """One of weights, test data, norm and eps differs; the epoch is the same."""
    place = folder / "evaluation"
    for ending in ("audit", "corruptions", "transfer"):
        path = place / f"best-{ending}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: "other"}))
    write_gallery(place / "best-gallery.safetensors", **{name: "other"})
    shown = [title for title in page(folder, tmp_path).text["h2"] if title in HEADINGS]
    assert shown == HEADINGS[:2]  # of the evaluation itself


def test_many_classes_have_a_list_in_place_of_a_matrix(folder, tmp_path) -> None:
    write_table(folder / "evaluation" / "best.parquet", second=np.where(SECOND == 1, 40, SECOND))
    shown = page(folder, tmp_path)
    assert not [alt for alt in shown.values("alt") if alt.startswith("Heat map")]
    assert ["cat", "40", "1", "25.0"] in shown.rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("best-audit.json", "{", "unreadable JSON"),
        ("best-audit.json", "[1]", "a list"),
        ("best-audit.json", '{ABOUT "epoch": 2, "findings": [3]}', "other content"),
        ("best-audit.json", '{ABOUT "epoch": 2, "summary": "", "findings": []}', "other content"),
        (
            "best-corruptions.json",
            '{ABOUT "epoch": 2, "corruptions": {"a": 3}, "mean": 0.5}',
            "other content",
        ),
        ("best-transfer.json", '{ABOUT "epoch": 2, "attacks": {"a": {}}}', "other content"),
        ("best.parquet", "text", "an unreadable table"),
        ("best-gallery.safetensors", "text", "unreadable pictures"),
    ],
)
def test_broken_files_are_named_in_one_line(name, content, message, folder) -> None:
    about = json.dumps(ABOUT)[1:-1]
    (folder / "evaluation" / name).write_text(content.replace("ABOUT", f"{about},"))
    with pytest.raises(SettingError, match=message) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_hostile_words_stay_text(folder, tmp_path) -> None:
    evil = "</td><script>alert(1)</script>"
    place = folder / "evaluation"
    finding = dict.fromkeys(("check", "threshold", "verdict", "explanation", "reference"), evil)
    (place / "best-audit.json").write_text(json.dumps({**AUDIT, "summary": evil, "findings": [finding]}))
    table = {evil: CORRUPTIONS["corruptions"]["gaussian_noise"]}  # type: ignore[index]
    (place / "best-corruptions.json").write_text(json.dumps({**CORRUPTIONS, "corruptions": table}))
    (place / "best-transfer.json").write_text(json.dumps({**TRANSFER, "attacks": {evil: rate(0.5)}}))
    shown = page(folder, tmp_path)
    assert "script" not in shown.text
    assert [row for row in shown.rows if row and row[0] == evil]


def test_a_network_from_outside_has_no_learning_curves(make_run, make_evaluation, tmp_path) -> None:
    outside = make_run("theirs", metrics=[], last=make_evaluation(0.9, 0.5, epoch=None), outside={})
    shown = read([outside], tmp_path)
    assert "Learning curves" not in shown.text["h2"]
    assert "theirs keeps 50.00% accuracy under PGD-20." in shown.text["p"]
    assert any("shown as last" in text for text in shown.text["p"])
    ours = make_run("ours", last=make_evaluation(0.9, 0.4))
    assert "Learning curves" in read([ours, outside], tmp_path).text["h2"]


@pytest.mark.usefixtures("every_figure_drawn")
def test_same_files_same_page(folder, tmp_path) -> None:
    first = write_report([read_run(folder)], tmp_path / "a.html").read_bytes()
    assert write_report([read_run(folder)], tmp_path / "b.html").read_bytes() == first
