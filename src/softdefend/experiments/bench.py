"""The speed of training steps, against the machine's own ceiling and the reference code's step."""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.core import rng
from softdefend.core.environment import environment
from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.hints import check_fields
from softdefend.execution.engine import Engine
from softdefend.execution.network_mode import kernel_search
from softdefend.experiments.catalog import units
from softdefend.experiments.config import Experiment, resolve
from softdefend.experiments.timed_step import ImageShape, TimedStep, forward_flops
from softdefend.labels import KD

_log = logging.getLogger(__name__)

LARGEST = 4096
"""Side in pixels of the largest images; of larger ones not even small batches fit into memory."""
MOST_CLASSES = 1_000_000
"""Likewise, the last layer."""
REFERENCE_SIZE = 32
"""Side in pixels of the images that the reference code's networks are made for."""
EAGER = ("--runtime.compile", "false", "--runtime.capture", "false", "--runtime.fused", "false")
"""Words of ``softdefend train`` for a step that is launched operation by operation."""
REFERENCE_NETS = {"resnet18": "resnet18", "preact_resnet18": "preres18", "wrn34_10": "wrn34"}
"""Networks of this package, and what the reference code calls them."""
REFERENCE_LOSSES = {"pgd-at": "AT", "sglr-reference": "SGLS"}
"""Presets that the reference code (devicerxx/SGLS) has a step for, and its class."""


@dataclass(frozen=True)
class BenchSettings:
    """What to time, and how often.

    Raises:
        SettingError: a count below one, or an unknown preset.
    """

    nets: tuple[str, ...] = ("resnet18",)
    """Networks, as net.name has them."""
    presets: tuple[str, ...] = ("pgd-at", "trades", "sglr-reference")
    """Recipes; each in its last phase."""
    batch_sizes: tuple[int, ...] = (128,)
    """Images per step, of all processes together."""
    image_size: int = 32
    """Height and width in pixels of the random RGB images, 1 to 4096."""
    classes: int = 10
    """Classes of their random labels, 2 to 1,000,000."""
    against_eager: bool = False
    """Time the same step neither compiled nor captured in the same run."""
    steps: int = 50
    """Steps in one measurement; the figure is the median of the measurements."""
    repeats: int = 5
    """Measurements."""
    warmup: int = 5
    """Steps before the first measurement; they compile, tune and capture."""
    images: int = 50_000
    """Training images of an epoch, for its seconds."""
    reference: str | None = None
    """A checkout of devicerxx/SGLS to time in the same run; none when null."""
    output: str | None = None
    """JSON file to write, at the start and after every row; none when null."""

    def __post_init__(self) -> None:
        check_fields(self, "bench")
        for name in ("nets", "presets", "batch_sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = [(name, getattr(self, name)) for name in ("steps", "repeats", "warmup", "images")]
        for name, value in [*counts, *(("batch_sizes", size) for size in self.batch_sizes)]:
            if value < 1:
                raise SettingError(f"bench.{name}", value, "a whole number >= 1")
        if not 1 <= self.image_size <= LARGEST:
            raise SettingError("bench.image_size", self.image_size, f"a whole number from 1 to {LARGEST}")
        if not 2 <= self.classes <= MOST_CLASSES:
            raise SettingError("bench.classes", self.classes, f"a whole number from 2 to {MOST_CLASSES}")
        if self.batch_sizes and self.images < max(self.batch_sizes):
            accepted = f"at least bench.batch_sizes, here {max(self.batch_sizes)}"
            raise SettingError("bench.images", self.images, accepted)
        for preset in self.presets:
            if isinstance(resolve(["--preset", preset]).recipe.label, KD):
                raise SettingError("bench.presets", preset, "recipes without trained teachers")
        if self.reference is not None and not os.path.isfile(Path(self.reference) / "losses" / "loss.py"):
            raise SettingError("bench.reference", self.reference, "a checkout of devicerxx/SGLS")
        if self.reference is not None and self.image_size != REFERENCE_SIZE:
            accepted = f"{REFERENCE_SIZE} with bench.reference, whose networks take no other images"
            raise SettingError("bench.image_size", self.image_size, accepted)

    @property
    def shape(self) -> ImageShape:
        """Of the images."""
        return ImageShape(self.image_size, self.classes)


def bench_train(settings: BenchSettings, overrides: Sequence[str] | None = None) -> dict[str, Any]:
    """Time training steps on random images.

    Args:
        settings: what to time.
        overrides: further arguments of ``softdefend train``, over protocol ``cifar10_resnet18``; such as
            ``--runtime.device cpu``.

    Returns:
        The rows, with ceiling and machine, as the first process writes them to ``settings.output`` at the
        start and after each row.

    Raises:
        SettingError: a network that does not take such images; a recipe or a batch that does not fit what was
            given besides; ``against_eager`` where the step is neither compiled nor captured.
    """
    arguments = base_arguments(overrides or [])
    engine = Engine(resolve(arguments).runtime)
    if settings.against_eager and not (engine.settings.compile or engine.settings.capture):
        accepted = "false, or runtime.compile true or runtime.capture true"
        raise SettingError("bench.against_eager", "true with a step that is eager itself", accepted)
    work = list(itertools.product(settings.nets, settings.batch_sizes, settings.presets))
    for name, size, preset in work:  # before the first is timed
        _check([*arguments, "--preset", preset, "--net.name", name], size, engine.processes.size)
    flops = {name: _flops([*arguments, "--net.name", name], settings.shape) for name in settings.nets}
    dtype = torch.bfloat16 if engine.settings.precision == "bf16" else torch.float32
    peak = measure_ceiling(engine.device, dtype)
    count = engine.processes.size
    where = str(engine.device) if count == 1 else f"{count} x {engine.device.type}"
    _log.info("%s, %s: matrix products run at %.4g TFLOP/s", where, engine.settings.precision, peak)
    result: dict[str, Any] = {
        "ceiling_tflops": round(peak, 2),
        "precision": engine.settings.precision,
        "processes": count,
        "image_size": settings.image_size,
        "classes": settings.classes,
        "steps": settings.steps,
        "repeats": settings.repeats,
        "rows": [],
        "environment": environment(engine.device),
    }
    _write(result, settings, engine)
    for name, size, preset in work:
        words = [*arguments, "--preset", preset, "--net.name", name]
        row: dict[str, Any] = {"net": name, "recipe": preset, "batch_size": size}
        row |= _time_ours(resolve(words), size, settings, flops[name], peak)
        if settings.against_eager:
            eager = _time_ours(resolve([*words, *EAGER]), size, settings, flops[name], peak)["ms"]
            row |= {"eager_ms": eager, "eager_ratio": round(eager / row["ms"], 3)}
        reference = _time_reference(resolve(words), preset, size, engine.device, settings)
        if reference is not None:
            ratio = round(reference / row["ms"], 3)
            row = {"ratio": ratio, **row, "reference_ms": round(reference, 4)}
        result["rows"].append(row)
        _log.info("%s", format_row(row))
        _write(result, settings, engine)
    return result


def _check(words: Sequence[str], size: int, processes: int) -> None:
    """Refuse a recipe or a batch that does not fit the other settings.

    Raises:
        SettingError: naming what does not.
    """
    replace(resolve(words).optim, batch_size=size)
    if size % processes:
        accepted = f"a multiple of {processes}, so that each of {processes} processes has as many images"
        raise SettingError("bench.batch_sizes", f"{size} on {processes} processes", accepted)


def _write(result: dict[str, Any], settings: BenchSettings, engine: Engine) -> None:
    if settings.output and engine.processes.first:
        write_atomic(Path(settings.output), json.dumps(result, indent=1).encode() + b"\n")


def _flops(words: Sequence[str], shape: ImageShape) -> int:
    return forward_flops(resolve(words).net, shape)


def base_arguments(overrides: Sequence[str]) -> list[str]:
    """Words of ``softdefend train`` for the experiments that are timed."""
    return ["--config", "cifar10_resnet18", *overrides]


def format_row(row: dict[str, Any]) -> str:
    """One row for people: the ratio to the reference first where there is one."""
    parts = [
        f"{row['net']:<16} {row['recipe']:<16} batch {row['batch_size']:<4}",
        f"{row['ms']:8.4g} ms a step",
        f"{row['seconds_per_epoch']:.4g} s an epoch",
        f"{100 * row['ceiling_share']:.1f}% of the ceiling",
    ]
    if "ratio" in row:
        parts[0] += f" {row['ratio']:5.2f} times the reference ({row['reference_ms']:.4g} ms)"
    if "eager_ms" in row:
        parts.append(f"{row['eager_ratio']:.2f} times the eager step ({row['eager_ms']:.4g} ms)")
    if row.get("recompiled_after_warmup"):
        parts.append(f"{row['recompiled_after_warmup']} programs made after the first epoch")
    return "  ".join(parts)


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product on this device: what no training step can exceed."""
    n = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = median(_seconds(lambda: torch.mm(left, right), 10, device) for _ in range(5)) / 10
    return 2 * n**3 / seconds / 1e12


def _time_ours(
    experiment: Experiment, size: int, settings: BenchSettings, flops: int, peak: float
) -> dict[str, Any]:
    engine = Engine(experiment.runtime)
    step = TimedStep(experiment, size, settings.shape, engine)
    with engine.training_numerics():
        before = step.programs()
        setup_seconds = _seconds(lambda: step.warm_up(settings.warmup), 1, engine.device)
        first = step.programs()
        ms = 1e3 * median(
            _seconds(step, settings.steps, engine.device) / settings.steps for _ in range(settings.repeats)
        )
        if engine.settings.compile or engine.settings.capture:
            step.turn_epoch()
        made, later = first.since(before), step.programs().since(first)
    recipe, share = experiment.recipe, size // engine.processes.size
    work = units(*recipe.rules, recipe.attack.steps)
    return {
        "ms": round(ms, 4),
        "seconds_per_epoch": round(ms * (settings.images // size) / 1e3, 3),
        "setup_seconds": round(setup_seconds, 1),
        "tflop": round(work * flops * size / 1e12, 5),
        "ceiling_share": round(work * flops * share / 1e12 / (ms / 1e3) / peak, 5),
        "compiled": made.compiled,
        "captured": made.captured,
        "recompiled_after_warmup": later.compiled + later.captured,
    }


def _seconds(function: Callable[[], object], times: int, device: torch.device) -> float:
    """Wall seconds of ``times`` calls, to the end of what they started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _time_reference(
    experiment: Experiment, preset: str, size: int, device: torch.device, settings: BenchSettings
) -> float | None:
    """Milliseconds of the reference code's own step, on images that are on the device already: its loader's
    cost left out; None where it has no such step."""
    loss_name, net_name = REFERENCE_LOSSES.get(preset), REFERENCE_NETS.get(experiment.net.name)
    steps, k = experiment.recipe.attack.steps, settings.classes
    # Its label rule keeps its table on a GPU, whatever the device.
    if (
        settings.reference is None
        or not loss_name
        or not net_name
        or (loss_name == "SGLS" and device.type != "cuda")
    ):
        return None
    with _importable(Path(settings.reference)):
        net: nn.Module = importlib.import_module("models").model_dict[net_name](k).to(device)
        losses = importlib.import_module("losses.loss")
        draw = rng.stream(0, "bench")
        image = torch.rand(size, 3, REFERENCE_SIZE, REFERENCE_SIZE, generator=draw).to(device)
        label = torch.randint(0, k, (size,), generator=draw)
        criterion = (
            losses.AT(perturb_steps=steps)
            if loss_name == "AT"
            else losses.SGLS(label.numpy(), k, es=0, perturb_steps=steps)
        )
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
        index, label = torch.arange(size), label.to(device)

        def once() -> None:
            optimizer.zero_grad()
            logits, loss = criterion(image, label, index, 1, net, optimizer)
            loss.backward(retain_graph=True)
            optimizer.step()
            _read(loss, logits, label)

        with kernel_search(True):  # as the reference has it
            _seconds(once, settings.warmup, device)
            times = [_seconds(once, settings.steps, device) / settings.steps for _ in range(settings.repeats)]
    return 1e3 * median(times)


def _read(loss: Tensor, logits: Tensor, label: Tensor) -> tuple[float, float]:
    """What the reference's loop reads back from the device in every step."""
    return loss.item(), (logits.argmax(1) == label).float().mean().item()


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The checkout's packages (``models``, ``losses``) importable for a while."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("models", "losses"):
                del sys.modules[name]
