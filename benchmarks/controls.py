"""Why are figures lower than published? PGD-AT on 36 epochs, one suspect changed at a time.

    python benchmarks/controls.py --data DIR --data-name 'CIFAR-10 (JPEG mirror)' --original DIR
    python benchmarks/controls.py --quick     # digits, on a CPU: shows that it runs

Suspects: the data (``--original``: CIFAR-10 as published, such as torchvision's ``cifar-10-batches-py``),
batch normalization in the attack, the authors' schedule (which drops one epoch earlier and keeps the smaller
last batch), a start without a warm-up, and one from weights that are not drawn as the authors draw theirs.
Every run is measured by PGD-20 on all test images of the data it was trained on; a second seed of the
protocol itself shows what is noise. Killed at any moment, or ended by ``--seconds``, the same command
continues where the run folders still exist.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import common
from collect import environment, figures, lines
from softdefend.experiments.parallel import command_line

RUNS: dict[str, tuple[str, ...]] = {
    "protocol": (),
    "protocol, seed 1": ("--seed", "1"),
    "original images": (),
    "attack in train mode": ("--attack_bn", "train"),
    "authors' schedule": ("--optim.schedule.one_based", "true", "--optim.drop_last", "false"),
    "warm-up": ("--optim.schedule.warmup", "0.05"),
    "authors' weights": ("--net.init", "kaiming"),
}
"""Arguments of ``softdefend train`` beside the protocol's."""
PROTOCOL = ["--config", "cifar10_resnet18_short", "--preset", "pgd-at", "--validate.every", "3"]
PROTOCOL += ["--optim.schedule.warmup", "0"]  # as in the published protocol, which these runs are to explain
PROTOCOL += ["--validate.precision", "fast", "--evaluate.precision", "fast"]
PROTOCOL += ["--evaluate.curve_size", "0", "--evaluate.examples", "0"]
QUICK = ["--config", "digits_demo", "--optim.epochs", "2", "--data.train_size", "64", "--evaluate.size", "64"]
QUICK += ["--evaluate.curve_size", "0"]


def place(name: str, args: argparse.Namespace) -> Path:
    """Folder of a run."""
    return Path(args.folder / "".join(letter if letter.isalnum() else "-" for letter in name))


def command(name: str, device: str, args: argparse.Namespace) -> list[str]:
    """The command that trains one control."""
    arguments = [*(QUICK if args.quick else PROTOCOL), *RUNS[name], "--runtime.device", device]
    if not args.quick:
        own = (args.original, "CIFAR-10") if name == "original images" else (args.data, args.data_name)
        arguments += ["--data.source", str(own[0]), "--data.name", own[1]]
    return command_line("train", *arguments, "--name", name, "--folder", str(place(name, args)))


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one finished run."""
    folder = place(name, args)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    row = {"name": name, "data": config["data"]["name"], "words": list(RUNS[name]), **figures(folder)}
    return row | {"environment": environment(folder), "curve": lines(folder, "metrics.jsonl")}


def main() -> int:
    """Train the controls that are not done."""
    parser = common.study_parser(__doc__, "controls")
    parser.add_argument("--original", type=Path, help="folder of the original images; without it no such run")
    args = common.study_arguments(parser, "controls", "controls.json")
    if not args.quick and not (args.data and args.data_name):
        parser.error("--data and --data-name are needed without --quick")
    protocol = "digits_demo" if args.quick else "cifar10_resnet18_short"
    kept = common.read_earlier(args.output, args.named, protocol=protocol).get("runs", [])
    done = {row["name"]: row for row in kept if row["words"] == list(RUNS.get(row["name"], ()))}
    names = [name for name in RUNS if args.quick or args.original or name != "original images"]

    def finished(name: str) -> None:
        done[name] = measured(name, args)
        content = {"data": args.named, "protocol": protocol}
        content |= {"runs": [done[name] for name in RUNS if name in done]}
        common.write_json(args.output, content)
        print(name, done[name]["best"], done[name]["last"], flush=True)

    jobs = [common.make_job(name, partial(command, name), args) for name in names]
    scheduler = common.make_scheduler(args)
    return common.exit_code(scheduler, scheduler.run(jobs, done, finished))


if __name__ == "__main__":
    sys.exit(main())
