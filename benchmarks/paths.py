"""Does the fast path train as well as the plain one? The same recipe and seeds, captured and eager, in bf16.

    python benchmarks/paths.py --data DIR --data-name 'CIFAR-10 (JPEG mirror)' --epochs 10 --train-size 10000
    python benchmarks/paths.py --quick     # digits, on a CPU, where both paths are the same one

``captured``: network compiled, attack in fused kernels where the GPU has them, whole step one CUDA graph.
``eager``: none of these. Rounding differs, so weights part within an epoch; what must agree is where training
ends. The script writes clean and PGD-20 accuracy of every seed at the last epoch, the mean difference of the
paths, and the spread of the seeds that it is to be held against.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from collect import environment, figures
from common import RESULTS, add_data_arguments, compare, data_arguments, make_parser, write_json

PATHS = {
    "captured": [],
    "eager": [f"--runtime.{name}=false" for name in ("compile", "capture", "fused")],
}
"""Arguments of ``softdefend train`` that choose a path; the protocol's own is the fast one."""
QUICK = ["--config", "digits_demo", "--data.train_size", "64", "--optim.epochs", "2", "--evaluate.size", "64"]
MEASURES = ("clean", "pgd-20")


def train(path: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of every seed on one path."""
    words = ["--config", "cifar10_resnet18_short", "--optim.epochs", str(args.epochs)]
    words += ["--data.train_size", str(args.train_size), "--evaluate.precision", "fast"]
    words += ["--optim.schedule.warmup", "0"]
    words = [*(QUICK if args.quick else words), *PATHS[path], "--runtime.device", args.device]
    words += data_arguments(args)
    words += ["--presets", args.preset, "--parallel", str(len(args.seeds))]
    words += ["--seeds", *map(str, args.seeds)]
    folder = args.folder / path
    compare(folder, words)
    places = [folder / f"{args.preset}-seed{seed}" for seed in args.seeds]
    return [
        {"path": path, "seed": seed, **figures(place)["last"], "environment": environment(place)}
        for seed, place in zip(args.seeds, places, strict=True)
    ]


def compared(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """For each measure: mean of captured minus eager, the standard error of that difference from the spread
    of the seeds, and the larger spread."""
    found: dict[str, dict[str, float | None]] = {}
    for measure in MEASURES:
        captured, eager = ([row[measure] for row in rows if row["path"] == path] for path in PATHS)
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in (captured, eager)]
        # Of one seed nothing is known.
        error = sum(one**2 / len(captured) for one in spread) ** 0.5 if len(captured) > 1 else None
        found[measure] = {
            "captured_minus_eager": round(mean(captured) - mean(eager), 3),
            "standard_error": None if error is None else round(error, 3),
            "spread_of_seeds": round(max(spread), 3),
        }
    return found


def main() -> int:
    """Train all seeds on both paths."""
    parser = make_parser(__doc__)
    add_data_arguments(parser)
    parser.add_argument("--preset", default="sglr-reference")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--train-size", type=int, default=10_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/paths"))
    parser.add_argument("--quick", action="store_true", help="digits, two epochs")
    parser.add_argument("--output", type=Path, default=RESULTS / "paths.json")
    args = parser.parse_args()
    rows = [row for path in PATHS for row in train(path, args)]
    content = {
        "differences": compared(rows),
        "data": "digits" if args.quick else args.data_name,
        "preset": args.preset,
        "epochs": 2 if args.quick else args.epochs,
        "train_size": 64 if args.quick else args.train_size,
        "runs": rows,
    }
    write_json(args.output, content)
    print(json.dumps(content["differences"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
