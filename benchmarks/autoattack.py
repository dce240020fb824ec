"""AutoAttack: this package (exact and fast) and the authors' code, on the same networks, images and seed.

    python benchmarks/autoattack.py --runs runs/short/pgd-at-seed0 --reference CHECKOUT --n 1000
    python benchmarks/autoattack.py --data DIR --train plain-resnet18 robust-small_cnn --reference CHECKOUT
    python benchmarks/autoattack.py --n 100 --steps 10 --queries 50    # small networks, in miniature

Prints and writes, for each network: seconds of both and their ratio; robust images after each attack, with
forwards, gradients and seconds; and every image on which the verdicts differ, with its margin (negative where
the network is fooled) at what each side found. ``CHECKOUT`` is a clone of github.com/fra31/auto-attack;
without it only this package is measured. ``--more-seeds 1 2`` runs every mode with these seeds too and writes
on which images the verdict depends on the random numbers.

The authors' code runs as people run it: at torch's defaults, which allow TF32 in convolutions, with
parameters that ask for gradients, on images that are already on the device, after a warm-up. Ours is given no
warm-up: compiling and capturing (``setup_seconds``) are left out of ``seconds`` and are part of
``total_seconds``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import RESULTS, make_parser, write_json
from softdefend.attacks import APGD, FAB, PGD, Attack, Square, TargetedAPGD, margin
from softdefend.core.environment import environment
from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import (
    Augmented,
    AugmentSettings,
    DataBundle,
    DataSettings,
    Resident,
    channel_stats,
    load,
)
from softdefend.evaluation import Ensemble, Evaluator, expand, load_weights
from softdefend.execution.engine import resolve_device
from softdefend.execution.microbatch import fitting_microbatch
from softdefend.execution.network_mode import frozen, tf32
from softdefend.experiments import pipeline
from softdefend.experiments.evaluate import open_run
from softdefend.experiments.network import make_net
from softdefend.models import NetSettings, build

Case = tuple[str, nn.Module, Resident, ThreatModel, int]
"""Name, network, images, threat and number of classes."""
DIGITS = ["plain-small_cnn", "robust-small_cnn"]


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """The networks of finished runs, and those trained here: on digits where nothing is asked for."""
    made = [from_run(folder, args, device) for folder in args.runs]
    names = args.train if args.train or args.runs else DIGITS
    if names:
        bundle = load(DataSettings(source=args.data or "digits"))
        made += [trained(name, bundle, args, device) for name in names]
    return made


def from_run(folder: Path, args: argparse.Namespace, device: torch.device) -> Case:
    """Network, test images and threat of a run folder."""
    experiment = open_run(folder)
    bundle = load(experiment.data)
    net = make_net(experiment, bundle)
    load_weights(net, folder / f"{args.which}.safetensors")
    trained_on = experiment.recipe.threat
    threat = ThreatModel(args.norm or trained_on.norm, args.eps or trained_on.eps)
    return folder.name, net.to(device), Resident(bundle.test, device), threat, len(bundle.classes)


def trained(name: str, bundle: DataBundle, args: argparse.Namespace, device: torch.device) -> Case:
    """A network trained here in a few epochs, plainly or against PGD-3.

    Raises:
        SettingError: a name that is not plain-NETWORK or robust-NETWORK.
    """
    how, _, network = name.partition("-")
    if how not in ("plain", "robust") or not network:
        raise SettingError("--train", name, "plain-NETWORK or robust-NETWORK, such as robust-small_cnn")
    channels = bundle.train.images.shape[1]
    mean, std = channel_stats(bundle.train)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        net = build(
            NetSettings(name=network),
            num_classes=len(bundle.classes),
            in_channels=channels,
            mean=mean,
            std=std,
        )
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    threat = ThreatModel(args.norm or "linf", args.eps or Budget("8/255" if channels == 3 else "0.1"))
    started = time.perf_counter()
    train(net, bundle, threat if how == "robust" else None, args, device)
    synchronize(device)
    print(f"{name}: trained in {time.perf_counter() - started:.1f} s, seed {args.seed}, {args.epochs} epochs")
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return name, net, Resident(bundle.test, device), threat, len(bundle.classes)


def train(
    net: nn.Module,
    bundle: DataBundle,
    threat: ThreatModel | None,
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """SGD with one cycle of the learning rate, on cropped and mirrored images where they are large enough; in
    bfloat16 on a GPU."""
    augment = AugmentSettings("crop-flip") if bundle.train.images.shape[-1] >= 32 else AugmentSettings("none")
    data = Augmented(bundle.train, device, augment, channels_last=True)
    size = 256 if data.n > 10_000 else 64
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    steps = args.epochs * (data.n // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    generator = torch.Generator(device).manual_seed(args.seed)
    attack = PGD(steps=3, step_size=None if threat is None else Budget(float(threat.eps) / 2))

    def forward(image: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits: Tensor = net(image)
        return logits.float()

    for epoch in range(args.epochs):
        plan = data.plan(seed=args.seed, epoch=epoch).to(device)
        for rows in plan[: len(plan) // size * size].split(size):
            batch = data.batch(rows)
            image, label = batch.image, batch.label
            if threat is not None:
                with frozen(net, "eval"):
                    image = attack(forward, image, label, threat, generator=generator)
            net.train()
            optimizer.zero_grad()
            F.cross_entropy(forward(image), label).backward()
            optimizer.step()
            schedule.step()
    net.eval()


def members_of(args: argparse.Namespace, k: int) -> tuple[Attack, ...]:
    """The standard version, shortened where asked."""
    made: list[Attack] = []
    for member in expand("autoattack", k):
        if isinstance(member, Square):
            made.append(replace(member, queries=args.queries or member.queries))
        elif isinstance(member, APGD | TargetedAPGD | FAB):
            made.append(replace(member, steps=args.steps or member.steps))
    return tuple(made)


class Keeping(Evaluator):
    """An evaluator that keeps each image's last adversarial version."""

    kept: Tensor

    def _perturb(self, attack: Attack, index: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        adversarial, image = super()._perturb(attack, index, *rest)
        self.kept[index.to(adversarial.device)] = adversarial
        return adversarial, image


def ours(case: Case, args: argparse.Namespace, precision: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    """One evaluation by this package, which images stayed right, and their last adversarial versions."""
    name, net, data, threat, k = case
    microbatch = args.microbatch or fitting_microbatch(net, data.take(data.labels.new_zeros(1)).image)
    evaluator = Keeping(
        net,
        data,
        threat,
        batch_size=args.batch_size,
        microbatch=microbatch,
        seed=args.seed,
        precision=precision,  # type: ignore[arg-type]
        compile=None,
    )
    evaluator.kept = images(data, args).image
    print(f"{name} {precision}", flush=True)
    torch.backends.cudnn.benchmark = args.tune
    synchronize(data.labels.device)
    started = time.perf_counter()
    ensemble = Ensemble("autoattack", members_of(args, k))
    result = evaluator([ensemble], index=torch.arange(min(args.n, data.n)), log_costs=True)
    total, setup = time.perf_counter() - started, evaluator.search_network.seconds
    torch.backends.cudnn.benchmark = False
    kept = ("name", "attacked", "count", "forwards", "backwards", "seconds")
    summary = {
        "clean": result.clean.count,
        "robust": result.robust("autoattack").count,
        "seconds": total - setup,
        "setup_seconds": setup,
        "total_seconds": total,
        "microbatch": result.how["microbatch"],
        "members": [{key: row[key] for key in kept} for row in result.members("autoattack")],
    }
    return summary, result.attacks["autoattack"].robust, evaluator.kept


def images(data: Resident, args: argparse.Namespace) -> Any:
    """The images that are attacked."""
    return data.take(torch.arange(min(args.n, data.n), device=data.labels.device))


class Counted:
    """A network that counts the images it is given, and those whose gradient is asked for."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.forwards, self.backwards = net, 0, 0

    def __call__(self, image: Tensor) -> Tensor:
        self.forwards += len(image)
        self.backwards += len(image) * image.requires_grad
        logits: Tensor = self.net(image)
        return logits


def theirs(case: Case, args: argparse.Namespace) -> tuple[dict[str, Any], Tensor, Tensor]:
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
        zeros = dict.fromkeys(("attacked", "fooled", "forwards", "backwards"), 0)
        rows[name] = {"name": member.name, **zeros, "seconds": 0.0}
        part.perturb = watched(part.perturb, forward, rows[name], device)
    batch = images(data, args)
    with defaults(net), torch.random.fork_rng(), warnings.catch_warnings():
        APGD(steps=2)(net, batch.image[: args.batch_size], batch.label[: args.batch_size], threat)
        warnings.simplefilter("ignore")
        # As people run it: with parameters that ask for gradients.
        for parameter in net.parameters():
            parameter.requires_grad_(not args.frozen)
        with torch.no_grad():
            clean = predicted(net, batch.image, args) == batch.label
        synchronize(device)
        started = time.perf_counter()
        adversarial = made.run_standard_evaluation(batch.image, batch.label, bs=args.batch_size)
        synchronize(device)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            robust = predicted(net, adversarial, args) == batch.label
    left = int(clean.sum())
    for row in rows.values():
        left -= row.pop("fooled")
        row["count"] = left
    summary = {
        "clean": int(clean.sum()),
        "robust": int(robust.sum()),
        "seconds": seconds,
        "members": list(rows.values()),
    }
    return summary, robust.cpu(), adversarial


@contextlib.contextmanager
def defaults(net: nn.Module) -> Iterator[None]:
    """A network in evaluation mode, and torch's own precision: TF32 in convolutions, not in products."""
    with frozen(net, "eval"), tf32(True, products=False):
        yield


def predicted(net: nn.Module, image: Tensor, args: argparse.Namespace) -> Tensor:
    """Classes, in the authors' batches."""
    return torch.cat([net(part).argmax(1) for part in torch.split(image, args.batch_size)])


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


def disagreements(
    case: Case, args: argparse.Namespace, our: tuple[Tensor, Tensor], their: tuple[Tensor, Tensor]
) -> list[dict[str, Any]]:
    """The images of different verdicts (flags [n], adversarial images): who broke them, and how right the
    network is, in float32 without TF32 and at torch's defaults, at what each side found."""
    _, net, data, _, _ = case
    index = (our[0] != their[0]).nonzero().flatten()
    rows = index.to(data.labels.device)
    label, found = data.labels[rows], {}
    for side, image in (("ours", our[1]), ("reference", their[1])):
        for how, precise in (("strict", False), ("default", True)):
            with frozen(net, "eval"), tf32(precise, products=False), torch.no_grad():
                found[f"{side}_{how}"] = -margin(net(image[rows]), label) if len(rows) else []
    return [
        {
            "image": i,
            "robust_ours": bool(our[0][i]),
            "robust_reference": bool(their[0][i]),
            "margin_at": {key: float(values[number]) for key, values in found.items()},
        }
        for number, i in enumerate(index.tolist())
    ]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(name: str, summary: dict[str, Any]) -> None:
    """One block of the table."""
    more = f" and {summary['setup_seconds']:.2f} s of set-up" if "setup_seconds" in summary else ""
    print(f"{name}: clean {summary['clean']}, {summary['seconds']:.2f} s{more}")
    for row in summary["members"]:
        print(
            f"  {row['name']:<12} attacked {row['attacked']:>6}  robust after it {row['count']:>6}  "
            f"forwards {row['forwards']:>10}  gradients {row['backwards']:>10}  {row['seconds']:>8.2f} s"
        )


def compared(
    case: Case, args: argparse.Namespace, found: dict[str, Any], flags: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Ours against the reference: ratios of seconds, and the images of different verdicts."""
    seconds, ratios, apart = found["reference"]["seconds"], {}, {}
    for mode in args.modes:
        ratios[mode] = seconds / found[mode]["seconds"]
        ratios[f"{mode}_with_setup"] = seconds / found[mode]["total_seconds"]
        rows = disagreements(case, args, flags[mode], flags["reference"])
        missed = sum(row["robust_ours"] for row in rows)
        apart[mode] = {"left_robust": missed, "broken_beyond": len(rows) - missed, "images": rows}
        print(
            f"{case[0]} {mode}: {ratios[mode]:.2f} times as fast as the reference "
            f"({ratios[f'{mode}_with_setup']:.2f} with set-up); left robust what it broke: {missed}, "
            f"broke what it left: {len(rows) - missed}"
        )
        for row in rows:
            print(f"  image {row['image']}: " + json.dumps({k: v for k, v in row.items() if k != "image"}))
    return {"times_faster_than_reference": ratios, "images_of_other_verdict": apart}


def by_seed(case: Case, args: argparse.Namespace, flags: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """How much a verdict depends on the random numbers: the first seed and further ones in every mode.

    Returns:
        Robust images of each run, and for each image on which the runs differ those that left it robust.
    """
    runs = {f"{mode}, seed {args.seed}": flags[mode][0] for mode in args.modes}
    for seed in args.more_seeds:
        again = argparse.Namespace(**{**vars(args), "seed": seed})
        runs |= {f"{mode}, seed {seed}": ours(case, again, mode)[1] for mode in args.modes}
    if "reference" in flags:
        runs[f"reference, seed {args.seed}"] = flags["reference"][0]
    robust = torch.stack([run.cpu() for run in runs.values()])
    differing = (robust.any(0) & ~robust.all(0)).nonzero().flatten().tolist()
    left = {str(i): [name for name, run in runs.items() if run[i]] for i in differing}
    for image, names in left.items():
        print(f"{case[0]}: image {image} is left robust by {len(names)} of {len(runs)}: {'; '.join(names)}")
    counts = {name: int(run.sum()) for name, run in runs.items()}
    return {"robust": counts, "images_that_differ": left}


def write(networks: dict[str, Any], args: argparse.Namespace, device: torch.device) -> None:
    """The file, as far as it goes."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings["runs"] = [folder.name for folder in args.runs]
    settings["data"] = args.data_name or (None if args.data is None else Path(args.data).name)
    settings["reference"] = "fra31/auto-attack" if args.reference else None
    settings["output"] = args.output.name
    settings["eps"] = None if args.eps is None else str(args.eps)
    ratio = "times_faster_than_reference"
    content = {
        ratio: {name: row[ratio] for name, row in networks.items() if ratio in row},
        "seed": args.seed,
        "environment": environment(device),
        "settings": settings,
        "networks": networks,
    }
    write_json(args.output, content)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="finished run folders")
    parser.add_argument("--which", default="last", choices=pipeline.WHICH)
    parser.add_argument("--train", nargs="*", default=[], help="networks to train here: plain-resnet18, ...")
    parser.add_argument("--data", default=None, help="source of the data to train on; digits by default")
    parser.add_argument("--data-name", default="", help="what to call the data in the results")
    parser.add_argument("--epochs", type=int, default=15, help="of training here")
    parser.add_argument("--n", type=int, default=1000, help="test images")
    parser.add_argument("--norm", default=None, choices=("linf", "l2"), help="the trained one, else linf")
    parser.add_argument(
        "--eps", type=Budget, default=None, help="the trained one, else 8/255, or 0.1 for gray images"
    )
    modes = ("exact", "strict", "fast")
    parser.add_argument("--modes", nargs="+", default=["exact", "fast"], choices=modes)
    parser.add_argument("--batch-size", type=int, default=500, help="of a batch, as the authors'")
    parser.add_argument("--microbatch", type=int, default=None, help="found from the memory by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more-seeds", nargs="*", type=int, default=[], help="verdicts with these too")
    parser.add_argument("--steps", type=int, default=None, help="shorten APGD and FAB, for a trial")
    parser.add_argument("--queries", type=int, default=None, help="shorten Square, for a trial")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--reference", type=Path, default=os.environ.get("SOFTDEFEND_AUTOATTACK"))
    parser.add_argument("--frozen", action="store_true", help="spare the authors' FAB its weight gradients")
    parser.add_argument("--tune", action="store_true", help="let cuDNN choose by timing, in our runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "autoattack.json")
    return parser.parse_args()


def main() -> int:
    """Measure every network in every mode."""
    args = arguments()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    device = resolve_device(args.device)
    networks: dict[str, Any] = {}
    for case in cases(args, device):
        name, _, _, threat, k = case
        found: dict[str, Any] = {}
        flags: dict[str, tuple[Tensor, Tensor]] = {}
        for mode in args.modes:
            found[mode], *flags[mode] = ours(case, args, mode)  # type: ignore[assignment]
        if args.reference:
            found["reference"], *flags["reference"] = theirs(case, args)  # type: ignore[assignment]
        for mode, summary in found.items():
            show(f"{name} {threat.norm} {threat.eps} {mode}", summary)
        row: dict[str, Any] = {"norm": threat.norm, "eps": str(threat.eps), "classes": k}
        if args.reference:
            row = {**compared(case, args, found, flags), **row}
        if args.more_seeds:
            row["by_seed"] = by_seed(case, args, flags)
        networks[name] = {**row, **found}
        # After each network, so that what is interrupted leaves what it has.
        write(networks, args, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
