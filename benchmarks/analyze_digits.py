"""The worked example of docs/analysis.md: two short runs on noisy digits, analyzed and audited.

    python benchmarks/analyze_digits.py --folder runs/analyze-digits

Trains PGD-AT and SGLR with the protocol digits_demo for 40 epochs (30% of the training labels wrong), runs
every part of ``softdefend analyze`` on both and ``softdefend labels audit`` on SGLR, and writes what the
document shows as JSON. A few minutes on one core; finished runs and measured parts are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common import RESULTS, make_parser, write_json
from softdefend.analysis import AnalysisRequest, AnalyzeSettings, analyze_runs, audit_run, write_audit
from softdefend.analysis.results import Measurement
from softdefend.core.environment import environment
from softdefend.experiments.config import resolve
from softdefend.experiments.pipeline import train

PRESETS = ("pgd-at", "sglr-reference")
SETTINGS = AnalyzeSettings(probe=300, whole=64, test=300, points=7, eigen_steps=30, batch_size=100)


def trained(folder: Path) -> list[str]:
    """The two run folders."""
    words = "--config digits_demo --optim.epochs 40 --progress false"
    return [
        str(train(resolve([*words.split(), "--preset", preset, "--folder", str(folder / preset)])))
        for preset in PRESETS
    ]


def values(parts: dict[str, Measurement]) -> dict[str, Any]:
    """What the document's table says of one run's last network."""
    norms = parts["gradients"].result["last_layer"]["adversarial"]
    memory = parts["gradients"].result["memorisation"]["clean"]
    quality: dict[str, Any] = parts["labels"].result["predictions"]
    stored = parts["information"].result["weights"]["adversarial"]
    geometry = parts["geometry"].result
    given, refined = norms["given"], norms.get("refined") or {}
    return {
        "share_of_wrong_given": given["share_of_wrong"],
        "share_of_wrong_refined": refined.get("share_of_wrong"),
        "norm_given": given["mean"],
        "norm_refined": refined.get("mean"),
        "fitted_clean": memory["fitted"],
        "ece_clean": quality["clean"]["ece"],
        "ece_adversarial": quality["adversarial"]["ece"],
        "nats": stored["empirical"],
        "nats_error": stored["empirical_error"],
        "eigenvalue": geometry["eigenvalue"]["value"],
        "linearity_gap": geometry["linearity_gap"]["mean"],
    }


def main() -> None:
    """Train, analyze, audit, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/analyze-digits"))
    parser.add_argument("--output", type=Path, default=RESULTS / "analyze_digits.json")
    args = parser.parse_args()
    runs, device = trained(args.folder), torch.device("cpu")
    request = AnalysisRequest(which=("last",), settings=SETTINGS)
    analysis = analyze_runs(runs, args.folder / "analysis", request, device, progress=True)
    audit = audit_run(runs[1], at=(100,), baseline=True)
    write_audit(audit, args.folder / "audit", top=60)
    content = {
        "runs": {
            run: values(
                {
                    part: one
                    for part, results in analysis.parts.items()
                    for one in results.measurements
                    if one.run == run
                }
            )
            for run in analysis.records
        },
        "audit": audit.comparison,
        "environment": environment(device),
    }
    write_json(args.output, content)


if __name__ == "__main__":
    main()
