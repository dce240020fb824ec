"""Seconds before the work proper: a new process up to its first training step, and AutoAttack's set-up.

    python benchmarks/set_up.py --run RUN --n 1000
    python benchmarks/set_up.py --device cpu --batch 8 --n 0     # shows that it runs

Each command is a process of its own, twice: cold, with empty folders for compiled code, and warm, with what
the cold one left there. Of a step (network, recipe and batch as in ``softdefend bench``) the time since the
start of the process counts, imports included; of an evaluation all but the attack's own seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, make_parser, write_json
from softdefend.core.environment import environment
from softdefend.execution.engine import Engine, resolve_device
from softdefend.experiments.bench import base_arguments
from softdefend.experiments.config import resolve
from softdefend.experiments.timed_step import ImageShape, TimedStep

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
"""Where compiled code is kept."""


def first_step(args: argparse.Namespace) -> dict[str, float]:
    """In this process: seconds from its start to the end of imports, of preparation and of first steps."""
    at = {"imported": time.time()}
    words = ["--net.name", args.net, "--preset", args.preset, "--runtime.device", args.device]
    experiment = resolve(base_arguments(words))
    engine = Engine(experiment.runtime)
    step = TimedStep(experiment, args.batch, ImageShape(), engine)
    at["prepared"] = time.time()
    with engine.training_numerics():
        for name, count in (("first_step", 1), ("tenth_step", 9)):
            for _ in range(count):
                step()
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            at[name] = time.time()
    return {name: round(moment - args.started, 2) for name, moment in at.items()}


def run(words: Sequence[str], variables: Mapping[str, str]) -> float:
    """Run a command; its seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], env={**os.environ, **variables}, check=True, stdout=sys.stderr)
    return time.perf_counter() - started


def time_training(args: argparse.Namespace, variables: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """The first steps of a process."""
    output = folder / "steps.json"
    words = [__file__, "--child", str(output), "--started", str(time.time()), "--net", args.net]
    words += ["--preset", args.preset, "--batch", str(args.batch), "--device", args.device]
    run(words, variables)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def time_evaluation(
    args: argparse.Namespace, precision: str, variables: Mapping[str, str], folder: Path
) -> dict[str, Any]:
    """AutoAttack on a copy of the run, which has no results."""
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name in ("config.yaml", f"{args.which}.safetensors"):
        shutil.copy(args.run / name, place / name)
    words = ["-m", "softdefend", "evaluate", str(place), "--which", args.which, "--attacks", "autoattack"]
    words += ["--size", str(args.n), "--precision", precision, "--device", args.device]
    wall = run([*words, "--curve_size", "0", "--examples", "0"], variables)
    found = json.loads((place / "evaluation" / f"{args.which}.json").read_text())
    search = found["attacks"]["autoattack"]["seconds"]
    row = {"n": found["n"], "robust": found["attacks"]["autoattack"]["count"], "wall": wall, "search": search}
    return {name: round(value, 2) for name, value in {**row, "set_up": wall - search}.items()}


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, help="a finished run to attack; only steps without one")
    parser.add_argument("--which", default="last", choices=("best", "last"))
    parser.add_argument("--n", type=int, default=1000, help="test images to attack; 0: only steps")
    parser.add_argument("--precisions", nargs="+", default=["exact", "fast"], choices=("exact", "fast"))
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--preset", default="pgd-at")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS / "set_up.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure everything cold and warm; written after each."""
    args = arguments()
    if args.child:
        write_json(args.child, first_step(args))
        return
    content: dict[str, Any] = {"environment": environment(resolve_device(args.device))}
    content |= {"net": args.net, "preset": args.preset, "batch_size": args.batch}
    works = ["training"] + (args.precisions if args.run and args.n else [])
    for work in works:
        with tempfile.TemporaryDirectory() as place:
            variables = {name: f"{place}/{name.lower()}" for name in CACHES}
            for state in ("cold", "warm"):
                row = (
                    time_training(args, variables, Path(place))
                    if work == "training"
                    else time_evaluation(args, work, variables, Path(place))
                )
                content.setdefault(work, {})[state] = row
                print(work, state, row, flush=True)
                write_json(args.output, content)


if __name__ == "__main__":
    main()
