"""What the processes of a training step tell each other: how many bytes, and in which time.

``benchmarks/scaling.py`` starts it under torchrun; the first process writes OUTPUT after every row:

    torchrun --standalone --nproc-per-node 2 benchmarks/scaling_messages.py OUTPUT --work resnet18:256

Each kind of message is timed by itself, as a step sends it: first launched by the host, then,
on GPUs, from a CUDA graph (``captured``), as a captured step sends it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import make_parser, write_json
from softdefend.core.processes import Processes, packed, unpack
from softdefend.execution.engine import Engine
from softdefend.experiments.bench import base_arguments
from softdefend.experiments.config import resolve
from softdefend.experiments.timed_step import ImageShape
from softdefend.models import NetSettings, build
from softdefend.training.buckets import Buckets
from softdefend.training.step import METERS

WORK = ("resnet18:256", "wrn34_10:256", "resnet18:1024", "wrn34_10:1024")
"""What is measured and predicted, as :meth:`Work.parse` reads it."""
SHAPE = ImageShape()
"""Of the images that ``softdefend bench`` times steps on."""
INDEX, NUMBER = 8, 4
"""Bytes of a sample's number, and of a float32."""


class Work(NamedTuple):
    """A network and the images of a batch, over all processes."""

    net: str
    batch: int

    @classmethod
    def parse(cls, text: str) -> Work:
        """From ``NET:BATCH``; timm's networks are ``timm:NAME:BATCH``."""
        net, _, batch = text.rpartition(":")
        if not net or not batch.isdecimal() or int(batch) < 1:
            raise ValueError(text)
        return cls(net, int(batch))


def make_net(name: str, *, device: str = "cpu") -> nn.Module:
    """A network for such images."""
    size: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "image_size": (SHAPE.size, SHAPE.size)}
    with torch.device(device):
        return build(
            NetSettings(name=name), num_classes=SHAPE.classes, in_channels=3, pretrained=False, **size
        )


def gradient_bytes(net: nn.Module) -> int:
    """Bytes of the gradients of all parameters, in float32."""
    return NUMBER * sum(parameter.numel() for parameter in net.parameters())


def channels(net: nn.Module) -> list[int]:
    """Channels of each layer of batch normalization."""
    return [module.num_features for module in net.modules() if isinstance(module, _BatchNorm)]


def memory_bytes(batch: int) -> int:
    """Bytes of a batch's rows of label memory with their numbers."""
    return batch * (INDEX + NUMBER * SHAPE.classes)


def statistics_bytes(net: nn.Module) -> tuple[list[int], list[int]]:
    """Bytes that a process sends for each layer: in a forward mean, squares and count of each channel, in a
    backward the gradients of scale and shift."""
    widths = channels(net)
    return [NUMBER * 3 * width for width in widths], [NUMBER * 2 * width for width in widths]


@cache
def forwards(preset: str) -> int:
    """Forwards of a step in which batch normalization looks at the batch."""
    recipe = resolve(["--preset", preset]).recipe
    clean = recipe.label.asks_clean and recipe.label.clean_bn != "eval" and recipe.objective.forwards == 1
    return recipe.objective.forwards + clean


@cache
def remembers(preset: str) -> bool:
    """Whether a step writes rows of a label memory."""
    return resolve(["--preset", preset]).recipe.label.remembers


def messages(
    work: Sequence[Work], ours: Processes, device: torch.device, *, channels_last: bool
) -> Iterator[tuple[dict[str, Any], Callable[[], object]]]:
    """What each message is called, with its bytes, and a function that sends it."""
    meters = torch.rand(len(METERS), device=device)
    yield {"what": "meters", "bytes": NUMBER * len(METERS)}, partial(ours.sum, meters)
    for batch in dict.fromkeys(one.batch for one in work):
        index = ours.own(torch.arange(batch, device=device))
        rows = torch.rand(len(index), SHAPE.classes, device=device)
        named = {"what": "memory", "batch_size": batch, "bytes": memory_bytes(batch)}
        yield named, partial(ours.gather, index, rows)
    for name in dict.fromkeys(one.net for one in work):
        net = make_net(name).to(device)
        if channels_last:
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        buckets = Buckets(ours, list(net.parameters())).buckets
        flat = torch.rand(gradient_bytes(net) // NUMBER, device=device)
        for what, message in (
            ("gradients", partial(_average, ours, buckets)),
            ("sum", partial(ours.sum, flat)),
        ):
            yield {"what": what, "net": name, "bytes": gradient_bytes(net)}, message
        for way, sizes in zip(("forward", "backward"), statistics_bytes(net), strict=True):
            each = [torch.rand(1, size // NUMBER, device=device) for size in sizes]
            send = ours.gather if way == "forward" else ours.sum
            named = {"what": f"statistics {way}", "net": name, "bytes": sum(sizes), "count": len(sizes)}
            yield named, partial(_each, send, each)


@torch.no_grad()
def _average(ours: Processes, buckets: Sequence[Sequence[torch.Tensor]]) -> None:
    """Send what follows a backward pass with which nothing overlaps."""
    sums = [packed(bucket) for bucket in buckets]
    waits = [ours.begin_sum_(total) for total in sums]
    for bucket, total, wait in zip(buckets, sums, waits, strict=True):
        wait()
        unpack(total.div_(ours.size), bucket)


def _each(send: Callable[[torch.Tensor], object], tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        send(tensor)


def milliseconds(send: Callable[[], object], times: int, device: torch.device) -> float:
    """Of one call, of so many after one that is not counted."""
    send()
    _finish(device)
    started = time.perf_counter()
    for _ in range(times):
        send()
    _finish(device)
    return 1e3 * (time.perf_counter() - started) / times


def captured(send: Callable[[], object]) -> Callable[[], None]:
    """The same message from a CUDA graph, recorded as training steps are."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        send()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        send()
    return graph.replay


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--work", type=Work.parse, nargs="+", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--settings", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    engine = Engine(resolve(base_arguments([*args.settings, "--runtime.device", args.device])).runtime)
    ours, device, rows = engine.processes, engine.device, []
    last = bool(engine.settings.channels_last)
    with engine.training_numerics():
        for record in (False, True) if device.type == "cuda" else (False,):
            for row, send in messages(args.work, ours, device, channels_last=last):
                ms = milliseconds(captured(send) if record else send, args.times, device)
                rows.append({**row, "captured": record, "ms": round(ms, 4)})
                if ours.first:
                    write_json(args.output, rows)
    ours.wait()


if __name__ == "__main__":
    main()
