"""PGD-AT and SGLR on CIFAR-10 with the 36-epoch schedule, both on one GPU: figures, curves, hours as JSON.

    python benchmarks/short_schedule.py --data DIR --data-name 'CIFAR-10 (JPEG mirror)' --folder runs/short

Each recipe is one ``softdefend train`` of protocol cifar10_resnet18_short. Killed at any moment, the same
command continues. The expected figures are PGD-20 at the last epoch on the same JPEG mirror from an
independent prototype (seed 0, ResNet-18, drops at 18 and 27).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from collect import environment, figures
from pool import data_words

EXPECTED = {"pgd-at": {"clean": 77.5, "pgd-20": 46.5}, "sglr-reference": {"clean": 74.9, "pgd-20": 47.8}}


def launch(preset: str, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """One training run as a process of its own, its output in a log file."""
    folder = args.folder / f"{preset}-seed{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "softdefend", "train", "--config", "cifar10_resnet18_short"]
    command += ["--optim.schedule.warmup", "0"]  # the prototype has none
    command += ["--preset", preset, "--seed", str(args.seed), "--folder", str(folder)]
    command += [*data_words(args), *args.rest]
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def summary(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one finished run, with its curve and what it was expected to reach."""
    folder = args.folder / f"{preset}-seed{args.seed}"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = {
        r["epoch"]: r["seconds"] for r in map(json.loads, (folder / "timing.jsonl").read_text().splitlines())
    }
    row: dict[str, Any] = {
        "recipe": preset,
        "seed": args.seed,
        "seconds_training": round(sum(seconds.values()), 1),
    }
    row["seconds_per_epoch_median"] = round(sorted(seconds.values())[len(seconds) // 2], 2)
    row |= figures(folder)
    last = row["last"]
    expected = EXPECTED.get(preset, {})
    row["expected_last"] = expected
    row["last_minus_expected"] = {name: round(last[name] - value, 2) for name, value in expected.items()}
    row["environment"] = environment(folder)
    row["curve"] = rows
    return row


def main() -> int:
    """Train, wait, summarise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="Parquet folder of CIFAR-10 in hub layout")
    parser.add_argument("--data-name", required=True, help="what to call the data in the results")
    parser.add_argument("--folder", type=Path, default=Path("runs/short"))
    parser.add_argument("--presets", nargs="+", default=["pgd-at", "sglr-reference"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--summary-only", action="store_true", help="the runs are finished: only collect")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/short_schedule.json"))
    args, args.rest = parser.parse_known_args()
    started = time.time()
    processes = {} if args.summary_only else {preset: launch(preset, args) for preset in args.presets}
    codes = {preset: process.wait() for preset, process in processes.items()}
    failed = [preset for preset, code in codes.items() if code]
    for preset in failed:
        print(f"{preset} ended with code {codes[preset]}:", file=sys.stderr)
        print((args.folder / f"{preset}-seed{args.seed}" / "log.txt").read_text()[-2000:], file=sys.stderr)
    results = {
        "data": args.data_name,
        "protocol": "cifar10_resnet18_short",
        "runs_at_once_on_the_gpu": len(args.presets),
        "wall_seconds_of_the_last_call": round(time.time() - started, 1) if processes else None,
        "runs": [summary(preset, args) for preset in args.presets if preset not in failed],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    for run in results["runs"]:  # type: ignore[attr-defined]
        print({k: v for k, v in run.items() if k not in ("curve", "environment")})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
