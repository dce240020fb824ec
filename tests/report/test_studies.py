"""What a study's figures show is what its rows say."""

from __future__ import annotations

import pytest

from softdefend.report import studies
from softdefend.report.embed import svg


def row(name, seed=0, held_out="test_robust", noise="20%"):
    curve = [
        {
            "epoch": epoch,
            "lr": 0.1 if epoch < 3 else 0.01,
            "train_robust": 0.1 * epoch,
            held_out: 0.05 * epoch if epoch != 2 else None,
        }
        for epoch in (1, 2, 3)
    ]
    shares = {"clean": 0.5 + 0.1 * seed, "pgd-20": 0.25}
    last = {"clean": 0.625, "pgd-20": 0.125}
    return {
        "name": name,
        "seed": seed,
        "recipe": name,
        "noise": noise,
        "curve": curve,
        "best": shares,
        "last": last,
    }


def lines(axes):
    return [(list(line.get_xdata()), [round(y, 6) for y in line.get_ydata()]) for line in axes.lines]


@pytest.mark.parametrize("held_out", ["test_robust", "val_robust"])
def test_curves_show_every_row_and_the_drops(held_out):
    plot = studies.curves([row("a", held_out=held_out), row("b", held_out=held_out)])
    (axes,) = plot.figure.axes
    drawn = lines(axes)
    assert drawn.count(([1, 3], [5.0, 15.0])) == 2  # an epoch without validation is no point
    assert drawn.count(([1, 2, 3], [10.0, 20.0, 30.0])) == 2
    assert ([2, 2], [0, 1]) in drawn
    assert "b, seed 0: 15.0% at epoch 3" in plot.alt
    assert ("test images" if held_out == "test_robust" else "validation images") in plot.alt


def test_there_are_no_curves_where_nothing_was_held_out():
    assert studies.curves([row("a", held_out="something_else")]) is None
    assert studies.curves([]) is None


def test_best_and_last_lie_where_the_rows_say_seeds_on_one_line():
    rows = [row("a"), row("a", seed=1), row("b", noise="40%")]
    plot = studies.best_and_last(rows, ("recipe", "noise"), ("clean", "pgd-20"))
    clean, robust = plot.figure.axes
    assert [text.get_text() for text in clean.get_yticklabels()] == ["a, 20%", "b, 40%"]
    points = [line for line in lines(clean) if len(line[0]) == 1]
    assert points == [([x], [y]) for best, y in ((50.0, 0), (60.0, 0), (50.0, 1)) for x in (best, 62.5)]
    assert {x for xs, _ in lines(robust) for x in xs} == {25.0, 12.5}
    assert "a, 20%, seed 1: clean 60.0 and 62.5, pgd-20 25.0 and 12.5" in plot.alt
    assert "<svg" in svg(plot.figure)
    assert studies.best_and_last([], ("recipe",), ("clean",)) is None


def test_many_rows_have_many_colors_and_dollars_are_no_formula():
    rows = [row(f"value $ {number}") for number in range(12)]
    plot = studies.best_and_last(rows, ("recipe",), ("clean",))
    (axes,) = plot.figure.axes
    assert len({line.get_color() for line in axes.lines}) == 12
    assert "<svg" in svg(plot.figure)
