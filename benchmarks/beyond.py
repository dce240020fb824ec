"""Beyond the paper: SGLR + AWP + EMA, settings chosen on validation images in short runs, then a full run.

    python benchmarks/beyond.py --data DIR --data-name 'CIFAR-10 (JPEG mirror)' --devices cuda:0 cuda:1
    python benchmarks/beyond.py --quick     # digits, on a CPU: shows that it runs

1. Every candidate trains on the short schedule with 5,000 images held out. Of their last epochs the one of
   highest robust validation accuracy is chosen, and the choice is written to ``--output``. Test images take
   no part: a candidate's evaluation is of one image.
2. The chosen settings train by the full protocol (200 epochs, 1,000 images held out), one run for each seed,
   and the last checkpoint meets PGD-20 and AutoAttack on all test images. ``--full`` names other settings;
   all that ran stay in the file. A run that has been trained and not been met by AutoAttack yet has its row
   already, and gets the figure from a later call.

Killed at any moment, or ended by ``--seconds``, the same command continues where the run folders still exist;
a choice that is written stands.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import common
from collect import environment, lines, seconds
from softdefend.experiments.parallel import command_line

CANDIDATES: dict[str, tuple[str, ...]] = {
    "reference": ("--preset", "sglr-awp-ema"),
    "gamma 0.005": ("--preset", "sglr-awp-ema", "--weight.gamma", "0.005"),
    "clean weight 0.5": ("--preset", "sglr-awp-ema", "--label.clean_weight", "0.5"),
    "r 0.8": ("--preset", "sglr-awp-ema", "--label.r", "0.8"),
    "TRADES": ("--preset", "trades-sglr-awp-ema", "--label.r", "1.0"),
}
"""The preset, which joins the published settings of its three parts, three departures in one, and TRADES."""
SETTINGS = CANDIDATES | {
    "TRADES, r 0.7": ("--preset", "trades-sglr-awp-ema"),
    "without SGLR, gamma 0.005": ("--preset", "pgd-at-awp-ema", "--weight.gamma", "0.005"),
}
"""What a full run may have; all but the candidates were tried in no short run. The last is no candidate but
what the others are to be held against: what do AWP and EMA do by themselves?"""
QUICK = ["--config", "digits_demo", "--data.train_size", "64", "--net.width", "8", "--optim.epochs", "2"]
FAST = ["--validate.precision", "fast", "--evaluate.precision", "fast"]
NOTHING = ["--evaluate.curve_size", "0", "--evaluate.examples", "0"]


def shared_arguments(device: str, args: argparse.Namespace) -> list[str]:
    """Arguments of every run."""
    return ["--runtime.device", device, *NOTHING, *common.data_arguments(args)]


def short(name: str, device: str, args: argparse.Namespace) -> list[str]:
    """The command that trains one candidate."""
    own = ["--optim.epochs", str(args.epochs), "--data.validation", "5000", "--validate.size", "5000", *FAST]
    own += ["--optim.schedule.warmup", "0"]
    protocol = QUICK if args.quick else ["--config", "cifar10_resnet18_short", "--validate.every", "10", *own]
    place = ["--name", name, "--folder", str(folder(name, args)), "--evaluate.size", "1"]
    return command_line("train", *protocol, *CANDIDATES[name], *shared_arguments(device, args), *place)


def full(name: str, seed: int, device: str, args: argparse.Namespace) -> list[str]:
    """The command that trains one full run."""
    own = ["--config", "cifar10_resnet18", "--validate.every", "2", "--validate.test_size", "1000"]
    own += ["--validate.subset", "first", *FAST]
    protocol = [*QUICK, "--evaluate.size", "64"] if args.quick else own
    place = ["--name", name, "--folder", str(folder(f"full {name} {seed}", args)), "--seed", str(seed)]
    return command_line("train", *protocol, *SETTINGS[name], *shared_arguments(device, args), *place)


def attacked(name: str, seed: int, device: str, args: argparse.Namespace) -> list[str]:
    """The command that evaluates the last checkpoint of a full run."""
    arguments = [str(folder(f"full {name} {seed}", args)), "--which", "last", "--device", device]
    return command_line("evaluate", *arguments, "--attacks", *attacks(args))


def attacks(args: argparse.Namespace) -> tuple[str, str]:
    """Of the final evaluation."""
    return "pgd-20", "apgd-ce-5" if args.quick else "autoattack"


def folder(name: str, args: argparse.Namespace) -> Path:
    """Of a run."""
    return Path(args.folder / name.replace(" ", "-").replace(".", "_").replace(",", ""))


def candidate(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a finished candidate reached at its last epoch."""
    place = folder(name, args)
    last, config = lines(place, "metrics.jsonl")[-1], yaml.safe_load((place / "config.yaml").read_text())
    row = {"name": name, "words": list(CANDIDATES[name]), "epochs": last["epoch"], "seed": config["seed"]}
    row |= {key: round(100 * last[key], 2) for key in ("val_clean", "val_robust")}
    return row | {"environment": environment(place), "curve": lines(place, "metrics.jsonl")}


def reached(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any] | None:
    """What a full run reached at its last epoch; None where it has not come to it, and for an attack that the
    last checkpoint has not met."""
    place = folder(f"full {name} {seed}", args)
    if not (place / "evaluation/last.json").exists():
        return None
    result = json.loads((place / "evaluation/last.json").read_text())
    met = result["attacks"]
    figures = {
        attack: round(100 * met[attack]["rate"], 2) if attack in met else None for attack in attacks(args)
    }
    row: dict[str, Any] = {"settings": name, "words": list(SETTINGS[name]), "seed": seed}
    row |= {"epoch": result["epoch"], "n": result["n"]}
    row |= {"clean": round(100 * result["clean"]["rate"], 2), **figures}
    row["hours"] = round(sum(seconds(place)) / 3600, 3)
    return row | {"environment": environment(place), "curve": lines(place, "metrics.jsonl")}


def main() -> int:
    """Choose, write the choice down, then train and evaluate."""
    parser = common.study_parser(__doc__, "beyond")
    parser.add_argument("--epochs", type=int, default=30, help="of a candidate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the full runs")
    parser.add_argument(
        "--full", nargs="+", choices=list(SETTINGS), help="settings of the full runs; the choice"
    )
    args = common.study_arguments(parser, "beyond", "beyond.json")
    content = {"data": args.named} | common.read_earlier(args.output, args.named)

    def write() -> None:
        common.write_json(args.output, content)

    scheduler = common.make_scheduler(args, record=True)
    if "choice" not in content:
        unfinished = scheduler.run([common.make_job(name, partial(short, name), args) for name in CANDIDATES])
        if unfinished:
            return common.exit_code(scheduler, unfinished)
        content["candidates"] = [candidate(name, args) for name in CANDIDATES]
        content["choice"] = max(content["candidates"], key=lambda row: row["val_robust"])["name"]
        write()
    print(f"chosen: {content['choice']}", flush=True)
    made = {(row["settings"], row["seed"]): row for row in content.get("full", [])}
    asked = [(name, seed) for name in args.full or [content["choice"]] for seed in args.seeds]
    last = attacks(args)[-1]
    asked = [pair for pair in dict.fromkeys(asked) if made.get(pair, {}).get(last) is None]
    jobs = []
    for name, seed in asked:
        train, attack = f"full {name} {seed}", f"attacked {name} {seed}"
        jobs.append(common.make_job(train, partial(full, name, seed), args))
        jobs.append(common.make_job(attack, partial(attacked, name, seed), args, (train,)))
    unfinished = scheduler.run(jobs)
    for name, seed in asked:
        if row := reached(name, seed, args):
            made[name, seed] = row
    content["full"] = list(made.values())
    write()
    return common.exit_code(scheduler, unfinished)


if __name__ == "__main__":
    sys.exit(main())
