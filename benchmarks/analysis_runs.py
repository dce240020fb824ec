"""Why it works, in earnest: PGD-AT and SGLR with right and with human wrong labels, audited and analyzed.

    python benchmarks/analysis_runs.py --data DIR --data-name 'CIFAR-10 (JPEG mirror)' \\
        --votes DIR/cifar10n.npz --test-votes DIR/cifar10h.npz --devices cuda:0 cuda:1

Trains by protocol cifar10_resnet18_short with 60 epochs: PGD-AT and SGLR on the given labels and on those
of CIFAR-10N ('worst', 40% wrong). With ``--table1 FOLDER`` the two on given labels are instead the first
rows of ``softdefend reproduce table1``: 200 epochs, and AutoAttack at the end. For 30 epochs: SGLR on two
other sets of CIFAR-10N, and the same label rule in training without an attack ('plain') on all three.
Then audits the labels of every run that has both a memory and wrong labels, and analyses the first four runs.
Killed at any moment, or ended by ``--seconds``, the same command continues where the run folders still exist.
``--quick`` does it on digits in a few epochs.

Writes best and last accuracy, learning curves and the audits' tables to ``--output``, as far as they go, and
the analysis beside it as ``analysis.json``; ``FOLDER/analysis`` holds its page.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import common
from collect import environment, figures, lines, seconds
from softdefend.experiments import reproduce
from softdefend.experiments.parallel import Job, command_line

HUMAN = {"worst": "worse_label", "aggregate": "aggre_label", "random1": "random_label1"}
"""CIFAR-10N's sets of labels, by the names of their arrays."""
ANALYZED = ("pgd-at", "sglr", "pgd-at-worst", "sglr-worst")
RUNS = {
    "pgd-at": ("pgd-at", None, 60),
    "sglr": ("sglr-reference", None, 60),
    "pgd-at-worst": ("pgd-at", "worst", 60),
    "sglr-worst": ("sglr-reference", "worst", 60),
    "plain-worst": ("sglr-reference", "worst", 30),
    "sglr-aggregate": ("sglr-reference", "aggregate", 30),
    "plain-aggregate": ("sglr-reference", "aggregate", 30),
    "sglr-random1": ("sglr-reference", "random1", 30),
    "plain-random1": ("sglr-reference", "random1", 30),
}
"""Preset, set of labels and epochs of each run."""
ROWS = ("pgd-at", "sglr")
"""Runs that can be rows of table 1."""
AUDITED = tuple(name for name, (preset, labels, _) in RUNS.items() if labels and preset != "pgd-at")
# Searches in bf16; what counts is what an fp32 forward confirms.
PROTOCOL = ["--validate.precision", "fast", "--evaluate.precision", "fast"]
PROTOCOL += ["--evaluate.curve_size", "0", "--evaluate.examples", "0"]
QUICK = ["--config", "digits_demo", "--data.train_size", "128", "--evaluate.size", "64", "--net.width", "8"]
QUICK += ["--evaluate.curve_size", "0", "--evaluate.examples", "0"]
# A Hessian product or a point of the surface is a pass over the probe in fp32: these are most of the time.
PROBE = ["--probe", "512", "--points", "9", "--eigen_steps", "30"]
_SMALL = ("probe 40", "whole 8", "test 40", "steps 2", "points 3", "eigen_steps 5", "contrast_steps 20")


def place(name: str, args: argparse.Namespace) -> Path:
    """The folder of a run."""
    if args.table1 and name in ROWS:
        return Path(args.table1 / f"{RUNS[name][0]}-seed{args.seed}")
    return Path(args.folder / name)


def row_arguments(device: str, args: argparse.Namespace) -> list[str]:
    """Arguments of the rows of table 1 beside those of ``softdefend reproduce table1``."""
    words = [*common.data_arguments(args), "--runtime.device", device]
    if args.quick:
        return [*words, "--save.archive", "1"]
    words += ["--validate.every", "2", "--validate.test_size", "1000", "--validate.batch_size", "1000"]
    words += ["--validate.subset", "first"]
    return [*words, *PROTOCOL, "--save.archive", "50"]


def row(name: str, device: str, args: argparse.Namespace) -> list[str]:
    """The command that trains a row of table 1 and leaves AutoAttack to ``reproduce``."""
    preset = RUNS[name][0]
    words = [*(reproduce.QUICK if args.quick else ("--config", "cifar10_resnet18")), "--preset", preset]
    words += ["--name", preset, "--seed", str(args.seed), "--evaluate.attacks", '["pgd-20"]']
    return command_line("train", *words, *row_arguments(device, args), "--folder", str(place(name, args)))


def reproduced(names: tuple[str, ...], device: str, args: argparse.Namespace) -> list[str]:
    """The command that evaluates rows of table 1 and writes the table."""
    words = ["--only", *(RUNS[name][0] for name in names), "--seeds", str(args.seed)]
    words += ["--folder", str(args.table1), *(["--quick"] if args.quick else [])]
    return command_line("reproduce", "table1", *words, *row_arguments(device, args))


def train(name: str, device: str, args: argparse.Namespace) -> list[str]:
    """The command that trains one run."""
    if args.table1 and name in ROWS:
        return row(name, device, args)
    preset, labels, epochs = RUNS[name]
    cold = ["--config", "cifar10_resnet18_short", "--optim.schedule.warmup", "0"]
    words = QUICK if args.quick else [*cold, *PROTOCOL]
    words = [*words, "--preset", preset, "--name", name]
    words += ["--seed", str(args.seed), "--runtime.device", device, "--folder", str(place(name, args))]
    words += ["--optim.epochs", str(4 if args.quick else epochs)]
    if name in ANALYZED:
        every, archive = ("1", "1") if args.quick else ("5", "20")
        words += ["--validate.every", every, "--save.archive", archive]
        words += ["--validate.test_size", "64" if args.quick else "1000", "--validate.subset", "first"]
    else:
        words += ["--validate.every", "2" if args.quick else "10"]
    words += common.data_arguments(args)
    if args.quick:
        words += ["--data.noise", "symmetric" if labels else "none", "--data.noise_rate", "0.3"]
        words += [] if labels else ["--data.noise_rate", "0"]
    elif labels:
        words += ["--data.noise", "file", "--data.noise_file", str(args.votes)]
        words += ["--data.noise_key", HUMAN[labels]]
    if name.startswith("plain"):
        words += ["--attack.steps", "0", "--attack.start", "none"]
    return command_line("train", *words)


def audit(name: str, device: str, args: argparse.Namespace) -> list[str]:
    """The command that audits one run's labels."""
    output = str(args.folder / f"audit-{name}")
    return command_line("labels", "audit", str(place(name, args)), "--output", output, "--device", device)


def analyze(names: tuple[str, ...], output: str, device: str, args: argparse.Namespace) -> list[str]:
    """The command that analyzes some runs; all keep what they measured in one folder, so that a run that was
    analyzed alone is not measured again beside others."""
    folder = args.folder / output
    (args.folder / "results").mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    if not (folder / "results").is_symlink():
        os.symlink("../results", folder / "results")
    words = [str(place(name, args)) for name in names] + ["--output", str(folder), "--device", device]
    words += ["--which", "best", "archived", "--reference", str(place("sglr", args))]
    words += ["--progress", "false"]
    if args.votes:
        words += ["--train_votes", str(args.votes)]
    if args.test_votes:
        words += ["--test_votes", str(args.test_votes)]
    small = [f"--{word}" if i % 2 == 0 else word for pair in _SMALL for i, word in enumerate(pair.split())]
    return command_line("analyze", *words, *(small if args.quick else PROBE))


def jobs(args: argparse.Namespace) -> list[Job]:
    """All of them, in the order in which they are preferred: long runs first, their analyses last."""

    def job(name: str, make: Callable[..., list[str]], *given: Any, after: tuple[str, ...] = ()) -> Job:
        return common.make_job(name, partial(make, *given), args, after)

    made = [job(name, train, name) for name in RUNS]
    made += [job(f"audit-{name}", audit, name, after=(name,)) for name in AUDITED]
    alone = [
        job(f"analyze-{name}", analyze, (name,), f"analysis-{name}", after=(name, "sglr"))
        for name in ANALYZED
    ]
    joint = job("analyze", analyze, ANALYZED, "analysis", after=tuple(one.name for one in alone))
    rows: list[Job] = []
    if args.table1:
        rows = [job(f"row-{name}", reproduced, (name,), after=(name,)) for name in ROWS]
        rows.append(job("table1", reproduced, ROWS, after=tuple(one.name for one in rows)))
    return [*made, *rows, *alone, joint]


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one finished run, and of its audit where that is finished too."""
    folder = place(name, args)
    curve = lines(folder, "metrics.jsonl")
    preset, labels, _ = RUNS[name]
    row: dict[str, Any] = {
        "run": name,
        "recipe": preset,
        "labels": labels or "given",
        "attack": "none" if name.startswith("plain") else "pgd-10",
        "epochs": len(curve),
        # Runs that share a device share its time.
        "seconds_per_epoch": round(median(seconds(folder)), 2),
        "runs_per_device": len(args.devices) // len(set(args.devices)),
        **figures(folder),
        "environment": environment(folder),
    }
    found = args.folder / f"audit-{name}" / "audit.json"
    if found.is_file():
        content = json.loads(found.read_text())
        row["audit"] = {key: content[key] for key in ("samples", "wrong", "comparison")}
    return row | {"curve": curve}


def rounded(value: Any) -> Any:
    """The same content with numbers of five digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def analysis(args: argparse.Namespace) -> dict[str, Any] | None:
    """What ``softdefend analyze`` found of the four runs, by name in place of folder; None before it has."""
    path = args.folder / "analysis/analysis.json"
    if not path.is_file():
        return None
    content = rounded(json.loads(path.read_text()))
    named = dict(zip(content["runs"], ANALYZED, strict=True))  # rows of table 1 have names of their own there
    for part in ("gradients", "labels", "information", "geometry"):
        for found in content[part]:
            found["run"] = named[found["run"]]
    content["overfitting"] = {named[run]: one for run, one in content["overfitting"].items()}
    settings = content["settings"]
    for name in ("reference", "train_votes", "test_votes"):
        settings[name] = settings[name] and Path(settings[name]).name
    for found in content["gradients"]:
        found["result"]["judged_by"] = found["result"]["judged_by"].replace(str(place("sglr", args)), "sglr")
    content["runs"] = {
        ours: {"data": content["runs"][theirs]["data"], "environment": environment(place(ours, args))}
        for theirs, ours in named.items()
    }
    return dict(content)


def main() -> int:
    """Train, audit, analyze; then gather what is there."""
    parser = common.study_parser(__doc__, "analysis")
    parser.add_argument("--votes", type=Path, help="cifar10n.npz")
    parser.add_argument("--test-votes", type=Path, help="cifar10h.npz")
    parser.add_argument("--table1", type=Path, help="folder of the first two rows of table 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--collect-only", action="store_true", help="start nothing")
    args = common.study_arguments(parser, "analysis", "analysis_runs.json")
    # What an earlier call has measured stays.
    content = common.read_earlier(args.output, args.named, args.seed)
    if not args.quick and args.votes is None and not args.collect_only:
        parser.error("--votes is needed: CIFAR-10N's labels")
    scheduler = common.make_scheduler(args, record=True)
    unfinished: list[str] = []
    if not args.collect_only:
        unfinished = scheduler.run(jobs(args), finished=lambda name: print(name, flush=True))
    runs = {row["run"]: row for row in content.get("runs", [])}
    for name in RUNS:
        of_study = args.table1 and name in ROWS  # its results are rows of that study
        if not of_study and (place(name, args) / "evaluation/last.json").is_file():
            runs[name] = measured(name, args)
    content = {
        "data": args.named,
        "seed": args.seed,
        "protocol": "digits_demo, 4 epochs" if args.quick else "cifar10_resnet18_short, PGD-20 in fast",
        "runs": [runs[name] for name in RUNS if name in runs],
    }
    common.write_json(args.output, content)
    if (found := analysis(args)) is not None:
        args.output.with_name("analysis.json").write_text(json.dumps(found) + "\n")
    return common.exit_code(scheduler, unfinished)


if __name__ == "__main__":
    sys.exit(main())
