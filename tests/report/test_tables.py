from __future__ import annotations

import math

import pytest

from softdefend.report.tables import (
    Estimate,
    attack_label,
    comparison_rows,
    default_attack,
    markdown_table,
    percent,
    text_table,
)


@pytest.fixture
def runs(make_run, make_evaluation) -> list:
    return [
        make_run("A", 0, best=make_evaluation(0.90, 0.50), last=make_evaluation(0.92, 0.40)),
        make_run("B", 0, best=make_evaluation(0.80, 0.60), last=make_evaluation(0.81, 0.58)),
        make_run("A", 1, best=make_evaluation(0.94, 0.54), last=make_evaluation(0.94, 0.48)),
        make_run("A", 2, best=make_evaluation(0.92, 0.52)),
    ]


def test_means_and_standard_deviations_by_hand(runs) -> None:
    a, b = comparison_rows(runs)
    assert (a.recipe, a.seeds, a.runs, a.attack) == ("A", (0, 1, 2), 3, "pgd-20")
    assert a.clean.best is not None
    assert a.clean.best.mean == pytest.approx(0.92)
    assert a.clean.best.std == pytest.approx(math.sqrt((0.02**2 + 0.02**2) / 2))
    assert (a.clean.best.n, a.clean.best.interval) == (3, None)
    assert a.robust.last is not None
    assert a.robust.last.mean == pytest.approx(0.44)
    assert a.robust.last.std == pytest.approx(math.sqrt(0.04**2 + 0.04**2))
    # only seeds 0 and 1 have both checkpoints: differences 0.10 and 0.06
    assert a.robust.difference is not None
    assert a.robust.difference.mean == pytest.approx(0.08)
    assert a.robust.difference.std == pytest.approx(0.02 * math.sqrt(2))
    assert a.robust.difference.n == 2
    assert b.robust.last == Estimate(0.58, None, 1, (pytest.approx(0.53), pytest.approx(0.62)))
    assert b.robust.difference == Estimate(pytest.approx(0.02), None, 1)


def test_text_table(runs) -> None:
    head, names, rule, a, b = text_table(comparison_rows(runs)).splitlines()
    assert "clean %" in head
    assert "PGD-20 %" in head
    assert names.split() == ["recipe", "seeds", "|", "best", "last", "diff", "|", "best", "last", "diff"]
    assert " ".join(a.split()) == (
        "A 3 | 92.00 ± 2.00 93.00 ± 1.41 -1.00 ± 1.41 | 52.00 ± 2.00 44.00 ± 5.66 +8.00 ± 2.83"
    )
    assert " ".join(b.split()) == "B 1 | 80.00 81.00 -1.00 | 60.00 58.00 +2.00"
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in (head, names, a, b)}) == 1
    assert len(a) == len(b) == len(names) == len(rule)


def test_one_seed_has_no_standard_deviation(runs) -> None:
    assert "±" not in text_table(comparison_rows([runs[1]]))
    assert "±" not in markdown_table(comparison_rows([runs[1]]))


def test_what_is_not_there_is_a_dash(make_run, make_evaluation) -> None:
    rows = comparison_rows([make_run("A"), make_run("B", last=make_evaluation(0.9, 0.5))])
    lines = text_table(rows).splitlines()
    assert lines[-2].split() == ["A", "1", "|", "–", "–", "–", "|", "–", "–", "–"]
    assert lines[-1].split() == ["B", "1", "|", "–", "90.00", "–", "|", "–", "50.00", "–"]


def test_no_runs_at_all() -> None:
    assert comparison_rows([]) == []
    assert "recipe" in text_table([])
    assert markdown_table([]).startswith("| recipe")


def test_markdown_table(runs) -> None:
    lines = markdown_table(comparison_rows(runs)).splitlines()
    assert lines[0].startswith("| recipe | seeds | clean best | clean last | clean diff | PGD-20 best |")
    assert lines[3] == "| B | 1 | 80.00 | 81.00 | -1.00 | 60.00 | 58.00 | +2.00 |"
    assert {line.count("|") for line in lines} == {9}


def test_markdown_names_cannot_break_the_table(make_run) -> None:
    line = markdown_table(comparison_rows([make_run("a|b\n<i>c")])).splitlines()[-1]
    assert line.startswith("| a\\|b &lt;i>c | 1 |")


@pytest.mark.parametrize(
    ("name", "other"),
    [("seed", 5), ("precision", "fast"), ("batch_size", 10), ("eps", "4/255"), ("subset", "first")],
)
def test_figures_of_other_settings_are_not_subtracted(make_run, make_evaluation, name, other) -> None:
    settings = {"norm": "linf", "eps": "8/255", "seed": 0, "precision": "exact", "batch_size": 500}
    settings |= {"size": 100, "subset": "stratified"}
    for changed in ({}, {name: other}):
        best = make_evaluation(0.8, 0.6) | {"settings": settings | changed}
        last = make_evaluation(0.9, 0.5) | {"settings": settings}
        (row,) = comparison_rows([make_run("A", best=best, last=last)])
        assert (row.clean.best, row.clean.last) != (None, None)
        assert (row.clean.difference is None) is bool(changed)


def test_a_seed_that_was_run_twice_is_shown(make_run) -> None:
    rows = comparison_rows([make_run("A", 0), make_run("A", 0), make_run("A", 1)])
    assert "2 (3 runs)" in text_table(rows)


def test_the_attack_can_be_chosen(make_run, make_evaluation) -> None:
    attacks = {"fgsm": {"rate": 0.7}, "square": {"rate": 0.6}}
    runs = [make_run(last=make_evaluation(0.9, 0.5, attacks=attacks))]
    assert default_attack(runs) == "fgsm"
    rates = {name: comparison_rows(runs, name)[0].robust.last for name in (*attacks, "worst")}
    assert {name: cell.mean for name, cell in rates.items() if cell} == {
        "fgsm": 0.7,
        "square": 0.6,
        "worst": 0.5,
    }
    assert comparison_rows(runs, "pgd-20")[0].robust.last is None
    assert default_attack([make_run()]) == "pgd-20"


def test_names_as_people_write_them() -> None:
    assert [attack_label(name) for name in ("pgd-20", "fgsm", "square", "MyAttack")] == [
        "PGD-20",
        "FGSM",
        "Square",
        "MyAttack",
    ]


def test_per_cent() -> None:
    assert percent(Estimate(0.12345, 0.006, 3)) == "12.35 ± 0.60"
    assert percent(Estimate(-0.01, None, 1), signed=True) == "-1.00"
    assert percent(Estimate(-1e-9, None, 1), signed=True) == "+0.00"
    assert percent(None) == "–"
