"""Draw the learning curves of benchmarks/results/short_schedule.json.

python benchmarks/plot_short_schedule.py
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
COLOURS = {"pgd-at": "#0072B2", "sglr-reference": "#D55E00"}


def main() -> None:
    """Robust accuracy by epoch on training and validation images, and the test figures at best and last."""
    results = json.loads((ROOT / "benchmarks/results/short_schedule.json").read_text())
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for run in results["runs"]:
        name, rows = run["recipe"], run["curve"]
        epochs = [row["epoch"] for row in rows]
        for key, style in (("train_robust", "--"), ("val_robust", "-")):
            axes.plot(epochs, [100 * row[key] for row in rows], style, color=COLOURS[name], lw=1.6)
        for which, marker, aside in (("best", "o", 0.0), ("last", "s", 0.6)):  # aside: beside the line's end
            at = run[which]["epoch"] + aside
            axes.plot(at, run[which]["pgd-20"], marker, color=COLOURS[name], ms=5, mec="white", mew=0.5)
        axes.plot([], [], color=COLOURS[name], label=name)
    for label, style in (("training batches, PGD-10", "--"), ("1,000 validation images, PGD-10", "-")):
        axes.plot([], [], style, color="#555555", label=label)
    for label, marker in (("10,000 test images, PGD-20, best", "o"), ("… last", "s")):
        axes.plot([], [], marker, color="#555555", label=label)
    for drop in (18.5, 27.5):
        axes.axvline(drop, color="#bbbbbb", lw=0.8)
    axes.set(xlabel="epoch (grey: learning-rate drops)", ylabel="robust accuracy (%)", title=results["data"])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path = ROOT / "docs/figures/short_schedule.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
