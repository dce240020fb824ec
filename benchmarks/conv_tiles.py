"""Tiles for the fused 3x3 convolutions: time and error of every sensible one, on the layers of two networks.

    python benchmarks/conv_tiles.py --batches 128 512

Needs a GPU of compute capability 9.0. Each candidate makes relu(conv(x) + bias + residual) in bf16; its error
is the largest of any image against float32, its time the median of captured repetitions. Candidates are
compiled by several processes first. ``softdefend.execution.fused.residual.tile`` is written from such a list.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import RESULTS, make_parser, write_json
from softdefend.core.environment import environment
from softdefend.execution.fused import residual

LAYERS = {
    "resnet18 stage 1": (64, 32),
    "resnet18 stage 2": (128, 16),
    "resnet18 stage 3": (256, 8),
    "resnet18 stage 4": (512, 4),
    "wrn34_10 stage 1": (160, 32),
    "wrn34_10 stage 2": (320, 16),
    "wrn34_10 stage 3": (640, 8),
}
"""Channels in and out, and side in pixels."""
SHARED = 200_000
"""Bytes of shared memory that the operands in flight may take."""
Job = tuple[str, residual.Tile]


def candidates(channels: int, side: int) -> list[residual.Tile]:
    """Tiles that fit into registers and shared memory and waste no more than half of their columns."""
    found = []
    sizes = itertools.product((64, 128, 256), (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5))
    for pixels, columns, depth, warps, stages in sizes:
        area = pixels * columns
        fits = 4096 <= area <= 32768 and stages * (pixels + columns) * depth * 2 <= SHARED
        sensible = (warps == 8) == (area > 16384) or area == 16384
        if fits and sensible and columns < 2 * channels and (channels % depth == 0 or depth == 64):
            rows = min(side, pixels // side)
            if rows:
                found.append(
                    residual.Tile(max(pixels // (rows * side), 1), rows, columns, depth, warps, stages)
                )
    return found


def case(layer: str, batch: int) -> tuple[Tensor, ...]:
    """Image, weights, bias, residual and room for the result."""
    channels, side = LAYERS[layer]
    draws = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=draws)

    x, other = (normal(batch, side, side, channels).bfloat16() for _ in range(2))
    w = (normal(channels, 9 * channels) / (9 * channels) ** 0.5).bfloat16()
    return x, w, normal(channels), other, torch.full_like(other, torch.nan)


def convolve(tile: residual.Tile, tensors: tuple[Tensor, ...]) -> None:
    """One launch."""
    from softdefend.execution.fused import kernels

    x, w, bias, other, out = tensors
    batch, side, _, channels = x.shape
    block, window = (
        [tile.images, tile.rows, side, tile.columns],
        [tile.images, tile.rows, side, tile.depth],
    )
    described = residual._described
    programs = -(-batch // tile.images) * (side // tile.rows) * -(-channels // tile.columns)
    kernels.convolve[(programs,)](
        described(x, window),
        described(w, [tile.columns, tile.depth]),
        None,
        None,
        described(out, block),
        None,
        described(other, block),
        None,
        bias,
        None,
        side,
        channels,
        channels,
        0,
        False,
        tile.images,
        tile.rows,
        side,
        tile.columns,
        tile.depth,
        False,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def compiles(job: Job) -> str | None:
    """Compile one candidate into the cache; why not, where it cannot be."""
    try:
        convolve(job[1], case(job[0], 8))
        torch.cuda.synchronize()
    except Exception as error:
        return repr(error)[:200]
    return None


def error(tensors: tuple[Tensor, ...]) -> float:
    """Largest relative error of an image."""
    x, w, bias, other, out = tensors
    channels = x.shape[-1]
    kernel = w.float().view(channels, 3, 3, channels).permute(0, 3, 1, 2)
    true = F.conv2d(x.float().permute(0, 3, 1, 2), kernel, bias, padding=1).permute(0, 2, 3, 1)
    true = F.relu(true + other.float()).flatten(1)
    apart = torch.linalg.vector_norm(out.float().flatten(1) - true, dim=1)
    return float((apart / torch.linalg.vector_norm(true, dim=1)).nan_to_num(torch.inf).max())


def microseconds(function: Callable[[], object], times: int = 20) -> float:
    """Of one call, from captured repetitions."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            function()
    graph.replay()
    found = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(end) / times)
    return median(found)


def measured(layer: str, batch: int, tiles: list[residual.Tile]) -> dict[str, Any]:
    """All candidates for one layer, fastest first; the one in use; cuDNN's bare convolution."""
    channels, side = LAYERS[layer]
    tensors = case(layer, batch)
    x, w = tensors[:2]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    used = residual.tile(batch, side, side, channels, channels, processors)
    rows = []
    for tile in tiles:
        tensors[-1].fill_(torch.nan)
        convolve(tile, tensors)
        rows.append(
            {
                "us": round(microseconds(lambda tile=tile: convolve(tile, tensors)), 2),  # type: ignore[misc]
                "error": round(error(tensors), 5),
                "used": tile == used,
                **vars(tile),
            }
        )
    kernel = w.view(channels, 3, 3, channels).permute(0, 3, 1, 2)
    bare = microseconds(lambda: F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=1))
    tflop = 2 * batch * side**2 * 9 * channels**2 / 1e12
    return {
        "layer": layer,
        "batch": batch,
        "tflop": round(tflop, 5),
        "cudnn_us": round(bare, 2),
        "tiles": sorted(rows, key=lambda row: row["us"]),
    }


def main() -> int:
    """Compile, check, time, print the fastest, write all."""
    parser = make_parser(__doc__)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--batches", nargs="+", type=int, default=[128])
    parser.add_argument("--processes", type=int, default=8, help="that compile")
    parser.add_argument("--output", type=Path, default=RESULTS / "conv_tiles.json")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    jobs = [(layer, tile) for layer in args.layers for tile in candidates(*LAYERS[layer])]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        reasons = list(pool.map(compiles, jobs, chunksize=4))
    good = [job for job, reason in zip(jobs, reasons, strict=True) if reason is None]
    print(f"{len(good)} of {len(jobs)} tiles compile")
    rows = []
    for layer, batch in itertools.product(args.layers, args.batches):
        row = measured(layer, batch, [tile for name, tile in good if name == layer])
        rows.append(row)
        print(f"{layer}, batch {batch}: cuDNN {row['cudnn_us']} us")
        for tile in row["tiles"]:
            if tile["used"] or tile in row["tiles"][:3] or tile["error"] > 0.02:
                print("  ", json.dumps(tile))
    content = {"environment": environment(torch.device("cuda", 0)), "layers": rows}
    write_json(args.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
