"""Loss of the first training steps: what a start at learning rate 0.1 does, and what a warm-up does to it.

    python benchmarks/first_steps.py published --data DIR --data-name 'CIFAR-10 (JPEG mirror)'
    python benchmarks/first_steps.py warm-up --data DIR --data-name 'CIFAR-10 (JPEG mirror)'

Steps of protocol cifar10_resnet18 with PGD-AT on the plain path in fp32: nothing compiled, no own kernels.
On a CPU a step of 64 images and PGD-3 takes some ten seconds; ``--batch-size`` and ``--attack-steps`` choose
others. Rows of earlier calls with the same settings stay in the output.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from collect import ENVIRONMENT
from common import RESULTS, add_data_arguments, data_arguments, make_parser, write_json
from softdefend.core import rng
from softdefend.core.environment import environment
from softdefend.data import load
from softdefend.experiments.config import resolve
from softdefend.experiments.pipeline import make_trainer
from softdefend.training.step import Phase

VARIANTS: dict[str, tuple[str, ...]] = {
    "published": (),
    "attack in train mode": ("--attack_bn", "train"),
    "authors' weights": ("--net.init", "kaiming"),
    "warm-up": ("--optim.schedule.warmup", "0.01"),
}
"""Arguments of ``softdefend train`` beside the protocol's; the weights are drawn as SGLR's authors draw them,
the warm-up is of 2 of 200 epochs."""


def losses(args: argparse.Namespace, folder: str) -> list[float]:
    """Mean loss of each of the first steps."""
    words = ["--config", "cifar10_resnet18", "--preset", "pgd-at", *VARIANTS[args.variant]]
    words += ["--optim.batch_size", str(args.batch_size), "--attack.steps", str(args.attack_steps)]
    words += [*data_arguments(args), "--seed", str(args.seed)]
    words += ["--runtime.precision", "fp32", "--runtime.device", args.device, "--folder", f"{folder}/run"]
    words += [f"--runtime.{name}=false" for name in ("compile", "capture", "fused")]
    experiment = resolve(words)
    trainer = make_trainer(experiment, load(experiment.data))
    plan = trainer.train_data.plan(seed=args.seed, epoch=0, views=1, strong=True)
    phase, found = Phase(*(rule.phase(0) for rule in trainer.rules)), []
    for number in range(args.steps):
        factor = experiment.optim.schedule.factor(
            0, number / trainer.steps_per_epoch, experiment.optim.epochs
        )
        trainer.step.set_lr(experiment.optim.lr * factor)
        trainer.step.meters.zero_()
        rows = plan[number * args.batch_size : (number + 1) * args.batch_size]
        trainer.step(rows, phase, rng.key(args.seed, "step", 0, number))
        samples, loss = trainer.step.meters[:2].tolist()
        found.append(round(loss / samples, 3))
        print(args.variant, number + 1, found[-1], flush=True)
    trainer.folder.close()
    return found


def main() -> None:
    """Measure one variant."""
    parser = make_parser(__doc__)
    parser.add_argument("variant", choices=list(VARIANTS))
    add_data_arguments(parser, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--attack-steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "first_steps.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = losses(args, folder)
    settings: dict[str, Any] = {
        "data": args.data_name,
        "batch_size": args.batch_size,
        "attack_steps": args.attack_steps,
        "seed": args.seed,
    }
    content = json.loads(args.output.read_text()) if args.output.exists() else {}
    rows = content.get("losses", {}) if content.get("settings") == settings else {}
    where = environment(torch.device(args.device))
    where = {name: where[name] for name in ENVIRONMENT}
    content = {"settings": settings, "environment": where, "losses": rows | {args.variant: found}}
    write_json(args.output, content)


if __name__ == "__main__":
    main()
