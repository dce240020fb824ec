"""Seconds of an epoch of `make demo`'s training on a CPU, by memory order, precision and threads, as JSON.

    python benchmarks/cpu_epoch.py --epochs 10

Trains digits_demo with SGLR from the first epoch on, which is its dearest phase, and takes the fastest epoch
but the first and the last: on a shared machine other work only ever adds. ``seconds_without_validation`` is
the same with ``validate.every`` beyond the run's length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, make_parser, write_json
from softdefend.core.environment import environment
from softdefend.experiments.config import resolve
from softdefend.experiments.pipeline import train

_BRIEF = ["--evaluate.size", "32", "--evaluate.curve_size", "0", "--evaluate.examples", "0"]


def seconds(args: argparse.Namespace, *words: str) -> float:
    """Seconds of the fastest epoch."""
    with tempfile.TemporaryDirectory() as folder:
        protocol = ["--config", "digits_demo", "--preset", "sglr-reference", "--label.start", "0"]
        protocol += ["--optim.epochs", str(args.epochs), "--progress", "false", "--runtime.device", "cpu"]
        run = train(resolve([*protocol, *_BRIEF, *words, "--folder", f"{folder}/run"]))
        rows = map(json.loads, (Path(run) / "timing.jsonl").read_text().splitlines())
        # The last epoch is always validated, and the first warms up.
        return min([row["seconds"] for row in rows][1:-1])


def main() -> None:
    """Measure every combination."""
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="of each run, at least 4")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_epoch.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for threads, precision, last in itertools.product(args.threads, ("fp32", "bf16"), (False, True)):
        words = ["--runtime.threads", str(threads), "--runtime.precision", precision]
        words += ["--runtime.channels_last", str(last).lower()]
        whole = seconds(args, *words)
        bare = seconds(args, *words, "--validate.every", str(args.epochs + 1))
        rows.append(
            {
                "threads": threads,
                "precision": precision,
                "channels_last": last,
                "seconds": round(whole, 3),
                "seconds_without_validation": round(bare, 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    content = {
        "environment": environment(torch.device("cpu")) | {"processor": platform.machine()},
        "bf16_instructions": torch.backends.cpu.get_cpu_capability(),
        "epochs": args.epochs,
        "rows": rows,
    }
    write_json(args.output, content)


if __name__ == "__main__":
    main()
