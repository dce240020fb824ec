"""Put runs of ``softdefend reproduce norms`` into benchmarks/results/norms.json.

    softdefend reproduce norms --folder runs/norms --data.source DIR --data.name 'CIFAR-10 (JPEG mirror)' \\
        --optim.epochs 8 --validate.every 4 --validate.precision fast --validate.test_size 0 \\
        --evaluate.size 1000 --evaluate.precision fast --evaluate.attacks '[apgd-ce, apgd-t]' \\
        --only linf l2 l1 e-at max-at e-at-tuned
    python benchmarks/norms.py runs/norms

Takes every run whose checkpoint has been evaluated in all three norms, so also those of a study that was
stopped. Robust in the union is what is right in every norm, image by image.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from collect import environment, lines, seconds
from common import RESULTS, make_parser, write_json
from softdefend.core.threat import ThreatModel
from softdefend.evaluation.union import kept_evaluations, robust_in_union
from softdefend.experiments.paired import difference
from softdefend.experiments.reproduce import norms

Flags = dict[str, np.ndarray[Any, np.dtype[np.bool_]]]


def right(folder: Path, which: str) -> tuple[dict[str, Any], Flags] | None:
    """A checkpoint's evaluation in its own norm, and which images it gets right: clean, in each norm and in
    all of them; None where one is missing."""
    own = yaml.safe_load((folder / "config.yaml").read_text())["threat"]
    trained, path = ThreatModel(own["norm"], own["eps"]), folder / "evaluation" / f"{which}.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    kept = {one.threat.norm: one for one in kept_evaluations(folder / "evaluation", which, trained, result)}
    wanted = [threat.norm for threat in norms().threats]
    if set(kept) != set(wanted):
        return None
    flags = {"clean": kept[wanted[0]].table.right, **{norm: kept[norm].robust for norm in wanted}}
    return result, flags | {"union": robust_in_union(list(kept.values()))}


def row_of(folder: Path, which: str, base: Flags | None) -> tuple[dict[str, Any], Flags] | None:
    """A run's row, in percent, beside the differences to ``base`` with their standard errors."""
    found = right(folder, which)
    if found is None:
        return None
    result, flags = found
    row = {
        "epoch": result["epoch"],
        "epochs": len(lines(folder, "metrics.jsonl")),
        "n": result["n"],
        "attacks": list(result["attacks"]),
        "precision": result["precision"],
        "data": result["name_of_data"],
        **{name: round(100 * float(values.mean()), 2) for name, values in flags.items()},
        "seconds_per_epoch": round(median(seconds(folder)), 2),
    }
    if base is not None:
        pairs = {name: difference(base[name], values) for name, values in flags.items()}
        row["beyond_linf"] = {
            name: {"difference": round(100 * one.value, 2), "error": round(100 * one.error, 2), "p": one.p}
            for name, one in pairs.items()
        }
    return row | {"environment": environment(folder)}, flags


def main() -> int:
    """Every complete run, in the order of the study."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--which", default="best", choices=("best", "last"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of the code that ran, where the runs could not know it")
    parser.add_argument("--output", type=Path, default=RESULTS / "norms.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    base: Flags | None = None
    for run in norms().runs:
        folder = args.folder / f"{run.name}-seed{args.seed}"
        found = row_of(folder, args.which, base) if (folder / "config.yaml").is_file() else None
        if found is None:
            continue
        row, flags = found
        if args.commit:
            row["environment"]["commit"] = args.commit
        base = flags if run.name == "linf" else base
        rows.append({"name": run.name, **run.factors, "seed": args.seed, **row})
    if not rows:
        print(f"{args.folder}: no run that was evaluated in all norms", file=sys.stderr)
        return 2
    write_json(args.output, {"which": args.which, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
