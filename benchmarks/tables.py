"""The Markdown tables of README and docs/results.md, from the JSON files beside this script.

    python benchmarks/tables.py

A test compares them with what the documents show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> dict[str, Any]:
    """One result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def short_schedule() -> str:
    """ResNet-18 on 36 epochs: clean and PGD-20 at best and last, and what a prototype reached."""
    lines = [
        "| recipe | clean best | clean last | PGD-20 best | PGD-20 last | difference | prototype, last |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in read("short_schedule")["runs"]:
        best, last, expected = run["best"], run["last"], run["expected_last"]
        lines.append(
            f"| {run['recipe']} | {best['clean']:.1f} | {last['clean']:.1f} | {best['pgd-20']:.1f} "
            f"| {last['pgd-20']:.1f} | {best['pgd-20'] - last['pgd-20']:+.1f} "
            f"| {expected['clean']:.1f} / {expected['pgd-20']:.1f} |"
        )
    return "\n".join(lines)


def demo(name: str = "demo_seeds") -> str:
    """Digits: PGD-20 at best and last for every seed and recipe."""
    results = read(name)
    lines = [
        "| seed | PGD-AT best | last | difference | SGLR best | last | difference | SGLR − PGD-AT at last |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in results["runs"]:
        cells = [str(run["seed"])]
        for preset in ("pgd-at", "sglr-reference"):
            row = run[preset]
            cells += [f"{row[which]['pgd-20']:.1f}" for which in ("best", "last")]
            cells.append(f"{row['best_minus_last']:+.1f}")
        lines.append("| " + " | ".join([*cells, f"{run['last_gain_pgd-20']:+.1f}"]) + " |")
    drop = results["mean_best_minus_last"]
    at, sglr = (results["mean_last_pgd-20"][preset] for preset in ("pgd-at", "sglr-reference"))
    lines.append(
        f"| mean | | {at:.1f} | {drop['pgd-at']:+.1f} | | {sglr:.1f} | {drop['sglr-reference']:+.1f} "
        f"| {results['mean_last_gain_pgd-20']:+.1f} |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(short_schedule(), demo(), demo("demo_seeds_clean"), sep="\n\n")
