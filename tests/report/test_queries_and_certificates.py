"""Success against queries, certificates and the quality of attacks on the page, from small files by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_tools import Page, read

from softdefend.core.errors import SettingError
from softdefend.evaluation.table import read_table
from softdefend.report.robustness import by_radius, success_by_queries
from softdefend.report.runs import read_run

ABOUT = {"weights": 64 * "a", "test_data": 64 * "b", "norm": "linf", "eps": "8/255", "epoch": 2}
LABEL, CLEAN = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1])
ROBUST = np.array([True, False, False, False, True, False])
FORWARDS = np.array([100, 7, 30, 1, 101, 30])


def rate(value: float) -> dict:
    return {"rate": value, "count": round(6 * value), "n": 6, "low": value - 0.1, "high": value + 0.1}


def write_table(path: Path, *, known: bool = True) -> None:
    forwards = pa.array(FORWARDS, mask=np.array([not known] + [False] * 5))
    columns = {"index": np.arange(6), "label": LABEL, "clean_prediction": CLEAN}
    columns |= {"surfree/prediction": LABEL, "surfree/distance": np.full(6, 0.03, np.float32)}
    pq.write_table(pa.table({**columns, "surfree/robust": ROBUST, "surfree/forwards": forwards}), path)


CERTIFICATE = {
    **ABOUT,
    "norm": "l2",  # a certificate is about the network, not about the threat
    "n": 6,
    "abstained": 1,
    "average_radius": 0.21,
    "settings": {"sigma": 0.25, "samples": 1000, "alpha": 0.001},
    "curve": [{"radius": 0.0, **rate(0.8)}, {"radius": 0.25, **rate(0.5)}],
    "empirical": [{"radius": 0.0, **rate(0.9)}, {"radius": 0.25, **rate(0.6)}],
}
QUALITY = {
    **ABOUT,
    "n": 6,
    "grid": [0.0, 0.1, 0.2],
    "curves": {"best known": [0.8, 0.4, 0.0], "fmn": [0.8, 0.5, 0.2]},
    "attacks": {
        "fmn": {"optimality": 0.75, "found": 5, "closest": 3, "median_distance": 0.1, "median_ratio": None}
    },
}


@pytest.fixture
def folder(make_run, make_evaluation) -> Path:
    best = make_evaluation(0.8, 0.3)
    attack = {**rate(0.3), "forwards": 269, "backwards": 0, "seconds": 1.0}
    best |= {**ABOUT, "n": 6, "clean": rate(0.8), "attacks": {"surfree": attack}, "worst": rate(0.3)}
    folder: Path = make_run(best=best).folder
    write_table(folder / "evaluation" / "best.parquet")
    for name, content in (("certificate", CERTIFICATE), ("optimality", QUALITY)):
        (folder / "evaluation" / f"best-{name}.json").write_text(json.dumps(content))
    return folder


def page(folder: Path, tmp_path: Path) -> Page:
    return read([read_run(folder)], tmp_path)


def test_success_is_counted_by_hand(folder) -> None:
    """Five of six images are right; one falls after 7 forwards, two after 30, and one was asked 101 times."""
    table = read_table(folder / "evaluation" / "best.parquet")
    assert table is not None
    line = success_by_queries(table, "surfree")
    assert line is not None
    assert line.x == (0, 7, 30, 101)
    assert line.y == pytest.approx((0, 20, 60, 60))
    write_table(folder / "evaluation" / "best.parquet", known=False)
    table = read_table(folder / "evaluation" / "best.parquet")
    assert table is not None
    assert success_by_queries(table, "surfree") is None


def test_a_curve_has_its_interval(folder) -> None:
    line = by_radius(CERTIFICATE["curve"])
    assert line is not None
    assert line.y == pytest.approx((80, 50))
    assert line.low == pytest.approx((70, 40))
    assert by_radius([]) is None


def test_each_has_its_section_and_says_its_figures(folder, tmp_path) -> None:
    shown = page(folder, tmp_path)
    titles = ["Success against queries", "How good are the attacks?", "Certified accuracy"]
    assert [title for title in shown.text["h2"] if title in titles] == titles
    alts = " ".join(shown.values("alt"))
    assert "0.0% at 0 and 60.0% at 101" in alts
    assert "80.0% at radius 0 and 50.0% at radius 0.25" in alts
    assert "best known falls from 80.0% to 0.0%" in alts


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("certificate", {"curve": [{"radius": 0}]}),
        ("certificate", {"settings": {}}),
        ("optimality", {"grid": 3}),
    ],
)
def test_a_damaged_file_is_refused(folder, tmp_path, name, change) -> None:
    path = folder / "evaluation" / f"best-{name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SettingError, match=f"best-{name}.json: got other content"):
        page(folder, tmp_path)


def test_what_is_about_other_weights_is_left_out(folder, tmp_path) -> None:
    for name in ("certificate", "optimality"):
        path = folder / "evaluation" / f"best-{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "weights": "other"}))
    assert not {"How good are the attacks?", "Certified accuracy"} & set(page(folder, tmp_path).text["h2"])
