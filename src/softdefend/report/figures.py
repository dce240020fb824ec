"""The figures of a report, each with a text for those who do not see it.

Only matplotlib's object-oriented interface: no global state, no display. A recipe has one color in all
figures; what a color cannot say (training or test, best or last) is in the dash of a line.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from softdefend.report.curves import (
    Line,
    all_drops,
    by_epoch,
    by_eps,
    eps_unit,
    refinement_start,
    trained_eps,
)
from softdefend.report.embed import INK
from softdefend.report.runs import CHECKPOINTS, OUTSIDE, Group, setting

# Okabe and Ito's palette, which color-blind readers can tell apart, without the yellow and the black
# that vanish on a light or a dark page
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6bb1")

_NORMS = {"linf": "ℓ∞", "l2": "ℓ₂", "l1": "ℓ₁", "l0": "ℓ₀"}

DASHES: dict[str, str] = {"first": "-", "second": "--"}

MOST_CLASSES = 20

_MOST_NUMBERED = 12  # classes of a confusion matrix whose cells have room for a number


@dataclass(frozen=True)
class Plot:
    """A figure, its title and a text that says what it shows."""

    figure: Figure
    title: str
    alt: str


@dataclass(frozen=True)
class Series:
    """A column of the metrics, or a checkpoint, and what it is called in the legend."""

    column: str
    label: str


def shades(count: int) -> list[str]:
    """So many colors, none twice."""
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    return [to_hex(matplotlib.colormaps["turbo"]((i + 0.5) / count)) for i in range(count)]


def colors(groups: Sequence[Group]) -> dict[str, str]:
    """One color for each recipe, by label."""
    return dict(zip((group.label for group in groups), shades(len(groups)), strict=True))


def norm_label(norm: object) -> str:
    """ℓ∞ for linf, ℓ₂ for l2, anything else as it is."""
    return _NORMS.get(str(norm), str(norm))


def epoch_plot(
    title: str, groups: Sequence[Group], color: Mapping[str, str], series: Sequence[Series], unit: str
) -> Plot | None:
    """Up to two columns of the metrics by epoch: the first drawn solid, the second dashed.

    Args:
        title: what the vertical axis is.
        groups: the recipes; several runs of one are drawn as their mean with a band from the smallest to
            the largest.
        color: by recipe label.
        series: one or two columns.
        unit: ``"%"`` (columns in [0, 1] are scaled to it), or the unit of the columns as they are.

    Returns:
        None where no run has any of the columns.
    """
    figure, axes = canvas(f"{title} ({unit})" if unit else title, "epoch")
    words: list[str] = []
    dashes: dict[str, str] = {}
    for group in groups:
        for one, dash in zip(series, DASHES.values(), strict=False):
            line = by_epoch(group.runs, one.column, 100.0 if unit == "%" else 1.0)
            if line is None:
                continue
            dashes[dash] = one.label
            _draw(axes, line, color[group.label], dash, f"{group.label}, {one.label}")
            words.append(_words(group.label, one.label, line, "epoch ", unit))
            if dash == DASHES["first"]:
                _mark_best(axes, group, line, color[group.label])
    if not words:
        return None
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if unit == "nats":
        top = max(axes.dataLim.y1, 0.01)
        axes.set_ylim(-0.04 * top, 1.08 * top)
    handles = [*_recipe_handles(groups, color), *_dash_handles(dashes)]
    if any(str(line.get_label()).endswith(", best checkpoint") for line in axes.lines):
        handles.append(Line2D([], [], color=INK, marker="o", ls="", mfc="none", label="best checkpoint"))
    add_legend(figure, [*handles, *_vertical_marks(axes, groups, color)])
    return Plot(figure, title, f"Line chart: {title} by epoch. " + " ".join(words))


def eps_plot(
    title: str, groups: Sequence[Group], color: Mapping[str, str], checkpoints: Sequence[str] = CHECKPOINTS
) -> Plot | None:
    """Robust accuracy against eps, the best checkpoint solid and the last dashed; None without any curve."""
    runs = [run for group in groups for run in group.runs]
    per = eps_unit(runs)
    norms = " and ".join(sorted({norm_label(setting(run, "threat.norm")) for run in runs}))
    figure, axes = canvas(
        "robust accuracy (%)", f"ε of the attack, {norms}" + (", in 1/255" if per > 1 else "")
    )
    words: list[str] = []
    dashes: dict[str, str] = {}
    for group in groups:
        for which in checkpoints:
            line = by_eps(group.runs, which, per)
            if line is None:
                continue
            dash = DASHES["first" if which == "best" else "second"]
            dashes[dash] = which
            _draw(axes, line, color[group.label], dash, f"{group.label}, {which}")
            words.append(_words(group.label, which, line, "ε = ", "%"))
    if not words:
        return None
    handles = [*_recipe_handles(groups, color), *_dash_handles(dashes)]
    trained = {eps for run in runs if (eps := trained_eps(run)) is not None}
    mark = "ε of the table" if all(OUTSIDE in run.config for run in runs) else "ε in training"
    for eps in sorted(trained):
        axes.axvline(per * eps, color=INK, lw=1, ls=":", label=mark)
    if trained:
        handles.append(Line2D([], [], color=INK, lw=1, ls=":", label=mark))
    axes.set_ylim(bottom=0)
    add_legend(figure, handles)
    return Plot(figure, title, f"Line chart: {title}. " + " ".join(words))


def class_plot(title: str, groups: Sequence[Group], color: Mapping[str, str], which: str) -> Plot | None:
    """Clean (hollow) and robust (filled) accuracy of every class; of many classes, the hardest ones.

    Args:
        which: the checkpoint, "best" or "last".
    """
    tables = {group.label: class_means(group, which) for group in groups}
    tables = {label: table for label, table in tables.items() if table}
    if not tables:
        return None
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    robust = {name: fmean(t[name][1] for t in tables.values() if name in t) for name in names}
    cut = len(names) > MOST_CLASSES
    shown = sorted(names, key=robust.__getitem__)[:MOST_CLASSES] if cut else names
    figure, axes = canvas("", "accuracy (%)", height=1.3 + 0.3 * len(shown))
    for i, (label, table) in enumerate(tables.items()):
        offset = (i - (len(tables) - 1) / 2) * min(0.22, 0.7 / len(tables))
        places = [y + offset for y, name in enumerate(shown) if name in table]
        clean = [100 * table[name][0] for name in shown if name in table]
        attacked = [100 * table[name][1] for name in shown if name in table]
        axes.hlines(places, attacked, clean, color=color[label], lw=1, alpha=0.6)
        axes.plot(clean, places, "o", color=color[label], mfc="none", ms=5, label=f"{label}, clean")
        axes.plot(attacked, places, "o", color=color[label], ms=5, label=f"{label}, robust")
    axes.set_yticks(range(len(shown)), [plain_text(name, 18) for name in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    handles = _recipe_handles([group for group in groups if group.label in tables], color)
    handles.append(Line2D([], [], color=INK, marker="o", ls="", mfc="none", ms=5, label="clean"))
    handles.append(Line2D([], [], color=INK, marker="o", ls="", ms=5, label="robust"))
    add_legend(figure, handles)
    hardest = min(robust, key=robust.__getitem__)
    alt = f"Dot chart: {title}. Lowest robust accuracy: {hardest}, {100 * robust[hardest]:.1f}%."
    return Plot(figure, title + (f" (the {len(shown)} hardest of {len(names)})" if cut else ""), alt)


def steps_plot(title: str, steps: Sequence[tuple[str, int]], n: int, color: str) -> Plot:
    """Accuracy after the clean pass and after each attack, one upon the other; what each took is hatched.

    Args:
        steps: (name, images still right), clean first.
        n: images.
    """
    figure, axes = canvas("accuracy (%)", "")
    names = [plain_text(name, 18) for name, _ in steps]
    left = [100 * count / n for _, count in steps]
    lost = [before - now for before, now in zip([100.0, *left], left, strict=False)]
    axes.bar(range(len(left)), left, color=color, width=0.7)
    places = range(1, len(left))
    axes.bar(places, lost[1:], 0.7, bottom=left[1:], color="none", edgecolor=color, hatch="///")
    for x, height in enumerate(left):
        top = height + (lost[x] if x else 0)
        axes.annotate(
            f"{height:.1f}", (x, top), (0, 2), textcoords="offset points", ha="center", color=INK, fontsize=9
        )
    turned = len(names) > 4
    axes.set_xticks(
        range(len(names)), names, rotation=25 if turned else 0, ha="right" if turned else "center"
    )
    axes.set_ylim(0, 1.15 * max(left[0], 1.0))
    axes.grid(False, axis="x")
    heights = ", ".join(f"{name} {height:.1f}%" for (name, _), height in zip(steps, left, strict=True))
    return Plot(figure, title, f"Bar chart: {title}. {heights}.")


def share_plot(
    title: str, lines: Mapping[str, Line], color: str, *, xlabel: str, ylabel: str, unit: str = ""
) -> Plot:
    """Up to four lines of one recipe, by what they are called in the legend: shares in percent."""
    figure, axes = canvas(ylabel, xlabel)
    dashes = dict(zip(("-", "--", ":", "-."), lines, strict=False))
    for dash, label in dashes.items():
        _draw(axes, lines[label], color, dash, label)
    axes.set_ylim(0, 102)
    add_legend(figure, _dash_handles(dashes))
    words = " ".join(
        _words(title, label, line, f"{unit} " if unit else "", "%") for label, line in lines.items()
    )
    return Plot(figure, title, f"Line chart: {title}. {words}")


def distance_plot(
    title: str, grid: Sequence[float], curves: Mapping[str, Sequence[float]], *, xlabel: str
) -> Plot:
    """Robust accuracy over eps, a color for each attack; the first curve is the reference and dotted.

    Args:
        grid: the values of eps.
        curves: percent at each of them, by name.
    """
    figure, axes = canvas("robust accuracy (%)", xlabel)
    first, *others = curves
    for name, color in zip(others, shades(len(others)), strict=True):
        axes.plot(grid, curves[name], "-", color=color, lw=1.7, label=name)
    axes.plot(grid, curves[first], ":", color=INK, lw=2.2, label=first)
    axes.set_ylim(bottom=0)
    handles, _ = axes.get_legend_handles_labels()
    add_legend(figure, handles)
    words = [f"{name} falls from {curve[0]:.1f}% to {curve[-1]:.1f}%" for name, curve in curves.items()]
    return Plot(figure, title, f"Line chart: {title}. {', '.join(words)}.")


def confusion_plot(title: str, counts: NDArray[np.int64], classes: Sequence[str], color: str) -> Plot:
    """Which class is taken for which: shares of each true class, darker where there are more.

    Args:
        counts: [k, k], images by true class (row) and predicted class (column).
        classes: k names.
    """
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    k = len(classes)
    figure, axes = canvas("true class", "predicted class", height=4.6)
    # transparency and not lightness, so that an empty cell is the color of the page, light or dark
    axes.imshow(np.dstack([np.broadcast_to(to_rgb(color), (k, k, 3)), 0.7 * shares]), aspect="auto")
    names = [plain_text(name, 12) for name in classes]
    axes.set_xticks(range(k), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(k), names, fontsize=8)
    axes.grid(False)
    if k <= _MOST_NUMBERED:
        for y, x in np.argwhere(counts > 0):
            axes.text(x, y, f"{100 * shares[y, x]:.0f}", ha="center", va="center", fontsize=8, color=INK)
    wrong = counts * (1 - np.eye(k, dtype=counts.dtype))
    true, taken = divmod(int(wrong.argmax()), k)
    most = f"{classes[true]} taken for {classes[taken]}, {int(wrong[true, taken])} images"
    worst = f"Most frequent confusion: {most}." if wrong.any() else "No image is taken for another class."
    alt = f"Heat map: {title}, in per cent of each true class. {worst}"
    return Plot(figure, title, alt)


def class_means(group: Group, which: str) -> dict[str, tuple[float, float]]:
    """(clean, robust) accuracy in [0, 1] by class, the mean over the runs that were attacked."""
    values: dict[str, list[tuple[float, float]]] = {}
    for run in group.runs:
        evaluation = run.evaluations.get(which, {})
        for line in (evaluation.get("attacks") and evaluation.get("per_class")) or []:
            values.setdefault(str(line.get("class")), []).append((line["clean"], line["robust"]))
    return {name: (fmean(c for c, _ in pairs), fmean(r for _, r in pairs)) for name, pairs in values.items()}


def canvas(ylabel: str, xlabel: str, height: float = 3.2) -> tuple[Figure, Axes]:
    """An empty figure as wide as a phone shows it well, with one pair of axes."""
    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.add_subplot()
    dress(axes, ylabel, xlabel)
    return figure, axes


def dress(axes: Axes, ylabel: str, xlabel: str) -> None:
    """Ink, grid and spines as all figures have them."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK, which="both")
    axes.grid(color=INK, alpha=0.13, lw=0.7)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def _draw(axes: Axes, line: Line, color: str, dash: str, label: str) -> None:
    marker = "o" if len(line.x) <= 12 else ""
    axes.plot(line.x, line.y, dash, color=color, lw=1.7, marker=marker, ms=3.5, label=label)
    if line.low != line.y or line.high != line.y:
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, lw=0)


def _mark_best(axes: Axes, group: Group, line: Line, color: str) -> None:
    """A ring where the best checkpoint was taken; several runs have no common place for it."""
    epoch = group.runs[0].evaluations.get("best", {}).get("epoch")
    if len(group.runs) == 1 and epoch in line.x:
        y = line.y[line.x.index(epoch)]
        axes.plot([epoch], [y], "o", color=color, mfc="none", ms=8, label=f"{group.label}, best checkpoint")


def _vertical_marks(axes: Axes, groups: Sequence[Group], color: Mapping[str, str]) -> list[Line2D]:
    handles = []
    for epoch in all_drops(groups):
        axes.axvline(epoch, color=INK, lw=1, ls=":", label="learning rate drops")
    if all_drops(groups):
        handles.append(Line2D([], [], color=INK, lw=1, ls=":", label="learning rate drops"))
    starts: dict[int, list[str]] = {}
    for group in groups:
        start = refinement_start(group.runs[0])
        if start is not None:
            starts.setdefault(start, []).append(group.label)
    for start, recipes in starts.items():
        alone = len(recipes) == 1
        label = f"label refinement starts ({recipes[0] if alone else f'{len(recipes)} recipes'})"
        line = axes.axvline(start, color=color[recipes[0]] if alone else INK, lw=1.2, ls="-.", label=label)
        handles.append(line)
    return handles


def _recipe_handles(groups: Iterable[Group], color: Mapping[str, str]) -> list[Line2D]:
    return [Line2D([], [], color=color[group.label], lw=3, label=group.label) for group in groups]


def _dash_handles(labels: Mapping[str, str]) -> list[Line2D]:
    return [Line2D([], [], color=INK, ls=d, lw=1.5, label=label) for d, label in labels.items() if label]


def add_legend(
    figure: Figure, handles: Sequence[Artist], *, longest: int = 44, longest_of_two: int = 30
) -> None:
    """Put a legend below the figure, which grows by what it takes.

    Args:
        longest: characters of a label; what is longer is cut.
        longest_of_two: up to so many characters there are two columns.
    """
    labels = [plain_text(str(handle.get_label()), longest) for handle in handles]
    columns = 1 if max(map(len, labels)) > longest_of_two else 2
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK, fontsize=9
    )


def plain_text(text: str, longest: int) -> str:
    """Text as it is: no formula in it, nothing hidden by a leading underscore, and no longer than fits."""
    short = textwrap.shorten(text, longest, placeholder="…").replace("$", r"\$")
    return f" {short}" if short.startswith("_") else short


def _words(recipe: str, label: str, line: Line, at: str, unit: str) -> str:
    name = f"{recipe}, {label}" if label else recipe
    ends = (f"{line.y[i]:.1f}{unit if unit == '%' else f' {unit}'} at {at}{line.x[i]:g}" for i in (0, -1))
    return f"{name}: {' and '.join(ends)}."
