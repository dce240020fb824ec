"""Draw the learning curves of benchmarks/results/short_schedule.json and analysis_runs.json.

python benchmarks/plot_curves.py
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
COLOURS = {"pgd-at": "#0072B2", "sglr-reference": "#D55E00"}


def draw(name: str, title: str, runs: Sequence[dict[str, Any]], held_out: tuple[str, str]) -> None:
    """Robust accuracy by epoch on training and held-out images, and the test figures at best and last.

    Args:
        name: of the file in docs/figures.
        title: of the figure.
        runs: with ``recipe``, ``curve``, ``best`` and ``last``.
        held_out: key of the curve on held-out images, and what they are.
    """
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        recipe, rows = run["recipe"], run["curve"]
        for key, style in (("train_robust", "--"), (held_out[0], "-")):
            points = [(row["epoch"], 100 * row[key]) for row in rows if row[key] is not None]
            axes.plot(*zip(*points, strict=True), style, color=COLOURS[recipe], lw=1.6)
        for which, marker, aside in (("best", "o", 0.0), ("last", "s", 0.6)):  # aside: beside the line's end
            at = run[which]["epoch"] + aside
            axes.plot(at, run[which]["pgd-20"], marker, color=COLOURS[recipe], ms=5, mec="white", mew=0.5)
        axes.plot([], [], color=COLOURS[recipe], label=recipe)
    for label, style in (("training batches, PGD-10", "--"), (held_out[1], "-")):
        axes.plot([], [], style, color="#555555", label=label)
    for label, marker in (("10,000 test images, PGD-20, best", "o"), ("… last", "s")):
        axes.plot([], [], marker, color="#555555", label=label)
    rates = [row["lr"] for row in runs[0]["curve"]]
    for epoch, (before, after) in enumerate(itertools.pairwise(rates), 1):
        if after < 0.5 * before:
            axes.axvline(epoch + 0.5, color="#bbbbbb", lw=0.8)
    axes.set(xlabel="epoch (grey: learning-rate drops)", ylabel="robust accuracy (%)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path = ROOT / f"docs/figures/{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def read(name: str) -> dict[str, Any]:
    """One result file."""
    content: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return content


def main() -> None:
    """Both figures."""
    short, long = read("short_schedule"), read("analysis_runs")
    held_out = ("val_robust", "1,000 validation images, PGD-10")
    draw("short_schedule", short["data"], short["runs"], held_out)
    given = [run for run in long["runs"] if run["run"] in ("pgd-at", "sglr")]
    draw("sixty_epochs", long["data"], given, ("test_robust", "1,000 test images, PGD-10"))


if __name__ == "__main__":
    main()
