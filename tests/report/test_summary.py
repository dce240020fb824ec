from __future__ import annotations

from softdefend.report.runs import group_runs
from softdefend.report.summary import data_name, heading, summary
from softdefend.report.tables import comparison_rows


def say(runs) -> str:
    return summary(group_runs(runs), comparison_rows(runs))


def test_seeds_are_compared_in_pairs(make_run, make_evaluation) -> None:
    # last checkpoint: A 40, 50, 30 and B 45, 45, 45 per cent; A wins seed 1 only
    runs = [make_run("A", s, last=make_evaluation(0.9, v)) for s, v in enumerate((0.40, 0.50, 0.30))]
    runs += [make_run("B", s, last=make_evaluation(0.9, 0.45)) for s in range(3)]
    assert say(runs) == (
        "At the last epoch B has the highest accuracy under PGD-20, 45.00% (mean of 3 runs); "
        "A has 40.00% (mean of 3 runs), 5.00 points less. "
        "B is ahead on 2 of 3 seeds that both were run with."
    )


def test_intervals_decide_what_one_run_can_say(make_run, make_evaluation) -> None:
    def pair(a: float, b: float) -> str:
        return say([make_run("A", last=make_evaluation(0.9, a)), make_run("B", last=make_evaluation(0.9, b))])

    # the intervals in these files reach from 5 points below to 4 points above
    assert "do not overlap" in pair(0.40, 0.50)
    assert "may be chance" in pair(0.42, 0.50)
    assert "A and B are level under PGD-20: 40.00% against 40.00%" in pair(0.4, 0.4)


def test_differences_are_named(make_run, make_evaluation) -> None:
    runs = [
        make_run("A", best=make_evaluation(0.9, 0.5), last=make_evaluation(0.9, 0.4)),
        make_run("B", best=make_evaluation(0.9, 0.4), last=make_evaluation(0.9, 0.42)),
    ]
    assert say(runs).endswith(
        "Best minus last checkpoint under PGD-20: +10.00 points for A, -2.00 points for B."
    )


def test_of_many_recipes_only_the_extremes_are_named(make_run, make_evaluation) -> None:
    runs = [
        make_run(f"R{i}", best=make_evaluation(0.9, 0.5), last=make_evaluation(0.9, 0.5 - v))
        for i, v in enumerate((0.02, 0.09, 0.0, 0.05, 0.01))
    ]
    text = say(runs)
    assert text.endswith("PGD-20: from +0.00 points for R2 to +9.00 points for R1.")
    assert "R4 comes next with 49.00%, 1.00 points less" in text


def test_one_recipe(make_run, make_evaluation) -> None:
    text = say([make_run("A", last=make_evaluation(0.9, 0.5))])
    assert text == "At the last epoch A keeps 50.00% accuracy under PGD-20."


def test_nothing_is_claimed_before_there_is_an_evaluation(make_run, make_row, make_evaluation) -> None:
    going = [
        make_run("A", 0),
        make_run("A", 1, metrics=[make_row(1)]),
        make_run("B", 0, metrics=[], optim={}),
    ]
    assert say(going) == "No last checkpoint has been evaluated yet. Epochs finished: A 1 to 4 of 4, B 0."
    text = say([make_run("C", last=make_evaluation(0.9, 0.5)), going[0]])
    assert text.endswith("Not evaluated yet; epochs finished: A 4 of 4.")


def test_heading(make_run, make_evaluation) -> None:
    evaluated = make_run(last=make_evaluation(0.9, 0.5, name_of_data="CIFAR-10 (JPEG mirror)"))
    assert data_name(evaluated) == "CIFAR-10 (JPEG mirror)"
    assert heading([evaluated]) == "CIFAR-10 (JPEG mirror) · ℓ∞, ε = 8/255 · small_cnn"
    other = make_run(threat={"norm": "l2", "eps": "0.5"}, net={})
    assert heading([evaluated, other, evaluated]) == (
        "CIFAR-10 (JPEG mirror) and digits · ℓ∞, ε = 8/255 and ℓ₂, ε = 0.5 · small_cnn and unknown network"
    )
