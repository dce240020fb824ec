"""AutoAttack: this package (exact and fast) and the authors' code, on the same networks, images and seed.

    python benchmarks/autoattack.py --runs runs/short/pgd-at-seed0 --reference CHECKOUT --n 1000
    python benchmarks/autoattack.py --n 100 --steps 10 --queries 50    # small networks, in miniature

Prints and writes, for each network, robust images after each attack with forwards, gradients and seconds. The
counts of ``exact`` are to equal the authors' but for images on the border; ``fast`` may differ by a few.
``CHECKOUT`` is a clone of github.com/fra31/auto-attack; without it only this package is measured. Its code
runs as it is, in fp32 without TF32 like ``exact``, on images that are already on the device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend import pipeline
from softdefend.attacks import APGD, FAB, PGD, Attack, Square, TargetedAPGD
from softdefend.data import DataSettings, Resident, load
from softdefend.evaluation import Ensemble, Evaluator, expand, load_weights
from softdefend.evaluation.physical import images_at_once
from softdefend.models.small_cnn import SmallCNN
from softdefend.modes import attacked, tf32
from softdefend.rng import stream
from softdefend.threat import Budget, ThreatModel
from softdefend.training.engine import resolve_device
from softdefend.training.folder import environment

Case = tuple[str, nn.Module, Resident, ThreatModel, int]
"""Name, network, images, threat and number of classes."""


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """The networks of finished runs, or two small ones that are trained here on digits."""
    if args.runs:
        return [from_run(folder, args, device) for folder in args.runs]
    bundle = load(DataSettings(source="digits"))
    threat = ThreatModel(args.norm, args.eps or Budget("0.1"))
    made = []
    for name, against in (("plain", None), ("robust", threat)):
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            net = SmallCNN(10, 1, 8).to(device)
        train(net, Resident(bundle.train, device), against)
        made.append((f"digits-{name}", net, Resident(bundle.test, device), threat, len(bundle.classes)))
    return made


def from_run(folder: Path, args: argparse.Namespace, device: torch.device) -> Case:
    """Network, test images and threat of a run folder."""
    experiment = pipeline.open_run(folder)
    bundle = load(experiment.data)
    net = pipeline.make_net(experiment, bundle)
    load_weights(net, folder / f"{args.which}.safetensors")
    trained = experiment.recipe.threat
    threat = ThreatModel(args.norm or trained.norm, args.eps or trained.eps)
    return folder.name, net.to(device), Resident(bundle.test, device), threat, len(bundle.classes)


def train(net: nn.Module, data: Resident, threat: ThreatModel | None) -> None:
    """Ten epochs of Adam, against PGD-5 where a threat is given."""
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for epoch in range(10):
        for rows in torch.split(torch.randperm(data.n, generator=stream(0, "order", epoch)), 64):
            batch = data.take(rows.to(data.labels.device))
            image = batch.image
            if threat is not None:
                image = PGD(steps=5)(net, image, batch.label, threat)
            optimiser.zero_grad()
            F.cross_entropy(net(image), batch.label).backward()
            optimiser.step()


def members_of(args: argparse.Namespace, k: int) -> tuple[Attack, ...]:
    """The standard version, shortened where asked."""
    made: list[Attack] = []
    for member in expand("autoattack", k):
        if isinstance(member, Square):
            made.append(replace(member, queries=args.queries or member.queries))
        elif isinstance(member, APGD | TargetedAPGD | FAB):
            made.append(replace(member, steps=args.steps or member.steps))
    return tuple(made)


def ours(case: Case, args: argparse.Namespace, precision: str) -> tuple[dict[str, Any], Tensor]:
    """One evaluation by this package, and which images stayed right."""
    _, net, data, threat, k = case
    physical = args.physical_batch or images_at_once(net, data.take(data.labels.new_zeros(1)).image)
    evaluator = Evaluator(
        net,
        data,
        threat,
        batch_size=args.batch_size,
        physical_batch=physical,
        seed=args.seed,
        precision=precision,  # type: ignore[arg-type]
    )
    # What is chosen and loaded at the first forwards is nobody's cost.
    evaluator([APGD(steps=2)], limit=args.n)
    synchronize(data.labels.device)
    started = time.perf_counter()
    result = evaluator([Ensemble("autoattack", members_of(args, k))], limit=args.n)
    seconds = time.perf_counter() - started
    kept = ("name", "attacked", "count", "forwards", "backwards", "seconds")
    rows = [{key: row[key] for key in kept} for row in result.members("autoattack")]
    summary = {
        "clean": result.clean.count,
        "robust": result.robust("autoattack").count,
        "seconds": seconds,
        "physical_batch": result.how["physical_batch"],
        "members": rows,
    }
    return summary, result.attacks["autoattack"].robust


class Counted:
    """A network that counts the images it is given, and those whose gradient is asked for."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.forwards, self.backwards = net, 0, 0

    def __call__(self, image: Tensor) -> Tensor:
        self.forwards += len(image)
        self.backwards += len(image) * image.requires_grad
        logits: Tensor = self.net(image)
        return logits


def theirs(case: Case, args: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """One evaluation by the authors' code, as it is; its attacks are watched from outside."""
    _, net, data, threat, k = case
    sys.path.insert(0, str(args.reference))
    module = importlib.import_module("autoattack")
    forward, device = Counted(net), data.labels.device
    made = module.AutoAttack(
        forward,
        norm={"linf": "Linf", "l2": "L2"}[threat.norm],
        eps=float(threat.eps),
        seed=args.seed,
        verbose=False,
        version="standard",
        device=str(device),
    )
    rows: dict[str, dict[str, Any]] = {}
    parts = {"apgd-ce": made.apgd, "apgd-t": made.apgd_targeted, "fab-t": made.fab, "square": made.square}
    for member, (name, part) in zip(members_of(args, k), parts.items(), strict=True):
        shorten(part, member)
        rows[name] = {
            "name": member.name,
            "attacked": 0,
            "fooled": 0,
            "forwards": 0,
            "backwards": 0,
            "seconds": 0.0,
        }
        part.perturb = watched(part.perturb, forward, rows[name], device)
    batch = data.take(torch.arange(min(args.n, data.n), device=device))
    with attacked(net, "eval"), tf32(False), torch.random.fork_rng(), warnings.catch_warnings():
        APGD(steps=2)(net, batch.image[: args.batch_size], batch.label[: args.batch_size], threat)
        warnings.simplefilter("ignore")
        # As people run it: with parameters that ask for gradients.
        for parameter in net.parameters():
            parameter.requires_grad_(not args.frozen)
        clean = (net(batch.image).argmax(1) == batch.label).sum()
        synchronize(device)
        started = time.perf_counter()
        adversarial = made.run_standard_evaluation(batch.image, batch.label, bs=args.batch_size)
        synchronize(device)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            parts_of = torch.split(adversarial, args.batch_size)
            said = torch.cat([net(part).argmax(1) for part in parts_of])
    robust = (said == batch.label).cpu()
    left = int(clean)
    for row in rows.values():
        left -= row.pop("fooled")
        row["count"] = left
    summary = {
        "clean": int(clean),
        "robust": int(robust.sum()),
        "seconds": seconds,
        "members": list(rows.values()),
    }
    return summary, robust


def shorten(part: Any, member: Attack) -> None:
    """Give one of the authors' attacks the steps of ours; at full length this changes nothing."""
    if isinstance(member, Square):
        part.n_queries = member.queries
        return
    part.n_iter = member.steps  # type: ignore[attr-defined]
    if hasattr(part, "n_iter_2"):
        for field, share in (("n_iter_2", 0.22), ("n_iter_min", 0.06), ("size_decr", 0.03)):
            setattr(part, field, max(int(share * part.n_iter), 1))
    if hasattr(part, "n_target_classes"):
        part.n_target_classes = member.targets  # type: ignore[attr-defined]


def watched(
    perturb: Callable[..., Tensor], forward: Counted, row: dict[str, Any], device: torch.device
) -> Callable[..., Tensor]:
    def measured(image: Tensor, label: Tensor) -> Tensor:
        synchronize(device)
        before, started = (forward.forwards, forward.backwards), time.perf_counter()
        found = perturb(image, label)
        synchronize(device)
        row["seconds"] += time.perf_counter() - started
        row["attacked"] += len(image)
        row["forwards"] += forward.forwards - before[0]
        row["backwards"] += forward.backwards - before[1]
        with torch.no_grad():
            row["fooled"] += int((forward.net(found).argmax(1) != label).sum())
        return found

    return measured


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(name: str, summary: dict[str, Any]) -> None:
    """One block of the table."""
    print(f"{name}: clean {summary['clean']}, {summary['seconds']:.2f} s")
    for row in summary["members"]:
        print(
            f"  {row['name']:<12} attacked {row['attacked']:>6}  robust after it {row['count']:>6}  "
            f"forwards {row['forwards']:>10}  gradients {row['backwards']:>10}  {row['seconds']:>8.2f} s"
        )


def main() -> int:
    """Measure every network in every mode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="finished run folders")
    parser.add_argument("--which", default="last", choices=pipeline.WHICH)
    parser.add_argument("--n", type=int, default=1000, help="test images")
    parser.add_argument("--norm", default=None, choices=("linf", "l2"), help="the trained one, else linf")
    parser.add_argument("--eps", type=Budget, default=None, help="the trained one, else 0.1")
    parser.add_argument("--modes", nargs="+", default=["exact", "fast"], choices=("exact", "fast"))
    parser.add_argument("--batch-size", type=int, default=250, help="logical batch; the authors' batch")
    parser.add_argument("--physical-batch", type=int, default=None, help="found from the memory by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="shorten APGD and FAB, for a trial")
    parser.add_argument("--queries", type=int, default=None, help="shorten Square, for a trial")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--reference", type=Path, default=os.environ.get("SOFTDEFEND_AUTOATTACK"))
    parser.add_argument("--frozen", action="store_true", help="spare the authors' FAB its weight gradients")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/autoattack.json"))
    args = parser.parse_args()
    args.norm = args.norm or (None if args.runs else "linf")
    device = resolve_device(args.device)
    networks: dict[str, Any] = {}
    for case in cases(args, device):
        name, _, _, threat, k = case
        found: dict[str, Any] = {}
        flags: dict[str, Tensor] = {}
        for mode in args.modes:
            found[mode], flags[mode] = ours(case, args, mode)
        if args.reference:
            found["reference"], flags["reference"] = theirs(case, args)
        for mode, summary in found.items():
            show(f"{name} {threat.norm} {threat.eps} {mode}", summary)
        row: dict[str, Any] = {"norm": threat.norm, "eps": str(threat.eps), "classes": k}
        if args.reference:
            speed = {mode: found["reference"]["seconds"] / found[mode]["seconds"] for mode in args.modes}
            differ = {mode: int((flags[mode] != flags["reference"]).sum()) for mode in args.modes}
            row = {"times_faster_than_reference": speed, "images_of_other_verdict": differ, **row}
            print(f"{name}: times faster {speed}, images of another verdict {differ}")
        networks[name] = {**row, **found}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings["runs"] = [folder.name for folder in args.runs]
    settings["reference"] = "fra31/auto-attack" if args.reference else None
    settings["output"] = args.output.name
    settings["eps"] = None if args.eps is None else str(args.eps)
    ratios = {n: row["times_faster_than_reference"] for n, row in networks.items() if args.reference}
    content = {
        "times_faster_than_reference": ratios,
        "seed": args.seed,
        "environment": environment(device),
        "settings": settings,
        "networks": networks,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
