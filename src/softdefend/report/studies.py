"""The two figures of a study, drawn from its table's rows alone: rows made on other machines count too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from softdefend.report.curves import drops
from softdefend.report.embed import INK
from softdefend.report.figures import Plot, dress, shades

_HELD_OUT = (("test_robust", "test images"), ("val_robust", "validation images"))


def curves(rows: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Robust accuracy by epoch of every row, held-out images solid and training batches dashed.

    Args:
        rows: with ``name``, ``seed`` and ``curve``, rows of a run's metrics.

    Returns:
        None where no row has a held-out figure.
    """
    key, held_out = next(
        (pair for pair in _HELD_OUT if any(_points(row, pair[0]) for row in rows)), (None, "")
    )
    if key is None:
        return None
    figure = Figure(figsize=(7.0, 3.9), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(str(row["name"]) for row in rows))
    color = dict(zip(names, shades(len(names)), strict=True))
    for row in rows:
        for column, dash in ((key, "-"), ("train_robust", "--")):
            if points := _points(row, column):
                axes.plot(*zip(*points, strict=True), dash, color=color[row["name"]], lw=1.5)
    for epoch in sorted({epoch for row in rows for epoch in drops(row["curve"])}):
        axes.axvline(epoch, color=INK, lw=0.9, ls=":")
    dress(axes, "robust accuracy (%)", "epoch (dotted: learning-rate drops)")
    handles = [Line2D([], [], color=color[name], lw=3, label=_plain(name)) for name in names]
    for dash, label in (("-", held_out), ("--", "training batches")):
        handles.append(Line2D([], [], color=INK, ls=dash, label=label))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, labelcolor=INK, fontsize=8)
    ends = "; ".join(
        f"{row['name']}, seed {row['seed']}: {points[-1][1]:.1f}% at epoch {points[-1][0]}"
        for row in rows
        if (points := _points(row, key))
    )
    return Plot(figure, "robust accuracy", f"Line chart: robust accuracy on {held_out} by epoch. {ends}.")


def best_and_last(
    rows: Sequence[Mapping[str, Any]], factors: Sequence[str], measures: Sequence[str]
) -> Plot | None:
    """Best checkpoint hollow, last filled; one line for each row, seeds together, one panel for each measure.

    Args:
        rows: of the table, with ``best`` and ``last``, shares by measure.
        factors: keys that set the rows apart; the first gives the color.
        measures: columns.

    Returns:
        None without rows.
    """
    if not rows:
        return None
    labels = list(dict.fromkeys(_label(row, factors) for row in rows))
    kinds = list(dict.fromkeys(str(row[factors[0]]) for row in rows))
    color = dict(zip(kinds, shades(len(kinds)), strict=True))
    figure = Figure(figsize=(2.4 + 2.6 * len(measures), 1.1 + 0.3 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for row in rows:
            y, shade = labels.index(_label(row, factors)), color[str(row[factors[0]])]
            best, last = (100 * row[which][measure] for which in ("best", "last"))
            axes.plot([best, last], [y, y], "-", color=shade, lw=1)
            axes.plot([best], [y], "o", color=shade, mfc="none", ms=7)
            axes.plot([last], [y], "o", color=shade, ms=4.5)
        axes.margins(x=0.12)
        dress(axes, "", f"{measure} (%)")
    panels[0].set_yticks(range(len(labels)), [_plain(label) for label in labels])
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=INK, marker="o", ls="", mfc=fill, ms=size, label=which)
        for which, fill, size in (("best checkpoint", "none", 7), ("last", INK, 4.5))
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, frameon=False, labelcolor=INK, fontsize=8
    )
    words = "; ".join(
        f"{_label(row, factors)}, seed {row['seed']}: "
        + ", ".join(f"{m} {100 * row['best'][m]:.1f} and {100 * row['last'][m]:.1f}" for m in measures)
        for row in rows
    )
    return Plot(figure, "best and last", f"Dot chart: accuracy in per cent at best and last epoch. {words}.")


def forest(pairs: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> Plot | None:
    """Differences of pairs with their 95% intervals; one line for each pair, one panel for each measure.

    Args:
        pairs: with ``reference``, ``other``, ``seed`` and ``differences`` by measure.
        measures: panels.

    Returns:
        None without pairs.
    """
    if not pairs:
        return None
    labels = list(dict.fromkeys(f"{pair['other']} – {pair['reference']}" for pair in pairs))
    figure = Figure(figsize=(3.0 + 2.2 * len(measures), 1.1 + 0.3 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    words = []
    for axes, measure in zip(panels, measures, strict=True):
        axes.axvline(0, color=INK, lw=0.9, ls=":")
        for pair in pairs:
            if (one := pair["differences"].get(measure)) is None:
                continue
            label = f"{pair['other']} – {pair['reference']}"
            y, value, reach = labels.index(label), 100 * one.value, 196 * one.error
            axes.plot([value - reach, value + reach], [y, y], "-", color=INK, lw=1.2)
            axes.plot([value], [y], "s", color=INK, ms=4.5)
            words.append(f"{label}, seed {pair['seed']}, {measure}: {value:+.1f} ± {reach:.1f}")
        axes.margins(x=0.12)
        dress(axes, "", f"{measure} (points)")
    panels[0].set_yticks(range(len(labels)), [_plain(label) for label in labels])
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    text = f"Forest plot: differences in percentage points with 95% intervals. {'; '.join(words)}."
    return Plot(figure, "differences", text)


def _points(row: Mapping[str, Any], column: str) -> list[tuple[int, float]]:
    return [(one["epoch"], 100 * one[column]) for one in row["curve"] if one.get(column) is not None]


def _label(row: Mapping[str, Any], factors: Sequence[str]) -> str:
    return ", ".join(str(row[factor]) for factor in factors)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")
