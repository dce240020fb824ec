"""The table of an evaluation, and its counts, against naive loops over the samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_tools import N, as_ensemble, count_naively, make_result, make_table, rate

from softdefend.core.errors import SettingError
from softdefend.evaluation.autoattack_log import log_lines
from softdefend.evaluation.robustbench import STANDARD, model_info
from softdefend.evaluation.table import after_each, read_table


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
        "index": table.index,
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


def test_an_ensemble_counts_as_its_members(tmp_path):
    apart = make_table()
    table = as_ensemble(apart)
    assert table.after_each() == apart.after_each()
    assert table.after_each()[1][0] == "apgd-ce"
    members = [
        {"name": name, **rate(count), "seconds": 1.25 * (i + 1)}
        for i, (name, count) in enumerate(apart.after_each()[1:])
    ]
    result = make_result(table)
    result["attacks"]["autoattack"] |= {"members": members, "seconds": 12.5}
    assert after_each(result, table) == after_each(result, None) == after_each(make_result(apart), apart)
    ours, theirs = (model_info(r, t, full=N) for r, t in ((result, table), (make_result(apart), apart)))
    assert ours == theirs
    assert log_lines(result, None)[0].startswith("using standard version")
    # as it is written: null where a member was not given the sample
    fooled = table.attacks["autoattack"].fooled
    columns: dict[str, Any] = {"index": table.index, "label": table.label}
    columns["clean_prediction"] = table.clean_prediction
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


def test_a_single_attack_needs_no_records():
    table = make_table(("pgd-20",))
    result = make_result(table)
    assert after_each(result, None) == after_each(result, table)
    assert log_lines(result, None)[0] == "using custom version including pgd-20."
    several = make_result(make_table())
    with pytest.raises(SettingError, match="table"):
        after_each(several, None)
