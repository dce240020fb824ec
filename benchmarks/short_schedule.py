"""PGD-AT and SGLR on CIFAR-10 with the 36-epoch schedule, both on one GPU: figures, curves, hours as JSON.

    python benchmarks/short_schedule.py --data DIR --data-name 'CIFAR-10 (JPEG mirror)' --folder runs/short

Each recipe is one ``softdefend train`` of protocol cifar10_resnet18_short. Killed at any moment, the same
command continues. The expected figures are PGD-20 at the last epoch on the same JPEG mirror from an
independent prototype (seed 0, ResNet-18, drops at 18 and 27). Unknown arguments are passed on to training.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any

from collect import environment, figures, lines, seconds
from common import RESULTS, add_data_arguments, data_arguments, exit_code, make_job, make_parser, write_json
from softdefend.experiments.parallel import Scheduler, command_line

EXPECTED = {"pgd-at": {"clean": 77.5, "pgd-20": 46.5}, "sglr-reference": {"clean": 74.9, "pgd-20": 47.8}}


def command(preset: str, _: str, args: argparse.Namespace) -> list[str]:
    """The command that trains one recipe."""
    arguments = ["--config", "cifar10_resnet18_short"]
    arguments += ["--optim.schedule.warmup", "0"]  # the prototype has none
    arguments += ["--preset", preset, "--seed", str(args.seed)]
    arguments += ["--folder", str(args.folder / f"{preset}-seed{args.seed}")]
    return command_line("train", *arguments, *data_arguments(args), *args.rest)


def summarize(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one finished run, with its curve and what it was expected to reach."""
    folder = args.folder / f"{preset}-seed{args.seed}"
    row: dict[str, Any] = {
        "recipe": preset,
        "seed": args.seed,
        "seconds_training": round(sum(seconds(folder)), 1),
        "seconds_per_epoch_median": round(median_high(seconds(folder)), 2),
        **figures(folder),
    }
    last, expected = row["last"], EXPECTED.get(preset, {})
    row["expected_last"] = expected
    row["last_minus_expected"] = {name: round(last[name] - value, 2) for name, value in expected.items()}
    return row | {"environment": environment(folder), "curve": lines(folder, "metrics.jsonl")}


def main() -> int:
    """Train, wait, summarize."""
    parser = make_parser(__doc__)
    add_data_arguments(parser, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/short"))
    parser.add_argument("--presets", nargs="+", default=["pgd-at", "sglr-reference"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--summary-only", action="store_true", help="the runs are finished: only collect")
    parser.add_argument("--output", type=Path, default=RESULTS / "short_schedule.json")
    args, args.rest = parser.parse_known_args()
    started = time.time()
    scheduler = Scheduler(["auto"] * len(args.presets))
    jobs = [make_job(preset, partial(command, preset), args) for preset in args.presets]
    unfinished = [] if args.summary_only else scheduler.run(jobs)
    runs = [summarize(preset, args) for preset in args.presets if preset not in unfinished]
    results = {
        "data": args.data_name,
        "protocol": "cifar10_resnet18_short",
        "runs_at_once_on_the_gpu": len(args.presets),
        "wall_seconds_of_the_last_call": None if args.summary_only else round(time.time() - started, 1),
        "runs": runs,
    }
    write_json(args.output, results)
    for run in runs:
        print({k: v for k, v in run.items() if k not in ("curve", "environment")})
    return exit_code(scheduler, unfinished)


if __name__ == "__main__":
    sys.exit(main())
