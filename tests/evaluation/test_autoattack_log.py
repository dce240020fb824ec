"""The lines of an evaluation against the form of AutoAttack's own log."""

from __future__ import annotations

import re

import pytest
from table_tools import N, as_ensemble, count_naively, make_result, make_table

from softdefend.evaluation.autoattack_log import log_lines
from softdefend.evaluation.robustbench import STANDARD


def test_the_log_has_the_references_lines():
    table = make_table()
    lines = log_lines(make_result(table), table)
    assert lines[0] == "using standard version including apgd-ce, apgd-t, fab-t, square."
    # the pattern by which scripts read fra31/auto-attack's log
    found = [
        re.fullmatch(r"robust accuracy after ([A-Z-]+): ([\d.]+)% \(total time ([\d.]+) s\)", x)
        for x in lines
    ]
    steps = [match.groups() for match in found if match]
    counts = [count_naively(table, STANDARD[: i + 1]) for i in range(4)]
    totals = ["1.2", "3.8", "7.5", "12.5"]  # of 1.25, 2.5, 3.75 and 5 seconds
    assert steps == [
        (name.upper(), f"{100 * count / N:.2f}", total)
        for name, count, total in zip(STANDARD, counts, totals, strict=True)
    ]
    assert lines[1] == f"initial accuracy: {100 * table.right.mean():.2f}%"
    assert lines[-1] == f"robust accuracy: {100 * counts[-1] / N:.2f}%"
    # The original moves an image only once an attack has fooled the network on it.
    moved = [
        distance
        for columns in table.attacks.values()
        for right, robust, distance in zip(table.right, columns.robust, columns.distance, strict=True)
        if right and not robust
    ]
    assert lines[-2] == f"max Linf perturbation: {max(moved):.5f}"


def test_where_nothing_was_fooled_nothing_was_moved():
    table = make_table()
    for columns in table.attacks.values():
        columns.robust[:] = table.right
    assert log_lines(make_result(table), table)[-2] == "max Linf perturbation: 0.00000"


@pytest.mark.parametrize(
    ("name", "version"),
    [("autoattack", "standard"), ("autoattack-plus", "plus"), ("autoattack-rand", "rand"), ("x", "standard")],
)
def test_ensembles_have_the_references_names(name, version):
    """Another ensemble of the same members is the standard one."""
    table = as_ensemble(make_table())
    table.attacks[name] = table.attacks.pop("autoattack")
    result = make_result(table)
    members = [{"name": member, "seconds": 1.0} for member in STANDARD]
    result["attacks"][name]["members"] = members
    assert log_lines(result, table)[0].startswith(f"using {version} version including apgd-ce, apgd-t")
