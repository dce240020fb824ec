"""Evaluations of one checkpoint under several threats on the page, from small files by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from page_tools import read

from softdefend.core.store import ResultStore
from softdefend.report.runs import read_run

LABEL = np.array([0, 0, 1, 1, 2, 2, 3, 3])
ROBUST = {
    "best": ("linf", "8/255", 0b11110000),
    "best-l2-0.5": ("l2", "0.5", 0b00111100),
    "best-l0-24": ("l0", "24", 0b11111110),
    "best-l2-0.5-targeted-next": ("l2", "0.5", 0b11111111),
}


@pytest.fixture
def folder(make_run, make_evaluation) -> Path:
    made: Path = make_run("a").folder
    for name in ROBUST:
        write(made, make_evaluation, name)
    return made


def write(
    made: Path, make_evaluation, name: str, first: int = 0, weights: str = "w", by: str = "pgd-20"
) -> None:
    norm, eps, bits = ROBUST[name]
    robust = np.array([bool(bits >> (7 - i) & 1) for i in range(8)])
    share = float(robust.mean())
    rate = {"count": int(robust.sum()), "n": 8, "rate": share, "low": share - 0.05, "high": share + 0.05}
    more = {"norm": norm, "eps": eps, "weights": weights, "test_data": "d", "n": 8, "worst": rate}
    attack = {**rate, "forwards": 160, "backwards": 160, "seconds": 1.0}
    result = {**make_evaluation(1.0, share, **more), "attacks": {by: attack}}
    ResultStore(made / "evaluation").write(name, {}, result)
    columns = {"index": np.arange(first, first + 8), "label": LABEL, "clean_prediction": LABEL}
    columns |= {f"{by}/prediction": LABEL, f"{by}/distance": np.zeros(8, np.float32)}
    table = pa.table({**columns, f"{by}/robust": robust})
    pq.write_table(table, made / "evaluation" / f"{name}.parquet")


def rows_of(folder: Path, tmp_path: Path) -> list[list[str]]:
    rows = read([read_run(folder)], tmp_path).rows
    heads = [i for i, row in enumerate(rows) if row[-1:] == ["union"]]
    return [] if not heads else rows[heads[0] : heads[0] + 2]


def test_the_union_is_what_all_threats_leave(folder, tmp_path) -> None:
    head, row = rows_of(folder, tmp_path)
    assert head == ["recipe", "checkpoint", "images", "clean", "linf 8/255", "l0 24", "l2 0.5", "union"]
    shares = [cell.split("[")[0].strip() for cell in row[3:]]
    assert shares == ["100.00", "50.00", "87.50", "50.00", "25.00"]  # images 2 and 3 in all
    assert not any("images" in cell for cell in row[3:])
    assert row[1:3] == ["best", "8"]


def test_other_images_have_no_union_and_other_weights_no_column(folder, tmp_path, make_evaluation) -> None:
    write(folder, make_evaluation, "best-l0-24", weights="others")
    write(folder, make_evaluation, "best-l2-0.5", first=3)
    head, row = rows_of(folder, tmp_path)
    assert head[4:] == ["linf 8/255", "l2 0.5", "union"]
    assert [", 8 images" in cell for cell in row[4:-1]] == [True, True]
    assert row[-1] == "–"


def test_a_result_without_its_table_is_left_out(folder, tmp_path) -> None:
    for name in ("best-l0-24", "best-l2-0.5"):
        assert rows_of(folder, tmp_path)
        (folder / "evaluation" / f"{name}.parquet").unlink()
    assert rows_of(folder, tmp_path) == []


def test_each_threat_names_its_own_attacks(folder, tmp_path, make_evaluation) -> None:
    assert "In the worst case of PGD-20." in read([read_run(folder)], tmp_path).text["html"][0]
    write(folder, make_evaluation, "best-l2-0.5", by="apgd-ce")
    text = read([read_run(folder)], tmp_path).text["html"][0]
    assert "(linf 8/255: PGD-20; l0 24: PGD-20; l2 0.5: APGD-CE)" in text
