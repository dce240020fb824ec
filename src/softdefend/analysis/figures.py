"""The figures of an analysis; each color is a run, each dash a kind of image or label.

The style is that of :mod:`softdefend.report.figures`: no global state, ink that follows the reader's light or
dark scheme, and a text for those who do not see the figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from softdefend.analysis.results import Measurement, PartResults
from softdefend.report.embed import INK
from softdefend.report.figures import Plot, add_legend, canvas, plain_text

DASHES = ("-", "--", ":")

_FEWEST_EPOCHS = 3


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        run: whose color it has.
        kind: what its dash means; the empty string where there is one kind only.
        x, y: of equal length.
    """

    run: str
    kind: str
    x: Sequence[float]
    y: Sequence[float]


def line_plot(
    title: str,
    curves: Sequence[Curve],
    color: Mapping[str, str],
    *,
    xlabel: str,
    ylabel: str,
    diagonal: bool = False,
    logarithmic: bool = False,
    markers: bool = False,
) -> Plot | None:
    """Lines: one color for each run, one dash for each kind in the order of appearance; None without any.

    Args:
        diagonal: also draw y = x.
        logarithmic: of the horizontal axis; points at or below zero are left out.
        markers: draw a dot at each point.
    """
    if not curves:
        return None
    figure, axes = canvas(ylabel, xlabel)
    kinds = list(dict.fromkeys(curve.kind for curve in curves))
    for curve in curves:
        dash = DASHES[kinds.index(curve.kind) % len(DASHES)]
        marker = "o" if markers else ""
        axes.plot(curve.x, curve.y, dash, color=color[curve.run], lw=1.7, marker=marker, ms=4)
    if xlabel == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if logarithmic:
        axes.set_xscale("log", nonpositive="mask")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    handles = _handles([curve.run for curve in curves], color)
    handles += [
        Line2D([], [], color=INK, ls=DASHES[i % 3], lw=1.5, label=k) for i, k in enumerate(kinds) if k
    ]
    if diagonal:
        axes.plot([0, 1], [0, 1], color=INK, lw=1, ls=(0, (1, 3)))
        handles.append(Line2D([], [], color=INK, lw=1, ls=(0, (1, 3)), label="calibrated"))
    _add_legend(figure, handles)
    ends = "; ".join(_ends(curve) for curve in curves)
    return Plot(figure, title, f"Line chart: {title}. {ends}.")


def _ends(curve: Curve) -> str:
    name = f"{curve.run}, {curve.kind}" if curve.kind else curve.run
    if not len(curve.x):
        return f"{name}: nothing"
    first, last = (f"{_digits(curve.y[i])} at {_digits(curve.x[i])}" for i in (0, -1))
    return f"{name}: {first} to {last}"


def _digits(value: float | None) -> str:
    """Three digits; results hold None for what is not finite."""
    return "not finite" if value is None else f"{value:.3g}"


def course_plot(
    results: PartResults,
    title: str,
    ylabel: str,
    values: Mapping[str, Callable[[Mapping[str, Any]], float | None]],
) -> Plot | None:
    """Values by epoch where a run's checkpoints were measured; None where they are fewer than three.

    Args:
        values: by its name in the legend, what is drawn of a result; a value of None leaves a point out.
    """
    curves = []
    for run in dict.fromkeys(one.run for one in results.measurements):
        # Of one epoch a checkpoint knows most, and the best weights come without a memory.
        known = sorted((one for one in results.measurements if one.run == run), key=_precedence)
        by_epoch = {one.epoch: one.result for one in known if one.epoch is not None}
        for kind, value in values.items():
            points = [(epoch, y) for epoch in sorted(by_epoch) if (y := value(by_epoch[epoch])) is not None]
            if len(points) >= _FEWEST_EPOCHS:
                curves.append(Curve(run, kind, *map(list, zip(*points, strict=True))))
    return line_plot(title, curves, results.color, xlabel="epoch", ylabel=ylabel, markers=True)


def _precedence(measurement: Measurement) -> int:
    return {"best": 0, "last": 1}.get(measurement.weights, 2)


def dot_plot(
    title: str,
    values: Sequence[tuple[str, str, str, float]],
    color: Mapping[str, str],
    *,
    xlabel: str,
    errors: Mapping[tuple[str, str, str], float] | None = None,
) -> Plot | None:
    """One row of dots for each thing that was measured, in the order of appearance; None without values.

    Args:
        values: (row, run, kind, value); the first kind is filled, the others hollow.
        errors: half-widths of bars for some of them.
    """
    if not values:
        return None
    rows = list(dict.fromkeys(row for row, _, _, _ in values))
    runs = list(dict.fromkeys(run for _, run, _, _ in values))
    kinds = list(dict.fromkeys(kind for _, _, kind, _ in values))
    figure, axes = canvas("", xlabel, height=1.2 + 0.42 * len(rows))
    for row, run, kind, value in values:
        y = rows.index(row) + 0.16 * (runs.index(run) - (len(runs) - 1) / 2) * min(1, 4 / len(runs))
        error = (errors or {}).get((row, run, kind))
        if error is not None:
            axes.errorbar([value], [y], xerr=[error], color=color[run], lw=1)
        fill = color[run] if kind == kinds[0] else "none"
        axes.plot([value], [y], "o", color=color[run], mfc=fill, ms=5.5)
    axes.set_yticks(range(len(rows)), [plain_text(row, 26) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=min(0.0, *(value for *_, value in values)))
    handles = _handles(runs, color)
    if len(kinds) > 1:
        handles += [
            Line2D([], [], color=INK, marker="o", ls="", mfc=INK if not i else "none", ms=5, label=kind)
            for i, kind in enumerate(kinds)
        ]
    _add_legend(figure, handles)
    words = "; ".join(
        f"{row}, {run}{', ' if kind else ''}{kind}: {value:.4g}" for row, run, kind, value in values
    )
    return Plot(figure, title, f"Dot chart: {title}. {words}.")


def surface_plot(
    title: str, axis: Sequence[float], loss: Sequence[Sequence[float | None]], color: str
) -> Plot:
    """Contours of a loss surface on a square grid, with the network in the middle.

    Losses above ten times the range's lower half are cut, so that the valley stays visible.
    """
    figure, axes = canvas("second direction", "first direction", height=3.8)
    grid = np.asarray(loss, dtype=float).T  # None is NaN: a loss that is not finite
    if not np.isfinite(grid).any():
        return Plot(figure, title, f"Contour lines: {title}. The loss is nowhere finite.")
    lowest, middle = float(np.nanmin(grid)), float(np.nanmedian(grid))
    top = max(min(float(np.nanmax(grid)), lowest + 10 * max(middle - lowest, 1e-9)), lowest + 1e-9)
    shown = np.minimum(grid, top)
    if len(axis) > 1:
        lines = axes.contour(axis, axis, shown, levels=10, colors=[color], linewidths=1)
        axes.clabel(lines, fontsize=8, colors=[INK], fmt="%.3g")
    axes.plot([0], [0], "+", color=INK, ms=9, mew=1.5)
    axes.set_aspect("equal")
    center = loss[len(axis) // 2][len(axis) // 2]
    ends = f"{lowest:.3g} at the lowest, {float(np.nanmax(grid)):.3g} at the highest point"
    return Plot(figure, title, f"Contour lines: {title}. Loss {_digits(center)} at the network, {ends}.")


def _handles(runs: Sequence[str], color: Mapping[str, str]) -> list[Line2D]:
    return [Line2D([], [], color=color[run], lw=3, label=run) for run in dict.fromkeys(runs)]


def _add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    add_legend(figure, handles, longest=50, longest_of_two=26)
