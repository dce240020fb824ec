"""Every preset on CIFAR-10 with a 30-epoch schedule: clean, PGD-20 and seconds per epoch as JSON.

    python benchmarks/recipes.py --data DIR --data-name 'CIFAR-10 (JPEG mirror)' --devices cuda:0 cuda:1

Each preset is one ``softdefend train`` of protocol cifar10_resnet18_short with 30 epochs. A device takes the
next preset when it is done with one; named twice, it takes two at once. Killed at any moment, or ended by
``--seconds``, the same command continues: finished presets stay in the output file, unfinished runs resume
where their folder still exists. ``--quick`` does the same on digits in two epochs.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import common
from collect import environment, figures, lines, seconds
from softdefend.experiments.config import packaged
from softdefend.experiments.parallel import command_line

EPOCHS = 30
DISTILLED = ("kd", "kd-swa")
"""Presets whose teachers are trained first, once for both where one has finished."""
PROTOCOL = ["--config", "cifar10_resnet18_short", "--optim.epochs", str(EPOCHS), "--validate.every", "5"]
# Searches in bf16; what counts is what an fp32 forward confirms.
PROTOCOL += ["--validate.precision", "fast", "--evaluate.precision", "fast"]
PROTOCOL += ["--evaluate.curve_size", "0", "--evaluate.examples", "0"]
QUICK = ["--config", "digits_demo", "--optim.epochs", "2", "--data.train_size", "64", "--evaluate.size", "64"]
QUICK += ["--evaluate.curve_size", "0"]


def command(preset: str, device: str, args: argparse.Namespace) -> list[str]:
    """The command that trains one preset."""
    folder = args.folder / f"{preset}-seed{args.seed}"
    arguments = [*(QUICK if args.quick else PROTOCOL), "--seed", str(args.seed), "--runtime.device", device]
    arguments += common.data_arguments(args)
    if preset in DISTILLED:
        teachers = sorted(args.folder.glob(f"kd*-seed{args.seed}/student/last.safetensors"))
        place = teachers[0].parents[1] if teachers else None
        known = [f"--{role}={place / role}" for role in ("standard", "robust")] if place else []
        own = ["--preset", preset, "--folder", str(folder), *known]
        return command_line("distill", *arguments, *own)
    return command_line("train", *arguments, "--preset", preset, "--folder", str(folder))


def measured(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one finished run."""
    folder = args.folder / f"{preset}-seed{args.seed}"
    folder = folder / "student" if preset in DISTILLED else folder
    curve = lines(folder, "metrics.jsonl")
    return {
        "recipe": preset,
        "seed": args.seed,
        "epochs": len(curve),
        # The median leaves out the first epoch, which compiles; runs that share a device share its time.
        "seconds_per_epoch": round(median(seconds(folder)), 2),
        "runs_per_device": len(args.devices) // len(set(args.devices)),
        **figures(folder),
        "environment": environment(folder),
        "curve": curve,
    }


def protocol(args: argparse.Namespace) -> str:
    """What all rows of the file have in common."""
    if args.quick:
        return "digits_demo, 2 epochs"
    return f"cifar10_resnet18_short, {EPOCHS} epochs, warm-up of 0.05, PGD-20 in precision fast"


def read(args: argparse.Namespace) -> dict[str, Any]:
    """What earlier calls have finished, by preset."""
    content = common.read_earlier(args.output, args.named, args.seed, protocol(args))
    return {run["recipe"]: run for run in content.get("runs", [])}


def write(path: Path, done: dict[str, Any], args: argparse.Namespace) -> None:
    """The output file, presets in the order of their names."""
    content = {
        "data": args.named,
        "seed": args.seed,
        "protocol": protocol(args),
        "runs": [done[preset] for preset in sorted(done)],
    }
    common.write_json(path, content)


def main() -> int:
    """Keep every device busy until the presets or the seconds are used up."""
    parser = common.study_parser(__doc__, "recipes")
    parser.add_argument("--presets", nargs="+", default=sorted(packaged("preset")))
    parser.add_argument("--seed", type=int, default=0)
    args = common.study_arguments(parser, "recipes", "recipes.json")
    done = read(args)

    def finished(preset: str) -> None:
        done[preset] = measured(preset, args)
        write(args.output, done, args)
        last = done[preset]["last"]
        print(preset, last["clean"], last["pgd-20"], done[preset]["seconds_per_epoch"], flush=True)

    jobs = [
        # The second of these takes the first one's teachers.
        common.make_job(
            preset, partial(command, preset), args, DISTILLED[:1] if preset in DISTILLED[1:] else ()
        )
        for preset in args.presets
    ]
    absent = [name for name in DISTILLED if name not in args.presets]
    scheduler = common.make_scheduler(args)
    return common.exit_code(scheduler, scheduler.run(jobs, [*done, *absent], finished))


if __name__ == "__main__":
    sys.exit(main())
