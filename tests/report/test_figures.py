from __future__ import annotations

import itertools

import pytest
from matplotlib.colors import to_hex, to_rgb

from softdefend.report.embed import svg
from softdefend.report.figures import (
    Series,
    class_means,
    class_plot,
    colors,
    epoch_plot,
    eps_plot,
    norm_label,
)
from softdefend.report.runs import Group, group_runs

BOTH = [Series("test_robust", "test images"), Series("train_robust", "training images")]


def lines(plot) -> dict:
    return {line.get_label(): line for line in plot.figure.axes[0].lines}


def legend(plot) -> list[str]:
    return [text.get_text() for text in plot.figure.legends[0].get_texts()]


def draw(runs, series=BOTH, unit="%"):
    groups = group_runs(runs)
    return epoch_plot("Robust accuracy", groups, colors(groups), series, unit)


def test_points_are_the_metrics(make_run) -> None:
    runs = [make_run("A"), make_run("B")]
    plot = draw(runs)
    for run in runs:
        for one in BOTH:
            line = lines(plot)[f"{run.name}, {one.label}"]
            assert list(line.get_xdata()) == [row["epoch"] for row in run.metrics]
            assert list(line.get_ydata()) == pytest.approx([100 * row[one.column] for row in run.metrics])
    axes = plot.figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "Robust accuracy (%)")
    assert legend(plot) == ["A", "B", "test images", "training images"]
    assert "A, test images: 25.0% at epoch 1 and 40.0% at epoch 4." in plot.alt


def test_columns_without_a_unit_are_drawn_as_they_are(make_run) -> None:
    plot = draw([make_run("A")], [Series("loss", "")], "")
    assert list(lines(plot)["A, "].get_ydata()) == pytest.approx([2, 1, 2 / 3, 0.5])


def test_several_seeds_are_a_mean_with_a_band(make_run, make_row) -> None:
    runs = [
        make_run("A", seed, metrics=[make_row(1, test_robust=v)]) for seed, v in enumerate((0.2, 0.3, 0.7))
    ]
    plot = draw(runs, BOTH[:1])
    assert list(lines(plot)["A, test images"].get_ydata()) == pytest.approx([40])
    (band,) = plot.figure.axes[0].collections
    box = band.get_datalim(plot.figure.axes[0].transData)
    assert (box.y0, box.y1) == pytest.approx((20, 70))
    assert not draw(runs[:1], BOTH[:1]).figure.axes[0].collections


def test_a_recipe_keeps_its_color_and_dashes_tell_the_rest(make_run, make_evaluation) -> None:
    runs = [make_run(n, best=make_evaluation(0.9, 0.5), last=make_evaluation(0.9, 0.4)) for n in ("A", "B")]
    groups = group_runs(runs)
    color = colors(groups)
    epochs = lines(epoch_plot("t", groups, color, BOTH, "%"))
    eps = lines(eps_plot("t", groups, color))
    for name in ("A", "B"):
        own = [epochs[f"{name}, test images"], epochs[f"{name}, training images"]]
        own += [eps[f"{name}, best"], eps[f"{name}, last"]]
        assert [to_hex(line.get_color()) for line in own] == [color[name]] * 4
        assert [line.get_linestyle() for line in own] == ["-", "--", "-", "--"]


@pytest.mark.parametrize("count", [2, 7, 8, 15])
def test_colors_differ_and_show_on_light_and_dark(count: int) -> None:
    chosen = [to_rgb(c) for c in colors([Group(f"recipe {i}", ()) for i in range(count)]).values()]
    distance = min(
        sum(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in itertools.combinations(chosen, 2)
    )
    assert distance > 0.1
    if count <= 7:
        brightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in chosen]
        assert min(brightness) > 0.25
        assert max(brightness) < 0.75


def test_schedule_and_refinement_are_marked(make_run, make_row) -> None:
    steps = [(1, 0.1, "hard"), (2, 0.1, "refined"), (3, 0.1, "refined"), (4, 0.01, "refined")]
    rows = [make_row(e, lr=lr, phase=phase) for e, lr, phase in steps]
    plot = draw([make_run("A"), make_run("B", metrics=rows)])
    drawn = lines(plot)
    assert set(drawn["learning rate drops"].get_xdata()) == {3}
    assert set(drawn["label refinement starts (B)"].get_xdata()) == {1}
    assert legend(plot)[-2:] == ["learning rate drops", "label refinement starts (B)"]
    together = draw([make_run("B", metrics=rows), make_run("C", metrics=rows)])
    assert legend(together)[-1] == "label refinement starts (2 recipes)"


def test_best_checkpoint_is_marked_for_a_single_run(make_run, make_evaluation) -> None:
    run = make_run("A", best=make_evaluation(0.9, 0.5, epoch=2))
    ring = lines(draw([run]))["A, best checkpoint"]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([2], pytest.approx([30]))
    assert "best checkpoint" not in legend(draw([run, make_run("A", 1)]))


def test_a_column_nobody_has_is_left_out(make_run) -> None:
    plot = draw(
        [make_run("A")], [Series("test_clean", "test images"), Series("train_clean", "training images")]
    )
    assert legend(plot) == ["A", "test images"]
    assert draw([make_run("A")], [Series("train_clean", "training images")]) is None


def test_eps_curve(make_run, make_evaluation) -> None:
    groups = group_runs([make_run("A", best=make_evaluation(0.9, 0.5), last=make_evaluation(0.8, 0.4))])
    plot = eps_plot("t", groups, colors(groups))
    drawn = lines(plot)
    assert list(drawn["A, best"].get_xdata()) == [0, 8]
    assert list(drawn["A, best"].get_ydata()) == pytest.approx([90, 50])
    assert list(drawn["A, last"].get_ydata()) == pytest.approx([80, 40])
    assert list(drawn["ε in training"].get_xdata()) == pytest.approx([8, 8])
    assert plot.figure.axes[0].get_xlabel() == "ε of the attack, ℓ∞, in 1/255"
    box = plot.figure.axes[0].collections[0].get_datalim(plot.figure.axes[0].transData)
    assert (box.y0, box.y1) == pytest.approx((45, 94))
    assert eps_plot("t", group_runs([make_run("B")]), {"B": "#000000"}) is None


def test_classes(make_run, make_evaluation) -> None:
    other = [{"class": "cat", "clean": 0.7, "robust": 0.35}]
    runs = [
        make_run("A", 0, best=make_evaluation(0.9, 0.5)),
        make_run("A", 1, best=make_evaluation(0.9, 0.5, per_class=other)),
    ]
    groups = group_runs(runs)
    plot = class_plot("t", groups, colors(groups), "best")
    axes = plot.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert list(lines(plot)["A, robust"].get_xdata()) == pytest.approx([30, 75])
    assert list(lines(plot)["A, clean"].get_xdata()) == pytest.approx([80, 80])
    assert "cat, 30.0%" in plot.alt
    assert class_plot("t", groups, colors(groups), "last") is None
    untouched = make_evaluation(0.9, 0.5, per_class=[{"class": "cat", "clean": 0.8, "robust": 0.8}])
    (group,) = group_runs([*runs, make_run("A", 2, best={**untouched, "attacks": {}})])
    assert class_means(group, "best") == class_means(groups[0], "best")  # what nothing attacked is not robust


def test_of_many_classes_the_hardest_are_shown(make_run, make_evaluation) -> None:
    table = [{"class": f"c{i}", "clean": 1.0, "robust": (i * 7 % 100) / 100} for i in range(100)]
    groups = group_runs([make_run("A", best=make_evaluation(0.9, 0.5, per_class=table))])
    plot = class_plot("t", groups, colors(groups), "best")
    assert plot.title == "t (the 20 hardest of 100)"
    assert list(lines(plot)["A, robust"].get_xdata()) == pytest.approx(list(range(20)))


@pytest.mark.parametrize("name", ["$\\frac{$", "$x$", "_hidden", "a" * 500, "<b>&amp;</b>", "% {}"])
def test_any_name_can_be_drawn_as_it_is(make_run, name: str) -> None:
    plot = draw([make_run(name)])
    assert len(legend(plot)) == 3
    assert legend(plot)[0].replace("\\$", "$").strip()[:6] == name[:6] or "…" in legend(plot)[0]
    svg(plot.figure)


def test_norms() -> None:
    assert [norm_label(norm) for norm in ("linf", "l2", "l1", "l0", "lp")] == ["ℓ∞", "ℓ₂", "ℓ₁", "ℓ₀", "lp"]
