"""The label memory at ImageNet-1k's scale, by storage: megabytes, microseconds of a read and write, errors.

    python benchmarks/label_memory.py --device cuda

1,281,167 samples of 1,000 classes, batches of 256 random samples, random peaked predictions. Dense float32
takes 5.1 GB, so name fewer --storages where that is too much. Errors are against a float64 table, over 100
updates of 256 samples whose predictions change a little from one to the next.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common import RESULTS, make_parser, write_json
from softdefend.core import rng
from softdefend.core.environment import environment
from softdefend.labels.memory import LabelMemory, make_memory

CLASSES, BATCH, REPEATS = 1000, 256, 200
MOMENTUM, UPDATES = 0.9, 100


def microseconds(memory: LabelMemory, n: int, device: torch.device) -> float:
    """Median over repeats of one update: read, average, write."""
    draw = rng.stream(0, "label-memory")
    times = []
    for _ in range(REPEATS):
        index = torch.randperm(n, generator=draw)[:BATCH].to(device)
        probability = (3 * torch.randn(BATCH, CLASSES, generator=draw)).softmax(1).to(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        memory.update(index, probability)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e6 * median(times)


def errors(storage: str) -> dict[str, float]:
    """The largest error of an entry, and the mean total variation distance of a row, after any update."""
    index = torch.arange(BATCH)
    label = torch.randint(0, CLASSES, (BATCH,), generator=rng.stream(0, "error-labels"))
    believed = 3 * torch.randn(BATCH, CLASSES, generator=rng.stream(0, "believed"))
    memory = make_memory(storage, label, CLASSES, MOMENTUM)
    exact = torch.nn.functional.one_hot(label, CLASSES).double()
    entry, distance = [], []
    for update in range(UPDATES):
        noise = torch.randn(BATCH, CLASSES, generator=rng.stream(0, "noise", step=update))
        probability = (believed + noise).softmax(1)
        exact = MOMENTUM * exact + (1 - MOMENTUM) * probability.double()
        memory.update(index, probability)
        wrong = (memory.read(index) - exact).abs()
        entry.append(float(wrong.max()))
        distance.append(float(wrong.sum(1).mean() / 2))
    return {"largest_error": round(max(entry), 6), "mean_row_distance": round(max(distance), 6)}


def main() -> None:
    """Measure every storage that fits, write JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--storages", nargs="+", default=["float32", "float16", "top-64", "top-32", "top-16"])
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--output", type=Path, default=RESULTS / "label_memory.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    labels = torch.randint(0, CLASSES, (args.samples,), generator=rng.stream(0, "labels")).to(device)
    rows: list[dict[str, Any]] = []
    for storage in args.storages:
        memory = make_memory(storage, labels, CLASSES, MOMENTUM)
        size = sum(tensor.numel() * tensor.element_size() for tensor in memory.state_dict().values())
        row = {
            "storage": storage,
            "megabytes": round(size / 1e6, 1),
            "update_us": round(microseconds(memory, args.samples, device), 1),
            **errors(storage),
        }
        rows.append(row)
        print(row, flush=True)
        del memory
    content = {
        "samples": args.samples,
        "classes": CLASSES,
        "batch": BATCH,
        "momentum": MOMENTUM,
        "rows": rows,
        "environment": environment(device),
    }
    write_json(args.output, content)


if __name__ == "__main__":
    main()
