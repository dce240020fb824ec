"""Does it pay to train several runs on one device at once? Wall seconds of the same runs, K at a time.

    python benchmarks/together.py --data DIR --epochs 4
    python benchmarks/together.py --quick     # digits, on a CPU

For each K the runs (seeds of one preset) are trained by ``softdefend compare --together K`` in fresh folders.
One run before them fills the caches of compiled code, so that all K find the same. What a run does besides
training (loading, validation, evaluation, its report) is part of the wall time: side by side, one run's idle
time is another's, but each run is a process that starts by itself, where one at a time they share one. Long
runs are hardly touched by that: for them the epochs count, and these are compared by themselves too. Where an
MPS server is running the processes share the device's multiprocessors, else they take turns; the file says
which.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from collect import seconds as seconds_of
from pool import compare, data_words
from softdefend.core.environment import environment
from softdefend.execution.engine import resolve_device

QUICK = ["--config", "digits_demo", "--data.train_size", "64", "--evaluate.size", "64"]


def timed(folder: Path, seeds: list[int], together: int, args: argparse.Namespace) -> float:
    """Wall seconds of training all seeds."""
    words = [*QUICK] if args.quick else ["--config", "cifar10_resnet18_short"]
    words += data_words(args)
    words += [
        "--optim.epochs",
        str(args.epochs),
        "--runtime.device",
        args.device,
        "--evaluate.precision",
        "fast",
    ]
    words += ["--presets", args.preset, "--together", str(together), "--seeds", *map(str, seeds)]
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    compare(folder, words)
    return time.perf_counter() - started


def shared() -> bool:
    """Whether an MPS server is there for processes of this user."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        return False
    asked = subprocess.run([control], input=b"get_server_list\n", capture_output=True)
    return asked.returncode == 0 and bool(asked.stdout.strip())


def measured(folder: Path, together: int, seconds: float, runs: int, epochs: int) -> dict[str, Any]:
    """One row: wall time of a run, and how long its epochs were beside others."""
    later = [value for path in sorted(folder.glob("*/timing.jsonl")) for value in seconds_of(path.parent)[1:]]
    return {
        "together": together,
        "wall_seconds": round(seconds, 2),
        "wall_seconds_per_run": round(seconds / runs, 2),
        # The median leaves out epochs beside which another run was starting or had ended.
        "seconds_per_epoch": round(median(later), 3),
        "runs": runs,
        "epochs": epochs,
    }


def compared(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as fast as the first row: wall time of all runs, and their epochs alone."""
    first = rows[0]
    each = first["seconds_per_epoch"] / first["together"]
    return {
        str(row["together"]): {
            "wall": round(first["wall_seconds"] / row["wall_seconds"], 3),
            "epochs": round(each * row["together"] / row["seconds_per_epoch"], 3),
        }
        for row in rows
    }


def main() -> int:
    """Train the same seeds K at a time for every K."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="Parquet folder of CIFAR-10 in hub layout")
    parser.add_argument("--data-name", default="CIFAR-10 (JPEG mirror)", help="what to call the data")
    parser.add_argument("--preset", default="pgd-at")
    parser.add_argument("--together", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/together"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/together.json"))
    args = parser.parse_args()
    timed(args.folder / "warm-up", [0], 1, args)
    rows: list[dict[str, Any]] = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for together in args.together:
        folder = args.folder / f"together-{together}"
        seconds = timed(folder, list(range(args.runs)), together, args)
        rows.append(measured(folder, together, seconds, args.runs, args.epochs))
        print(json.dumps(rows[-1]), flush=True)
        content = {
            "times_as_fast": compared(rows),
            "data": "digits" if args.quick else args.data_name,
            "preset": args.preset,
            "mps": torch.cuda.is_available() and shared(),
            "environment": environment(resolve_device(args.device)),
            "rows": rows,
        }
        # After each K: what was measured outlives a call that is cut short.
        args.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
