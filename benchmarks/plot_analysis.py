"""Draw what docs/analysis.md shows of benchmarks/results/analysis.json.

python benchmarks/plot_analysis.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
COLORS = {"pgd-at": "#0072B2", "sglr": "#D55E00", "pgd-at-worst": "#009E73", "sglr-worst": "#CC79A7"}
Value = Callable[[dict[str, Any]], float | None]


def course(axes: Axes, found: Sequence[dict[str, Any]], value: Value, style: str = "-") -> None:
    """A value by epoch for every run; runs without it are left out."""
    for run, color in COLORS.items():
        by_epoch = {one["epoch"]: one["result"] for one in found if one["run"] == run}
        points = [(epoch, y) for epoch in sorted(by_epoch) if (y := value(by_epoch[epoch])) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, marker="o", ms=3, lw=1.6, color=color)


def norm(targets: str, key: str) -> Value:
    """Mean norm of the last layer's gradient on adversarial training images."""
    return lambda result: result["last_layer"]["adversarial"].get(targets, {}).get(key)


def fitted(result: dict[str, Any]) -> float:
    """Per cent of wrong or disputed labels that the network repeats on clean images."""
    return 100 * float(result["memorisation"]["clean"]["fitted"])


def stored(kind: str) -> Value:
    """Information in the weights, millions of nats."""
    return lambda result: result["weights"][kind]["empirical"] / 1e6


def eigenvalue(result: dict[str, Any]) -> float:
    """The largest of the Hessian."""
    return float(result["eigenvalue"]["value"])


def reliability(axes: Axes, found: Sequence[dict[str, Any]]) -> None:
    """Accuracy by confidence on adversarial test images at the last epoch; bins of ten images and more."""
    last = max(one["epoch"] for one in found)
    axes.plot([0, 1], [0, 1], ":", color="#888888", lw=1)
    for one in found:
        if one["epoch"] == last and one["run"] in COLORS:
            bins = [b for b in one["result"]["predictions"]["adversarial"]["reliability"] if b["count"] >= 10]
            x, y = ([b[name] for b in bins] for name in ("confidence", "accuracy"))
            axes.plot(x, y, marker="o", ms=3, lw=1.6, color=COLORS[one["run"]])


def main() -> None:
    """Six panels in one file."""
    content = json.loads((ROOT / "benchmarks/results/analysis.json").read_text())
    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, title, ylabel in zip(
        panels,
        (
            "gradient norm towards given labels",
            "… towards refined labels",
            "wrong or disputed labels repeated",
            "information in the weights",
            "largest Hessian eigenvalue",
            "reliability, adversarial test images",
        ),
        ("last layer", "last layer", "clean images, %", "million nats", "", "accuracy"),
        strict=True,
    ):
        axes.set(title=title, ylabel=ylabel, xlabel="epoch")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes = list(figure.axes)
    for key, style in (("right_mean", "-"), ("wrong_mean", "--")):
        for place, targets in enumerate(("given", "refined")):
            course(axes[place], content["gradients"], norm(targets, key), style)
    course(axes[2], content["gradients"], fitted)
    for kind, style in (("adversarial", "-"), ("clean", "--")):
        course(axes[3], content["information"], stored(kind), style)
    course(axes[4], content["geometry"], eigenvalue)
    reliability(axes[5], content["labels"])
    axes[5].set_xlabel("confidence")
    for run, color in COLORS.items():
        axes[2].plot([], [], color=color, label=run)
    for place, words in (
        (0, ("the others", "wrong or disputed")),
        (1, ("the others", "wrong or disputed")),
        (3, ("adversarial images", "clean images")),
    ):
        for style, label in zip(("-", "--"), words, strict=True):
            axes[place].plot([], [], style, color="#555555", label=label)
    for place in (0, 1, 2, 3):
        axes[place].legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs/figures/analysis.png", dpi=130)


if __name__ == "__main__":
    main()
