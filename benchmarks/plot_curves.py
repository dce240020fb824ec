"""Draw the learning curves of several files in benchmarks/results.

python benchmarks/plot_curves.py
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tables import full_name

ROOT = Path(__file__).parent.parent
COLORS = {"plain": "#0072B2", "sglr": "#D55E00", "r": "#009E73", "awp": "#CC79A7", "rival": "#E69F00"}


def color(recipe: str) -> str:
    """One for SGLR, one each for SGLR with a share of the given label and with AWP, one for AWP without it,
    one for all else."""
    if "without SGLR" in recipe:
        return COLORS["rival"]
    if "AWP" in recipe:
        return COLORS["awp"]
    if recipe.endswith("-paper"):
        return COLORS["r"]
    return COLORS["sglr" if "sglr" in recipe else "plain"]


def draw(
    name: str, title: str, panels: Sequence[Sequence[dict[str, Any]]], held_out: tuple[str, str]
) -> None:
    """Robust accuracy by epoch on training and held-out images, and the test figures at best and last.

    Args:
        name: of the file in docs/figures.
        title: of the figure.
        panels: runs drawn together, each with ``recipe``, ``curve``, ``last`` and, if there is one, ``best``.
        held_out: key of the curve on held-out images, and what they are.
    """
    figure = Figure(figsize=(7.2 if len(panels) == 1 else 10.2, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, runs in zip(every, panels, strict=True):
        for run in runs:
            recipe, rows = run["recipe"], run["curve"]
            for key, style in (("train_robust", "--"), (held_out[0], "-")):
                points = [(row["epoch"], 100 * row[key]) for row in rows if row[key] is not None]
                axes.plot(*zip(*points, strict=True), style, color=color(recipe), lw=1.4)
            aside = 0.01 * len(rows)  # the last one's mark stands beside the line's end
            for which, marker, shift in (("best", "o", 0.0), ("last", "s", aside)):
                if which not in run:
                    continue
                at = run[which]["epoch"] + shift
                axes.plot(at, run[which]["pgd-20"], marker, color=color(recipe), ms=5, mec="white", mew=0.5)
            axes.plot([], [], color=color(recipe), label=recipe)
        for label, style in (("training batches, the training attack", "--"), (held_out[1], "-")):
            axes.plot([], [], style, color="#555555", label=label)
        for label, marker in (("10,000 test images, PGD-20, best", "o"), ("… last", "s")):
            axes.plot([], [], marker, color="#555555", label=label)
        rates = [row["lr"] for row in runs[0]["curve"]]
        for epoch, (before, after) in enumerate(itertools.pairwise(rates), 1):
            if after < 0.5 * before:
                axes.axvline(epoch + 0.5, color="#bbbbbb", lw=0.8)
        axes.set_xlabel("epoch (gray: learning-rate drops)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7.5, loc="upper left" if len(panels) > 1 else "best")
    every[0].set_ylabel("robust accuracy (%)")
    path = ROOT / f"docs/figures/{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def read(name: str) -> dict[str, Any]:
    """One result file."""
    content: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return content


def main() -> None:
    """All figures."""
    paper, short, long = read("table1"), read("short_schedule"), read("analysis_runs")
    held_out, curve = (
        ("val_robust", "1,000 validation images, PGD-10"),
        ("test_robust", "1,000 test images, PGD-10"),
    )
    rows = [row | {"recipe": row["name"]} for row in paper["rows"]]
    panels = [[row for row in rows if ("trades" in row["name"]) == trades] for trades in (False, True)]
    draw("table1", f"ResNet-18, {paper['data']}", panels, curve)
    for setting, runs in itertools.groupby(read("settings")["rows"], lambda row: row["setting"]):
        found = [row | {"recipe": row["name"].removeprefix(f"{setting} ")} for row in runs]
        title = f"{found[0]['net']}, {found[0]['data']}"
        draw(setting.replace("-", "_"), title.replace("resnet18", "ResNet-18"), [found], held_out)
    full = [
        {"recipe": full_name(row["settings"]), "curve": row["curve"], "last": row}
        for row in read("beyond")["full"]
    ]
    draw("beyond", f"ResNet-18, {paper['data']}", [[*panels[0], *full]], curve)
    draw("short_schedule", short["data"], [short["runs"]], held_out)
    given = [run for run in long["runs"] if run["run"] in ("pgd-at", "sglr")]
    draw("sixty_epochs", long["data"], [given], curve)


if __name__ == "__main__":
    main()
