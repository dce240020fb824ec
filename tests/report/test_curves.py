from __future__ import annotations

import pytest

from softdefend.report.curves import (
    all_drops,
    by_epoch,
    by_eps,
    eps_unit,
    first_with,
    learning_rate_drops,
    refinement_start,
    trained_eps,
)
from softdefend.report.runs import group_runs


def test_one_run_is_its_own_line(make_run, make_row) -> None:
    run = make_run(metrics=[make_row(1, loss=3.0), make_row(2, loss=None), make_row(3, loss=1.0)])
    line = by_epoch([run], "loss")
    assert line is not None
    assert (line.x, line.y, line.low, line.high) == ((1, 3), (3, 1), (3, 1), (3, 1))


def test_several_runs_are_mean_lowest_and_highest(make_run, make_row) -> None:
    first = make_run("A", 0, metrics=[make_row(e, test_robust=0.5 + 0.1 * e) for e in (1, 2, 3)])
    second = make_run("A", 1, metrics=[make_row(e, test_robust=0.3) for e in (1, 2)])
    without = make_run("A", 2, metrics=[make_row(1, test_robust=None)])
    line = by_epoch([first, second, without], "test_robust", 100)
    assert line is not None
    assert line.x == (1, 2)  # the third epoch has one run only
    assert line.y == pytest.approx((45, 50))
    assert line.low == pytest.approx((30, 30))
    assert line.high == pytest.approx((60, 70))


def test_nothing_to_draw(make_run, make_row) -> None:
    one, other = make_run(metrics=[make_row(1)]), make_run(metrics=[make_row(2)])
    assert by_epoch([one], "no_such_column") is None
    assert by_epoch([one, other], "loss") is None
    assert by_eps([one], "best", 1) is None


def test_eps_curve_has_the_interval_of_one_run_and_the_range_of_several(make_run, make_evaluation) -> None:
    one, two = (
        make_run("A", 0, best=make_evaluation(0.9, 0.5)),
        make_run("A", 1, best=make_evaluation(0.8, 0.3)),
    )
    single, several = by_eps([one], "best", 255), by_eps([one, two], "best", 255)
    assert single is not None
    assert several is not None
    assert single.x == several.x == (0, 8)
    assert (single.y, single.low, single.high) == (
        pytest.approx((90, 50)),
        pytest.approx((85, 45)),
        pytest.approx((94, 54)),
    )
    assert (several.y, several.low, several.high) == (
        pytest.approx((85, 40)),
        pytest.approx((80, 30)),
        pytest.approx((90, 50)),
    )


def test_a_step_schedule_has_drops(make_run, make_row) -> None:
    rates = [0.1, 0.1, 0.1, 0.01, 0.01, 0.001]
    run = make_run("A", metrics=[make_row(e, lr=lr) for e, lr in enumerate(rates, 1)])
    other = make_run("B", metrics=[make_row(e, lr=lr) for e, lr in enumerate([1, 1, 0.5], 1)])
    assert learning_rate_drops(run) == [3, 5]
    assert all_drops(group_runs([run, other])) == [2, 3, 5]


@pytest.mark.parametrize("rates", [[0.1] * 5, [1, 0.7, 0.3, 0.1, 0.0], [0.1, 0.1, 0.08, 0.06]])
def test_a_level_or_smooth_schedule_has_none(make_run, make_row, rates: list[float]) -> None:
    assert learning_rate_drops(make_run(metrics=[make_row(e, lr=lr) for e, lr in enumerate(rates, 1)])) == []


def test_refinement_starts_where_the_phase_first_changes(make_run, make_row) -> None:
    phases = ["hard", "hard", "refined", "refined", "other"]
    run = make_run(metrics=[make_row(e, phase=phase) for e, phase in enumerate(phases, 1)])
    assert refinement_start(run) == 2
    assert refinement_start(make_run()) is None


def test_eps_is_shown_as_it_is_written(make_run, make_evaluation) -> None:
    fractions = make_run(best=make_evaluation(0.9, 0.5))
    plain = make_run(best=make_evaluation(0.9, 0.5, eps_curve=[{"eps": "0.1", "value": 0.1, "rate": 0.5}]))
    assert eps_unit([fractions]) == 255
    assert eps_unit([fractions, plain]) == 1
    assert eps_unit([make_run()]) == 1


def test_training_eps(make_run) -> None:
    assert trained_eps(make_run()) == pytest.approx(8 / 255)
    assert trained_eps(make_run(threat={"eps": 0.5})) == 0.5
    assert trained_eps(make_run(threat={"eps": "large"})) is None
    assert trained_eps(make_run(threat={})) is None


def test_first_column_with_numbers(make_run, make_row) -> None:
    groups = group_runs([make_run(metrics=[make_row(1, test_robust=None), make_row(2, test_robust=None)])])
    assert first_with(groups, ("test_robust", "val_robust")) == "val_robust"
    assert first_with(groups, ("test_robust",)) is None
