"""What training steps would take on many GPUs, computed from bytes, links and the steps of one GPU.

    python benchmarks/scaling_model.py --work wrn34_10:1024 --counts 2 4 8 64

A step on N GPUs takes what one takes for a batch / N (measured, between two batch sizes interpolated, beyond
them extrapolated), and its messages:

- gradients, an all-reduce of 4 bytes a parameter;
- statistics, for each layer of batch normalization an all-gather a forward and an all-reduce a backward;
- rows of label memory, an all-gather; meters, an all-reduce.

Rings: of n GPUs each sends 2 (n - 1) / n of the bytes in 2 (n - 1) hops, half of both for an all-gather.
Across hosts, whose GPUs share one link, each host's ring comes first, then one between the hosts. A message
also takes a time to start. Bytes a second and this time are those of ``messages`` in scaling.json, on the
most GPUs there; without them, and between hosts, they are nominal (``measured`` says which). ``hidden`` is a
step whose gradients are wholly sent during the backward.

Where scaling.json has the step, the ratio of its images per second to the predicted ones stands beside it.
Inputs are of one H200: scaling.json if it has two batch sizes of the work, else train_step.json. Networks of
which neither has a step are left out: a line names them, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, make_parser, write_json
from scaling_messages import (
    NUMBER,
    WORK,
    Work,
    forwards,
    gradient_bytes,
    make_net,
    memory_bytes,
    remembers,
    statistics_bytes,
)
from softdefend.training.step import METERS

Row = dict[str, Any]
GPUS = 8
"""Of a host."""


@dataclass(frozen=True)
class Link:
    """What a message costs.

    Args:
        start: seconds, once a message.
        hop: seconds from one to the next.
        bandwidth: bytes a second that one sends while it receives as many.
        measured: the number of GPUs on which; 0 for nominal.
    """

    start: float
    hop: float
    bandwidth: float
    measured: int = 0


NVLINK = Link(start=8e-6, hop=1e-6, bandwidth=450e9)
"""Of an H200: 900 GB/s both ways together. The times are guesses."""
NETWORK = Link(start=0.0, hop=5e-6, bandwidth=50e9)
"""400 Gb/s a host, each way. The time is a guess."""


@dataclass(frozen=True)
class Cluster:
    """GPUs in hosts of :data:`GPUS`, or fewer in one."""

    count: int
    inside: Link = NVLINK
    between: Link = NETWORK

    def all_gather(self, size: int) -> float:
        """Seconds until all have ``size`` bytes, of which each had its share."""
        return self._seconds(size, 1)

    def all_reduce(self, size: int) -> float:
        """Seconds until all have the sum over all of ``size`` bytes each."""
        return self._seconds(size, 2)

    def _seconds(self, size: int, rounds: int) -> float:
        if self.count == 1:
            return 0.0
        local, hosts = min(self.count, GPUS), max(1, self.count // GPUS)
        spent = self.inside.start + self.between.start * (hosts > 1)
        for link, n in ((self.inside, local), (self.between, hosts)):
            spent += rounds * (n - 1) * (link.hop + size / n / link.bandwidth)
        return spent


def fitted(messages: Sequence[Row]) -> Link:
    """The links of the measured messages, on the most GPUs; the nominal ones where there are none."""
    last = [row for row in messages if row["captured"]] or list(messages)
    count = max((row["processes"] for row in last), default=0)
    last = [row for row in last if row["processes"] == count]
    small = [row for row in last if row["what"] == "meters"]
    large = [row for row in last if row["what"] == "gradients"]
    if not small or not large:
        return NVLINK
    start = max(0.0, small[0]["ms"] / 1e3 - 2 * (count - 1) * NVLINK.hop)
    sent = [2 * (count - 1) / count * row["bytes"] for row in large]
    rates = [
        size / max(row["ms"] - small[0]["ms"], 1e-3) * 1e3 for size, row in zip(sent, large, strict=True)
    ]
    return replace(NVLINK, start=start, bandwidth=median(rates), measured=count)


def interpolate(points: dict[int, float], size: float) -> float:
    """Milliseconds of a step of ``size`` images, from those of some batch sizes: on the line through the two
    around it, or the two nearest; through zero where there is one alone."""
    sizes = sorted(points)
    if len(sizes) == 1:
        return points[sizes[0]] * size / sizes[0]
    above = next((place for place, one in enumerate(sizes) if one >= size), len(sizes) - 1)
    low, high = sizes[max(above, 1) - 1], sizes[max(above, 1)]
    slope = (points[high] - points[low]) / (high - low)
    return points[low] + slope * (size - low)


@dataclass(frozen=True)
class Step:
    """A training step's messages.

    Args:
        gradients: bytes.
        forward, backward: bytes of each layer's statistics, of a process.
        forwards: that look at the batch.
        memory: bytes of the whole batch's rows; 0 without a label memory.
    """

    gradients: int
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    forwards: int
    memory: int

    @classmethod
    def of(cls, work: Work, recipe: str) -> Step:
        """Of a network, a batch and a preset."""
        net = make_net(work.net, device="meta")
        forward, backward = statistics_bytes(net)
        memory = memory_bytes(work.batch) if remembers(recipe) else 0
        return cls(gradient_bytes(net), tuple(forward), tuple(backward), forwards(recipe), memory)

    def seconds(self, cluster: Cluster) -> dict[str, float]:
        """What each kind of message takes."""
        forward = sum(cluster.all_gather(cluster.count * size) for size in self.forward)
        return {
            "gradients": cluster.all_reduce(self.gradients),
            "statistics": self.forwards * forward + sum(map(cluster.all_reduce, self.backward)),
            "memory": cluster.all_gather(self.memory) if self.memory else 0.0,
            "meters": cluster.all_reduce(NUMBER * len(METERS)),
        }


def predict(work: Work, recipe: str, points: dict[int, float], cluster: Cluster) -> Row:
    """The step on a cluster; ``times_one`` is against one GPU with the whole batch."""
    compute, one = interpolate(points, work.batch / cluster.count), interpolate(points, work.batch)
    spent = {what: 1e3 * s for what, s in Step.of(work, recipe).seconds(cluster).items()}
    ms = compute + sum(spent.values())
    hidden = ms - spent["gradients"]
    return {
        "net": work.net,
        "recipe": recipe,
        "batch_size": work.batch,
        "processes": cluster.count,
        "ms": round(ms, 4),
        "compute_ms": round(compute, 4),
        **{f"{what}_ms": round(value, 4) for what, value in spent.items()},
        "images_per_second": round(1e3 * work.batch / ms, 1),
        "times_one": round(one / ms, 3),
        "hidden_images_per_second": round(1e3 * work.batch / hidden, 1),
        "hidden_times_one": round(one / hidden, 3),
        "measured_links": cluster.inside.measured,
        "measured_batches": sorted(points),
    }


def points_of(rows: Sequence[Row], net: str, recipe: str) -> dict[int, float]:
    """Milliseconds of one GPU's steps by batch size."""
    return {
        row["batch_size"]: row["ms"]
        for row in rows
        if row["net"] == net and row["recipe"] == recipe and row.get("processes", 1) == 1
    }


def plain_steps(scaling: dict[str, list[Row]]) -> list[Row]:
    """The measured steps without further settings."""
    return [row for row in scaling.get("steps", []) if not row["settings"]]


def predictions(
    work: Sequence[Work], counts: Sequence[int], scaling: dict[str, list[Row]], single: Sequence[Row]
) -> list[Row]:
    """Rows for all work and numbers of GPUs.

    Args:
        work: networks and batches.
        counts: numbers of GPUs; those that cannot share a batch are left out.
        scaling: what ``scaling.py`` has measured.
        single: further rows of one GPU.
    """
    steps, found = plain_steps(scaling), []
    link = fitted(scaling.get("messages", []))
    for one in work:
        for recipe in dict.fromkeys(row["recipe"] for row in (*steps, *single) if row["net"] == one.net):
            own = points_of(steps, one.net, recipe)
            points = own if len(own) > 1 else points_of(single, one.net, recipe) or own
            for count in (count for count in counts if points and one.batch % count == 0):
                row = predict(one, recipe, points, Cluster(count, link))
                found.append(row | beside(row, steps))
    return found


def beside(row: Row, steps: Sequence[Row]) -> Row:
    """The measured step of a predicted one, and how many times the predicted images a second it makes."""
    names = ("net", "recipe", "batch_size", "processes")
    for other in steps:
        if all(other[name] == row[name] for name in names):
            return {"measured_ms": other["ms"], "measured_ratio": round(row["ms"] / other["ms"], 3)}
    return {}


def left_out(work: Sequence[Work], measured: Sequence[Row], scaling: Path) -> str | None:
    """A line about the networks of which no step of one GPU is known, and the command that measures them into
    the file ``scaling``; None without such."""
    known = {row["net"] for row in measured if row.get("processes", 1) == 1}
    missing = " ".join(f"{one.net}:{one.batch}" for one in work if one.net not in known)
    command = f"python benchmarks/scaling.py --gpus 1 --parts steps --work {missing} --output {scaling}"
    return f"--work: no step was measured of {missing}; first {command}" if missing else None


def read(path: Path) -> dict[str, Any]:
    """A result file's content; nothing where there is no file."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def show(row: Row) -> str:
    """One row for people."""
    ratio = f"  measured {row['measured_ratio']:.2f} times that" if "measured_ratio" in row else ""
    return (
        f"{row['net']:<10} {row['recipe']:<15} batch {row['batch_size']:<6}{row['processes']:>3} GPUs  "
        f"{row['images_per_second']:>9.0f} images/s  {row['times_one']:6.2f} times one GPU "
        f"({row['hidden_times_one']:.2f} if gradients are hidden){ratio}"
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--work", nargs="+", type=Work.parse, metavar="NET:BATCH", help=" ".join(WORK))
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8, 64], help="numbers of GPUs")
    parser.add_argument("--scaling", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--single", type=Path, default=RESULTS / "train_step.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling_model.json")
    args = parser.parse_args()
    check_counts(parser, args.counts)
    scaling, work = read(args.scaling), args.work or [Work.parse(one) for one in WORK]
    single = read(args.single).get("rows", [])
    rows = predictions(work, args.counts, scaling, single)
    for row in rows:
        print(show(row))
    if rows:
        inputs = [path.name for path in (args.scaling, args.single) if path.exists()]
        write_json(args.output, {"inputs": inputs, "rows": rows})
    if line := left_out(work, [*plain_steps(scaling), *single], args.scaling):
        print(line, file=sys.stderr)
        sys.exit(2)


def check_counts(parser: argparse.ArgumentParser, counts: Sequence[int]) -> None:
    """Refuse hosts that are not full."""
    if odd := [count for count in counts if count < 1 or (count > GPUS and count % GPUS)]:
        parser.error(f"--counts: {odd}; accepted: 1 to {GPUS}, or a multiple of {GPUS}")


if __name__ == "__main__":
    main()
