"""The worked example of docs/analysis.md: two short runs on noisy digits, analysed and audited.

    python benchmarks/analyse_digits.py --folder runs/analyse-digits

Trains PGD-AT and SGLR with the protocol digits_demo for 40 epochs (30% of the training labels wrong), runs
every part of ``softdefend analyse`` on both and ``softdefend labels audit`` on SGLR, and prints two Markdown
tables. A few minutes on one core; finished runs and measured parts are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from softdefend.analysis import AnalyseSettings, Wishes, analyse_runs, audit_run
from softdefend.analysis.command import write_audit
from softdefend.analysis.page import Found
from softdefend.config import resolve
from softdefend.pipeline import train

PRESETS = ("pgd-at", "sglr-reference")
SETTINGS = AnalyseSettings(probe=300, whole=64, test=300, points=7, eigen_steps=30, batch_size=100)


def trained(folder: Path) -> list[str]:
    """The two run folders."""
    words = "--config digits_demo --optim.epochs 40 --progress false"
    return [
        str(train(resolve([*words.split(), "--preset", preset, "--folder", str(folder / preset)])))
        for preset in PRESETS
    ]


def lines(parts: dict[str, Found]) -> dict[str, str]:
    """What the table says of one run's last network."""
    norms = parts["gradients"].result["last_layer"]["adversarial"]
    memory = parts["gradients"].result["memorisation"]["clean"]
    quality: dict[str, Any] = parts["labels"].result["predictions"]
    stored = parts["information"].result["weights"]["adversarial"]
    geometry = parts["geometry"].result
    refined = norms.get("refined")
    return {
        "gradient from wrong labels, given labels": _percent(norms["given"]["share_of_wrong"]),
        "the same, refined labels": _percent(refined["share_of_wrong"]) if refined else "–",
        "mean gradient norm, given labels": f"{norms['given']['mean']:.2f}",
        "mean gradient norm, refined labels": f"{refined['mean']:.2f}" if refined else "–",
        "wrong labels fitted, clean images": _percent(memory["fitted"]),
        "ECE, clean and PGD-20 test images": " and ".join(
            _percent(quality[kind]["ece"]) for kind in ("clean", "adversarial")
        ),
        "information in the weights, nats": f"{stored['empirical']:,.0f} ± {stored['empirical_error']:,.0f}",
        "largest Hessian eigenvalue": f"{geometry['eigenvalue']['value']:.1f}",
        "linearity gap": f"{geometry['linearity_gap']['mean']:.3f}",
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/analyse-digits"))
    folder = parser.parse_args().folder
    runs = trained(folder)
    wishes = Wishes(which=("last",), settings=SETTINGS)
    found = analyse_runs(runs, folder / "analysis", wishes, torch.device("cpu"), progress=True)
    tables = {
        run: lines(
            {part: one for part, all_runs in found.parts.items() for one in all_runs if one.run == run}
        )
        for run in found.records
    }
    print("\n| | " + " | ".join(tables) + " |\n| --- |" + " --: |" * len(tables))
    for name in next(iter(tables.values())):
        print(f"| {name} | " + " | ".join(table[name] for table in tables.values()) + " |")
    audit = audit_run(runs[1], at=(100,), baseline=True)
    write_audit(audit, folder / "audit", top=60)
    print("\n| ranking | AUROC | average precision | precision at 100 |\n| --- | --: | --: | --: |")
    for line in audit.comparison:
        at = line["precision_at"]["100"]
        print(f"| {line['name']} | {line['auroc']:.4f} | {line['average_precision']:.4f} | {at:.2f} |")


if __name__ == "__main__":
    main()
