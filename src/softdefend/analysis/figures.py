"""The figures of an analysis; each color is a run, each dash a kind of image or label.

The style is that of :mod:`softdefend.report.figures`: no global state, ink that follows the reader's light or
dark scheme, and a text for those who do not see the figure.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from softdefend.report.embed import INK
from softdefend.report.figures import Plot

DASHES = ("-", "--", ":")


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
    legend(figure, handles)
    said = "; ".join(_ends(curve) for curve in curves)
    return Plot(figure, title, f"Line chart: {title}. {said}.")


def _ends(curve: Curve) -> str:
    name = f"{curve.run}, {curve.kind}" if curve.kind else curve.run
    if not len(curve.x):
        return f"{name}: nothing"
    return (
        f"{name}: {_said(curve.y[0])} at {_said(curve.x[0])} to {_said(curve.y[-1])} at {_said(curve.x[-1])}"
    )


def _said(value: float | None) -> str:
    """Three digits; results hold None for what is not finite."""
    return "not finite" if value is None else f"{value:.3g}"


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
    axes.set_yticks(range(len(rows)), [short(row, 26) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=min(0.0, *(value for *_, value in values)))
    handles = _handles(runs, color)
    if len(kinds) > 1:
        handles += [
            Line2D([], [], color=INK, marker="o", ls="", mfc=INK if not i else "none", ms=5, label=kind)
            for i, kind in enumerate(kinds)
        ]
    legend(figure, handles)
    said = "; ".join(
        f"{row}, {run}{', ' if kind else ''}{kind}: {value:.4g}" for row, run, kind, value in values
    )
    return Plot(figure, title, f"Dot chart: {title}. {said}.")


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
    return Plot(figure, title, f"Contour lines: {title}. Loss {_said(center)} at the network, {ends}.")


def canvas(ylabel: str, xlabel: str, height: float = 3.2) -> tuple[Figure, Axes]:
    """An empty figure as wide as a phone shows it well, with one pair of axes."""
    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK, which="both")
    axes.grid(color=INK, alpha=0.13, lw=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def _handles(runs: Sequence[str], color: Mapping[str, str]) -> list[Line2D]:
    return [Line2D([], [], color=color[run], lw=3, label=run) for run in dict.fromkeys(runs)]


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend below the figure, which grows by what it takes."""
    labels = [short(str(handle.get_label()), 50) for handle in handles]
    columns = 1 if max(map(len, labels)) > 26 else 2
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK, fontsize=9
    )


def short(text: str, longest: int) -> str:
    """Text as it is: no formula in it, nothing hidden by a leading underscore, no longer than fits."""
    cut = textwrap.shorten(text, longest, placeholder="…").replace("$", r"\$")
    return f" {cut}" if cut.startswith("_") else cut
