"""Images per second of training on 1, 2, ... N GPUs, seconds of AutoAttack, and what messages cost.

    python benchmarks/scaling.py --gpus 2 --run RUN
    python benchmarks/scaling.py --quick     # two processes on a CPU

Training steps are those of ``softdefend bench``, with the same batch on every number of GPUs. AutoAttack
attacks the test images of RUN, a trained run, in batches of 250 as its authors do. The label memory's share
is the time of its message, by itself, in that of a step of SGLR. Ratios are of one call on one machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, make_parser, write_json
from softdefend.core.environment import environment
from softdefend.execution.engine import Engine, RuntimeSettings, resolve_device
from softdefend.experiments.parallel import command_line

PRESETS = ("pgd-at", "sglr-reference")
WORK = (("resnet18", 256), ("resnet18", 1024), ("wrn34_10", 256))
QUICK = (("small_cnn", 16),)
SHORT = ("--steps", "1", "--repeats", "2", "--warmup", "1")
CLASSES, MESSAGES = 10, 200


def steps(net: str, batch: int, count: int, args: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Rows of ``softdefend bench`` for one network and batch on ``count`` processes."""
    output = place / f"{net}-{batch}-{count}.json"
    words = ["bench", "train", "--nets", net, "--presets", *PRESETS, "--batch_sizes", str(batch)]
    words += [*(SHORT if args.quick else ("--steps", "20")), "--output", str(output)]
    words += ["--runtime.devices", str(count), "--runtime.device", args.device]
    words += args.settings
    subprocess.run(command_line(*words), check=True)
    return [{**row, "processes": count} for row in json.loads(output.read_text())["rows"]]


def autoattack(run: Path, count: int, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """AutoAttack on all test images of a run's best weights, in a copy of its folder."""
    copied = place / f"autoattack-{count}"
    copied.mkdir()
    for name in ("config.yaml", "best.safetensors"):
        shutil.copy(run / name, copied / name)
    words = ["evaluate", str(copied), "--which", "best", "--attacks", "autoattack", "--batch_size", "250"]
    words += ["--curve_size", "0", "--examples", "0", "--devices", str(count), "--device", args.device]
    started = time.perf_counter()
    subprocess.run(command_line(*words), check=True)
    wall = time.perf_counter() - started
    found = json.loads((copied / "evaluation" / "best.json").read_text())
    own = found["attacks"]["autoattack"]
    return {
        "processes": count,
        "n": own["n"],
        "robust": own["count"],
        "seconds": own["seconds"],
        "wall": wall,
    }


def message(batch: int, count: int, args: argparse.Namespace, place: Path) -> float:
    """Milliseconds in which processes tell each other the rows of a batch for the label memory."""
    output = place / f"message-{batch}-{count}.txt"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    words = [__file__, "--worker", str(output), "--batch", str(batch), "--device", args.device]
    subprocess.run([sys.executable, *launcher, *words], check=True)
    return float(output.read_text())


def worker(output: Path, batch: int, device: str) -> None:
    """What each process does for :func:`message`."""
    engine = Engine(RuntimeSettings(device=device))
    ours = engine.processes
    index = ours.own(torch.arange(batch, device=engine.device))
    rows = torch.rand(len(index), CLASSES, device=engine.device)

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(MESSAGES):
            ours.gather(index, rows)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return time.perf_counter() - started

    seconds()
    spent = 1e3 * seconds() / MESSAGES
    if ours.first:
        output.write_text(str(spent))
    ours.wait()


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with images per second, and how many times those of one process they are."""
    one = {(row["net"], row["recipe"], row["batch_size"]): row["ms"] for row in rows if row["processes"] == 1}
    return [
        {
            **row,
            "images_per_second": round(1e3 * row["batch_size"] / row["ms"], 1),
            "times_one": round(one[row["net"], row["recipe"], row["batch_size"]] / row["ms"], 3),
        }
        for row in rows
    ]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--gpus", type=int, default=2, help="the largest number of processes")
    parser.add_argument("--run", type=Path, help="a trained run to attack; left out if not given")
    parser.add_argument("--quick", action="store_true", help="a toy on the CPU: shows that it runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--settings", nargs="*", default=[], help="further words of softdefend train")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.batch, args.device)
        return
    args.device = "cpu" if args.quick else args.device
    counts, work = range(1, args.gpus + 1), QUICK if args.quick else WORK
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = [
            row for net, batch in work for count in counts for row in steps(net, batch, count, args, place)
        ]
        for row in rows:
            if row["recipe"] == "sglr-reference" and row["processes"] > 1:
                spent = message(row["batch_size"], row["processes"], args, place)
                row |= {"memory_ms": round(spent, 4), "memory_share": round(spent / row["ms"], 5)}
        attacks = [autoattack(args.run, count, args, place) for count in counts] if args.run else []
    for attack in attacks:
        attack["times_one"] = round(attacks[0]["seconds"] / attack["seconds"], 3)
    content = {"steps": ratios(rows), "autoattack": attacks, "settings": args.settings}
    write_json(args.output, {**content, "environment": environment(resolve_device(args.device))})


if __name__ == "__main__":
    main()
