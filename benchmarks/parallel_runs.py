"""Does it pay to train several runs on one device at a time? Wall seconds of the same runs, K at a time.

    python benchmarks/parallel_runs.py --data DIR --epochs 4
    python benchmarks/parallel_runs.py --quick     # digits, on a CPU

For each K the runs (seeds of one preset) are trained by ``softdefend compare --parallel K`` in fresh folders.
One run before them fills the caches of compiled code, so that all K find the same. The wall time includes
what a run does besides training: loading, validation, evaluation and its report. In parallel one run's idle
time is another's, but each run is a process that starts by itself, where one at a time they share one. For
long runs that hardly counts, but the epochs do; these are compared by themselves too. Where an MPS server is
running the processes share the device's multiprocessors, else they take turns; the file records which.
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
from common import RESULTS, add_data_arguments, compare, data_arguments, make_parser, write_json
from softdefend.core.environment import environment
from softdefend.execution.engine import resolve_device

QUICK = ["--config", "digits_demo", "--data.train_size", "64", "--evaluate.size", "64"]


def timed(folder: Path, seeds: list[int], parallel: int, args: argparse.Namespace) -> float:
    """Wall seconds of training all seeds."""
    arguments = [*QUICK] if args.quick else ["--config", "cifar10_resnet18_short"]
    arguments += data_arguments(args)
    arguments += ["--optim.epochs", str(args.epochs), "--runtime.device", args.device]
    arguments += ["--evaluate.precision", "fast", "--presets", args.preset]
    arguments += ["--parallel", str(parallel), "--seeds", *map(str, seeds)]
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    compare(folder, arguments)
    return time.perf_counter() - started


def shared() -> bool:
    """Whether an MPS server is there for processes of this user."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        return False
    asked = subprocess.run([control], input=b"get_server_list\n", capture_output=True)
    return asked.returncode == 0 and bool(asked.stdout.strip())


def measured(folder: Path, parallel: int, seconds: float, runs: int, epochs: int) -> dict[str, Any]:
    """One row: wall time of a run, and how long its epochs were beside others."""
    later = [value for path in sorted(folder.glob("*/timing.jsonl")) for value in seconds_of(path.parent)[1:]]
    return {
        "parallel": parallel,
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
    each = first["seconds_per_epoch"] / first["parallel"]
    return {
        str(row["parallel"]): {
            "wall": round(first["wall_seconds"] / row["wall_seconds"], 3),
            "epochs": round(each * row["parallel"] / row["seconds_per_epoch"], 3),
        }
        for row in rows
    }


def main() -> int:
    """Train the same seeds K at a time for every K."""
    parser = make_parser(__doc__)
    add_data_arguments(parser, name="CIFAR-10 (JPEG mirror)")
    parser.add_argument("--preset", default="pgd-at")
    parser.add_argument("--parallel", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs/parallel_runs"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "parallel_runs.json")
    args = parser.parse_args()
    timed(args.folder / "warm-up", [0], 1, args)
    rows: list[dict[str, Any]] = []
    for parallel in args.parallel:
        folder = args.folder / f"parallel-{parallel}"
        seconds = timed(folder, list(range(args.runs)), parallel, args)
        rows.append(measured(folder, parallel, seconds, args.runs, args.epochs))
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
        write_json(args.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
