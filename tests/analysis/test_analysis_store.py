from __future__ import annotations

import json
import math

from softdefend.analysis.store import finite, kept


def test_a_result_is_computed_once_for_an_identity(tmp_path):
    calls: list[int] = []

    def compute() -> dict[str, object]:
        calls.append(1)
        return {"value": 1.5, "absent": math.nan}

    identity = {"part": "gradients", "weights": "abc", "settings": {"probe": 10}}
    first = kept(tmp_path, identity, compute)
    assert first == kept(tmp_path, {**identity}, compute) == {"value": 1.5, "absent": None}
    assert len(calls) == 1
    kept(tmp_path, {**identity, "weights": "abd"}, compute)
    assert len(calls) == 2


def test_a_damaged_or_foreign_file_counts_as_absent(tmp_path):
    identity = {"part": "labels", "weights": "abc"}
    kept(tmp_path, identity, lambda: {"value": 1})
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-20])
    assert kept(tmp_path, identity, lambda: {"value": 2}) == {"value": 2}
    path.write_text(json.dumps({"identity": {"part": "other"}, "result": {"value": 9}}))
    assert kept(tmp_path, identity, lambda: {"value": 3}) == {"value": 3}


def test_what_json_cannot_write_becomes_none():
    assert finite({"a": [math.inf, 1, (2.0, math.nan)], 3: "x"}) == {"a": [None, 1, [2.0, None]], "3": "x"}
