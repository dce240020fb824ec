"""What the masking audit says about honest and deceiving networks on digits; figures as JSON, tables as text.

    python benchmarks/audit_zoo.py --jobs 2
    python benchmarks/audit_zoo.py --cifar DIR     # adds four small networks on CIFAR-10 in hub layout
    python benchmarks/audit_zoo.py --tables        # the tables of docs/audit.md, and of honest networks

The thresholds were chosen on four seeds; two were only looked at afterwards. A
seed changes the split, the initial weights, the batches and the audit's draws.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import RESULTS, make_parser
from softdefend.attacks import PGD
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.data import DataSettings, load
from softdefend.evaluation.masking import CHECKS, audit
from softdefend.models import normalize
from softdefend.models.small_cnn import SmallCNN
from softdefend.models.wide_resnet import WideResNet

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "evaluation"))

import zoo  # noqa: E402

CHOSEN_ON, HELD_OUT = (0, 1, 2, 3), (4, 5)
THREATS = (("linf", "0.1"), ("linf", "0.2"), ("l2", "0.5"))
IMAGES = 200


def main() -> int:
    """Audit every network and write what came out, or print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, each in a process of its own")
    parser.add_argument("--cifar", type=Path, help="Parquet folder of CIFAR-10: measure these networks only")
    parser.add_argument("--cifar-name", default="CIFAR-10 (JPEG mirror)", help="what the data is called")
    parser.add_argument("--tables", action="store_true", help="print the tables of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS / "audit_zoo.json")
    args = parser.parse_args()
    content = json.loads(args.output.read_text()) if args.output.exists() else {}
    if args.tables:
        print(*(table(content) for table in (*TABLES, honest_table)), sep="\n\n")
        return 0
    if args.cifar:
        content["cifar"] = cifar(args.cifar, args.cifar_name)
    else:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            rows = [row for part in pool.map(one_seed, CHOSEN_ON + HELD_OUT) for row in part]
        content |= {
            "data": "scikit-learn digits",
            "images": IMAGES,
            "seeds": {"thresholds chosen on": CHOSEN_ON, "held out": HELD_OUT},
            "torch": torch.__version__,
            "python": platform.python_version(),
            "honest": [row for row in rows if row["kind"] == "honest"],
            "deceivers": [row for row in rows if row["kind"] == "deceiver"],
        }
    lines = [f"{json.dumps(name)}: {_compact(value)}" for name, value in content.items()]
    args.output.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


def _compact(value: Any) -> str:
    """A list with one line for each item."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n " + ",\n ".join(json.dumps(item) for item in value) + "\n]"


def one_seed(seed: int) -> list[dict[str, Any]]:
    """Every network of one seed."""
    torch.set_num_threads(1)
    home = zoo.Zoo(IMAGES, seed)
    rows = []
    for norm, eps in THREATS:
        for name in zoo.HONEST_NAMES:
            rows.append(
                _row("honest", name, home.honest(name), home, seed, ThreatModel(norm, eps), home.plain)
            )
    for name, deceiver in zoo.DECEIVERS.items():
        surrogate = home.surrogate if deceiver.surrogate else None
        rows.append(_row("deceiver", name, home.deceiver(name), home, seed, zoo.THREAT, surrogate))
    return rows


def _row(
    kind: str,
    name: str,
    net: nn.Module,
    home: Any,
    seed: int,
    threat: ThreatModel,
    surrogate: nn.Module | None,
) -> dict[str, Any]:
    started = time.time()
    result = audit(net, home.images, home.labels, threat, seed=seed, surrogate=surrogate, fresh=home.fresh)
    seconds = time.time() - started
    clean, robust = _accuracies(net, home.images, home.labels, threat)
    print(f"seed {seed} {threat.norm} {threat.eps} {name}: {', '.join(result.suspicious) or '-'}", flush=True)
    return {
        "kind": kind,
        "name": name,
        "seed": seed,
        "norm": threat.norm,
        "eps": str(threat.eps),
        "clean": clean,
        "pgd-20": robust,
        "verdict": result.verdict,
        "suspicious": result.suspicious,
        "figures": {f.check: None if f.figure is None else float(f"{f.figure:.4g}") for f in result.findings},
        "seconds": round(seconds, 1),
    }


def _accuracies(net: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel) -> tuple[float, float]:
    """Clean accuracy, and that under PGD-20 where there is a gradient, as a share."""
    with torch.no_grad():
        right = net(images).argmax(1) == labels

    def forward(image: Tensor) -> Tensor:
        return net(image) + (0 * image).flatten(1).sum(1, keepdim=True)

    adversarial = PGD(steps=20)(forward, images, labels, threat, generator=stream(0, "zoo/pgd"))
    with torch.no_grad():
        robust = right & (net(adversarial).argmax(1) == labels)
    return round(float(right.float().mean()), 4), round(float(robust.float().mean()), 4)


def cifar(path: Path, name: str) -> list[dict[str, Any]]:
    """Small networks on 32x32 color images at 8/255, and deceivers made of them. Trained for minutes on a
    CPU: they stand for the size of the images, not for the state of the art."""
    torch.set_num_threads(1)
    bundle = load(DataSettings(source=str(path), name=name))
    order = torch.randperm(len(bundle.train), generator=stream(0, "zoo/order"))[:6000]
    images, labels = bundle.train.images[order].float() / 255, bundle.train.labels[order]
    home = zoo.Zoo(1)
    home.images, home.labels = bundle.test.images[:64].float() / 255, bundle.test.labels[:64]
    home.fresh = bundle.test.images[64:264].float() / 255, bundle.test.labels[64:264]
    threat = ThreatModel("linf", "8/255")

    statistics = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

    def small() -> nn.Module:
        return normalize(SmallCNN(10, 3, 16), *statistics)

    def residual() -> nn.Module:
        return normalize(WideResNet(10, 3, 16, 1), *statistics)

    trainings = {
        "plain": zoo.Training(small, epochs=8),
        "adversarially trained": zoo.Training(small, "at", eps=8 / 255, epochs=4),
        "plain, WRN-16-1": zoo.Training(residual, epochs=6),
        "adversarially trained, WRN-16-1": zoo.Training(residual, "at", eps=8 / 255, epochs=5),
    }
    nets = {title: training.fit(images, labels) for title, training in trainings.items()}
    for title in list(trainings):
        nets[f"{title}, bfloat16"] = zoo.Autocast(nets[title], torch.bfloat16).eval()
    rows = [_row("honest", title, net, home, 0, threat, nets["plain"]) for title, net in nets.items()]
    deceivers = {
        "logits x 10,000": zoo.Scaled(nets["adversarially trained"], 1e4),
        "logits x 30": zoo.Scaled(nets["plain, WRN-16-1"], 30),
        "plateaus at the evaluated images": zoo.Plateaus(nets["plain"], home.images, home.labels, 8 / 255),
        "quantisation": zoo.Quantised(nets["plain"], 16),
        "quantisation, straight-through": zoo.Quantised(nets["plain"], 16, True),
        "detached": zoo.Detached(nets["plain"]),
        "gradient turned round": zoo.Bent(nets["plain"], "flip"),
        "gradient of noise": zoo.Bent(nets["plain"], "noise"),
        "waves": zoo.Waves(nets["plain"], 600, 0.006),
        "decoys": zoo.Decoys(nets["plain"], images, 8 / 255),
    }
    for title, net in deceivers.items():
        rows.append(_row("deceiver", title, net.eval(), home, 0, threat, nets["adversarially trained"]))
    return [{"data": name, **row} for row in rows]


def check_table(content: dict[str, Any]) -> str:
    """What honest networks reach in each check, on either half of the seeds, against the limit."""
    halves = [set(seeds) for seeds in content["seeds"].values()]
    lines = [
        "| check | suspicious if | honest, chosen on | honest, held out | honest, CIFAR-10 | caught |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    color = [row for row in content["cifar"] if row["kind"] == "honest"]
    guilty = content["deceivers"] + [row for row in content["cifar"] if row["kind"] == "deceiver"]
    for check in CHECKS:
        worst = max if check.suspicious == "above" else min
        groups = [[r for r in content["honest"] if r["seed"] in half] for half in halves]
        cells = [_worst(check.name, worst, rows) for rows in (*groups, color)]
        caught = sum(check.name in row["suspicious"] for row in guilty)
        lines.append(
            f"| {check.name} | {check.threshold} | {' | '.join(cells)} | {caught} of {len(guilty)} |"
        )
    return "\n".join(lines)


def _worst(check: str, worst: Callable[[list[float]], float], rows: list[dict[str, Any]]) -> str:
    figures = [row["figures"][check] for row in rows if row["figures"][check] is not None]
    return f"{worst(figures):.3g}" if figures else "-"


def honest_table(content: dict[str, Any]) -> str:
    """Every honest network: accuracies in every ball."""
    lines = ["| network | clean | PGD-20 |", "| --- | --- | --- |"]
    rows = content["honest"] + [r | {"name": "CIFAR-10, " + r["name"]} for r in content["cifar"]]
    for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == "honest"):
        mine = [row for row in rows if row["name"] == name]
        cells = [_range([row[key] for row in mine]) for key in ("clean", "pgd-20")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(shares: list[float]) -> str:
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def deceiver_table(content: dict[str, Any]) -> str:
    """Every deceiver: accuracy under PGD-20, and the checks that are there to catch it."""
    lines = ["| network | PGD-20 | caught by |", "| --- | --- | --- |"]
    rows = content["deceivers"] + [r | {"name": "CIFAR-10, " + r["name"]} for r in content["cifar"]]
    for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == "deceiver"):
        mine = [row for row in rows if row["name"] == name]
        meant = zoo.DECEIVERS[name.removeprefix("CIFAR-10, ")].caught_by
        robust = _range([row["pgd-20"] for row in mine])
        caught = [check + _times(check, mine) for check in meant]
        lines.append(f"| {name} | {robust} | {'; '.join(caught)} |")
    return "\n".join(lines)


def _times(check: str, rows: list[dict[str, Any]]) -> str:
    """In how many audits a check was suspicious, where not in all."""
    times = sum(check in row["suspicious"] for row in rows)
    return f" ({times} of {len(rows)})" * (times < len(rows))


TABLES = (check_table, deceiver_table)
"""Those of the document."""

if __name__ == "__main__":
    sys.exit(main())
