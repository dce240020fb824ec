"""How fast images stream from disk, and for how much of a training step the GPU waits for them.

    python benchmarks/streaming.py --folder /tmp/jpegs
    python benchmarks/streaming.py --folder /tmp/jpegs --device cuda

Makes JPEGs of 500x375 pixels from random smooth images, and reads them again and again, as training reads
ImageNet: a random part of each is brought to 224x224 pixels, flipped and jittered.

First the loader alone, by number of processes: what ``load`` of a training step does, until the batch is on
the device. ``main_ms`` and ``worker_ms`` are milliseconds of processor time an image, of all threads of this
process and of the processes that decode. Without the latter, ``per_core_time`` is images a second of this
process's own time, which other work on the machine hardly lengthens.

Then, on a GPU, PGD-3 training of a ResNet-50 in bf16: seconds a step with streamed batches and with one batch
that stays, in turn; the share of waiting is what the former takes longer. Of a step with streamed batches:

- ``seconds_in_load``: this process's, until the batch is on its way to the device. Among them it waits for
  the device, which it is two steps ahead of at most.
- ``seconds_not_ready``: those of them in which images were not decoded yet.
- ``worker_ms``: as above; so the processes would decode ``loader_images_per_second`` if none waited.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common import RESULTS, make_parser, write_json
from softdefend import PGD, PGDAT, Hard, Plain
from softdefend.core.environment import environment
from softdefend.core.rule import RunInfo
from softdefend.core.threat import ThreatModel
from softdefend.data import Augmented, AugmentSettings, DataSettings, load
from softdefend.data.loader import AHEAD, CHUNK
from softdefend.execution.engine import Engine, RuntimeSettings
from softdefend.models import normalize
from softdefend.training import OptimSettings, Recipe
from softdefend.training.optim import make_optimizer
from softdefend.training.step import Phase, TrainStep

WIDTH, HEIGHT, QUALITY = 500, 375, 90
AUGMENT = AugmentSettings("resized-crop-flip", jitter=0.1)


def make_images(folder: Path, count: int, width: int = WIDTH, height: int = HEIGHT) -> int:
    """Write ``count`` images of two classes, but for those that are there; their bytes on average."""
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number:05d}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(number)
        coarse = draw.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        grain = draw.normal(0, 8, (height, width, 3))
        pixels = np.clip(np.asarray(smooth, dtype=np.float32) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=QUALITY)
    sizes = [path.stat().st_size for path in folder.glob("*/*.jpg")]
    return sum(sizes) // len(sizes)


def open_images(folder: Path, workers: int, size: int, device: torch.device) -> Augmented:
    """The images as training sees them."""
    settings = DataSettings(
        str(folder), residence="stream", image_size=size, workers=workers, validation=2, test_fraction=0.01
    )
    return Augmented(load(settings).train, device, AUGMENT, channels_last=device.type == "cuda")


def coming(data: Augmented, batch: int, count: int) -> Iterator[Tensor]:
    """Whole batches of one epoch after another, decoded ahead as if all were of one: epochs of as few images
    as these would begin too often."""
    rows: list[Tensor] = []
    for epoch in itertools.count():
        rows += [part for part in data.plan(seed=0, epoch=epoch).split(batch) if len(part) == batch]
        if len(rows) >= count:
            break
    data.expect(rows[:count])
    return iter(rows)


def batches_ahead(workers: int, batch: int) -> int:
    """How many batches the processes may have decoded before they are asked for."""
    return math.ceil(workers * AHEAD * CHUNK / batch)


def worker_seconds() -> float:
    """Processor time of the processes that decode, since they began."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def loader_row(folder: Path, workers: int, args: argparse.Namespace) -> dict[str, Any]:
    """The loader alone, after its processes have begun."""
    device, ahead = torch.device(args.device), batches_ahead(workers, args.batch)
    data = open_images(folder, workers, args.size, device)
    rows = coming(data, args.batch, 2 + args.batches + 2 * ahead)
    for _ in range(2 + ahead):
        data.load(next(rows))
    _synchronize(device)
    started, main, decoding = time.perf_counter(), time.process_time(), worker_seconds()
    for _ in range(args.batches):
        data.load(next(rows))
    _synchronize(device)
    images, wall = args.batches * args.batch, time.perf_counter() - started
    main, decoding = time.process_time() - main, worker_seconds() - decoding
    row = {"workers": workers, "images_per_second": round(images / wall, 1)}
    row["per_core"] = round(images / wall / max(workers, 1), 1)
    row |= {"main_ms": _milliseconds(main, images), "worker_ms": _milliseconds(decoding, images)}
    return row if workers else {**row, "per_core_time": round(images / main, 1)}


def _milliseconds(seconds: float, images: int) -> float:
    return round(1000 * seconds / images, 4)


class Bottleneck(nn.Module):
    """The block of ResNet-50 (He et al., arXiv 1512.03385), stride at its 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        shapes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        layers: list[nn.Module] = []
        for a, b, kernel, step in shapes:
            conv = nn.Conv2d(a, b, kernel, step, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        self.layers, self.shortcut = nn.Sequential(*layers[:-1]), nn.Sequential()
        if stride > 1 or inputs != 4 * width:
            conv = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] to four times ``width`` channels."""
        return torch.relu(self.layers(x) + self.shortcut(x))


def resnet50(classes: int) -> nn.Module:
    """ResNet-50 for ImageNet's images, behind its normalization."""
    blocks: list[nn.Module] = []
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(count):
            blocks.append(Bottleneck(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, classes)]
    body = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)
    return normalize(body, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def make_step(data: Augmented, engine: Engine, net: nn.Module) -> Callable[[Tensor, int], None]:
    """One step of PGD-3 training at 4/255."""
    net = net.to(engine.device)
    if engine.settings.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(net, OptimSettings(lr=1e-4), engine.device)
    threat, attack = ThreatModel("linf", "4/255"), PGD(steps=3, step_size="8/765")
    recipe = Recipe(Hard(), PGDAT(), Plain(), threat, attack)
    for rule in recipe.rules:
        rule.setup(RunInfo(data.labels, 1000, 1, net, engine.autocast))
    step, phase = TrainStep(net, data, recipe, optimizer, engine), Phase("fixed", "fixed", "fixed")
    step.set_lr(1e-4)
    return lambda rows, key: step(rows, phase, key)


class TimedLoad:
    """``data.load`` that adds up its seconds, and those of them in which images were not decoded yet."""

    def __init__(self, data: Augmented) -> None:
        self.data, self.load = data, data.load
        self.seconds = self.not_ready = 0.0

    def __call__(self, rows: Tensor) -> None:
        """Load a batch."""
        started, waited = time.perf_counter(), self.data.waited or 0.0
        self.load(rows)
        self.seconds += time.perf_counter() - started
        self.not_ready += (self.data.waited or 0.0) - waited


def training_row(folder: Path, workers: int, args: argparse.Namespace, net: nn.Module) -> dict[str, Any]:
    """Seconds a step with streamed batches, with one that stays, and the share of waiting."""
    runtime = RuntimeSettings(
        device=args.device, precision=args.precision, channels_last=None, compile=None, capture=None
    )
    engine = Engine(runtime)
    data = open_images(folder, workers, args.size, engine.device)
    step, keys, load_batch = make_step(data, engine, net), itertools.count(), data.load
    timed_load, ahead = TimedLoad(data), batches_ahead(workers, args.batch)
    rows = coming(data, args.batch, ahead + args.repeats * (2 + ahead + args.batches))

    def seconds(batches: list[Tensor], load_now: Callable[[Tensor], None]) -> float:
        """Of a step."""
        setattr(data, "load", load_now)  # noqa: B010
        _synchronize(engine.device)
        started = time.perf_counter()
        for batch in batches:
            step(batch, next(keys))
        _synchronize(engine.device)
        return (time.perf_counter() - started) / len(batches)

    times, decoding = [], 0.0
    with engine.training_numerics():
        for _ in range(args.repeats):
            seconds(list(itertools.islice(rows, 2 + ahead)), load_batch)  # decoded during other steps
            batches = list(itertools.islice(rows, args.batches))
            decoding -= worker_seconds()
            streamed = seconds(batches, timed_load)
            decoding += worker_seconds()
            times.append((streamed, seconds(batches[-1:] * args.batches, lambda rows: None)))
    streamed, kept = (median(column) for column in zip(*times, strict=True))
    steps = args.repeats * args.batches
    worker_ms = _milliseconds(decoding, steps * args.batch)
    return {
        "workers": workers,
        "batch": args.batch,
        "seconds_streamed": round(streamed, 5),
        "seconds_kept": round(kept, 5),
        "images_per_second": round(args.batch / streamed, 1),
        "share_waiting": round(max(0.0, 1 - kept / streamed), 4),
        "seconds_in_load": round(timed_load.seconds / steps, 5),
        "seconds_not_ready": round(timed_load.not_ready / steps, 5),
        "worker_ms": worker_ms,
        "loader_images_per_second": round(1000 * workers / worker_ms, 1) if worker_ms else None,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Make the images, measure, write JSON."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of the images, made where absent")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--device", default="cpu", help="with cuda training is measured too")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--output", type=Path, default=RESULTS / "streaming.json")
    args = parser.parse_args()
    size = make_images(args.folder, args.images)
    content: dict[str, Any] = {
        "images": args.images,
        "pixels": [WIDTH, HEIGHT],
        "bytes_per_image": size,
        "size": args.size,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "loader": [],
        "training": [],
    }
    for workers in args.workers:
        content["loader"].append(loader_row(args.folder, workers, args))
        print(content["loader"][-1], flush=True)
    if args.device != "cpu":
        row = training_row(args.folder, max(args.workers), args, resnet50(1000))
        content["training"].append(row)
        print(row, flush=True)
    write_json(args.output, {**content, "environment": environment(torch.device(args.device))})


if __name__ == "__main__":
    main()
