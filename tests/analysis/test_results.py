from __future__ import annotations

import math

from softdefend.analysis.results import finite


def test_what_json_cannot_write_becomes_none():
    assert finite({"a": [math.inf, 1, (2.0, math.nan)], 3: "x"}) == {"a": [None, 1, [2.0, None]], "3": "x"}
