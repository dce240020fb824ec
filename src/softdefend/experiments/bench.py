"""The speed of training steps, against the machine's own ceiling and the reference code's step."""

from __future__ import annotations

import importlib
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
from torch.utils.flop_counter import FlopCounterMode

from softdefend.core import rng
from softdefend.core.environment import environment
from softdefend.core.errors import SettingError
from softdefend.core.files import write_atomic
from softdefend.core.hints import check_fields
from softdefend.core.rule import RunInfo
from softdefend.data import Augmented, Split
from softdefend.execution.batch_norm import synchronize
from softdefend.execution.engine import Engine
from softdefend.experiments.catalog import units
from softdefend.experiments.config import Experiment, resolve
from softdefend.labels import KD
from softdefend.models import NetSettings, build
from softdefend.training.optim import make_optimizer
from softdefend.training.shares import check_shares
from softdefend.training.step import Phase, TrainStep

_log = logging.getLogger(__name__)

CLASSES, SIZE = 10, 32
"""Classes and side in pixels of the random RGB images that steps are timed on: CIFAR-10's."""
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
    steps: int = 50
    """Steps in one measurement; the figure is the median of the measurements."""
    repeats: int = 5
    """Measurements."""
    warmup: int = 5
    """Steps before the first measurement; they compile, tune and capture."""
    images: int = 50_000
    """Training images, for seconds per epoch."""
    reference: str | None = None
    """A checkout of devicerxx/SGLS to time in the same run; none when null."""
    output: str | None = None
    """JSON file to write, after every row; none when null."""

    def __post_init__(self) -> None:
        check_fields(self, "bench")
        for name in ("nets", "presets", "batch_sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = [(name, getattr(self, name)) for name in ("steps", "repeats", "warmup", "images")]
        for name, value in [*counts, *(("batch_sizes", size) for size in self.batch_sizes)]:
            if value < 1:
                raise SettingError(f"bench.{name}", value, "a whole number >= 1")
        for preset in self.presets:
            if isinstance(resolve(["--preset", preset]).recipe.label, KD):
                raise SettingError("bench.presets", preset, "recipes without trained teachers")
        if self.reference is not None and not os.path.isfile(Path(self.reference) / "losses" / "loss.py"):
            raise SettingError("bench.reference", self.reference, "a checkout of devicerxx/SGLS")


def bench_train(settings: BenchSettings, overrides: Sequence[str] | None = None) -> dict[str, Any]:
    """Time training steps on random images of CIFAR-10's shape.

    Args:
        settings: what to time.
        overrides: further arguments of ``softdefend train``, over protocol ``cifar10_resnet18``; such as
            ``--runtime.device cpu``.

    Returns:
        The rows, with ceiling and machine, as the first process writes them to ``settings.output`` each time.
    """
    arguments = base_arguments(overrides or [])
    engine = Engine(resolve(arguments).runtime)
    dtype = torch.bfloat16 if engine.settings.precision == "bf16" else torch.float32
    peak = measure_ceiling(engine.device, dtype)
    count = engine.processes.size
    where = str(engine.device) if count == 1 else f"{count} x {engine.device.type}"
    machine = f"{where}, {engine.settings.precision}"
    _log.info("%s: matrix products run at %.4g TFLOP/s", machine, peak)
    result: dict[str, Any] = {
        "ceiling_tflops": round(peak, 2),
        "precision": engine.settings.precision,
        "processes": count,
        "steps": settings.steps,
        "repeats": settings.repeats,
        "rows": [],
        "environment": environment(engine.device),
    }
    for name in settings.nets:
        flops = count_forward_flops(name)
        for size in settings.batch_sizes:
            for preset in settings.presets:
                experiment = resolve([*arguments, "--preset", preset, "--net.name", name])
                row: dict[str, Any] = {"net": name, "recipe": preset, "batch_size": size}
                row |= _time_ours(experiment, size, settings, flops, peak)
                reference = _time_reference(experiment, preset, size, engine.device, settings)
                if reference is not None:
                    ratio = round(reference / row["ms"], 3)
                    row = {"ratio": ratio, **row, "reference_ms": round(reference, 4)}
                result["rows"].append(row)
                _log.info("%s", format_row(row))
                if settings.output and engine.processes.first:
                    write_atomic(Path(settings.output), json.dumps(result, indent=1).encode() + b"\n")
    return result


def base_arguments(overrides: Sequence[str]) -> list[str]:
    """Words of ``softdefend train`` for the experiments that are timed."""
    return ["--config", "cifar10_resnet18", *overrides]


def format_row(row: dict[str, Any]) -> str:
    """One row for people: the ratio first where there is one."""
    ratio = (
        f"{row['ratio']:5.2f} times the reference ({row['reference_ms']:.4g} ms)  " if "ratio" in row else ""
    )
    return (
        f"{row['net']:<16} {row['recipe']:<16} batch {row['batch_size']:<4} {ratio}{row['ms']:8.4g} ms a "
        f"step  {row['seconds_per_epoch']:.4g} s an epoch  {100 * row['ceiling_share']:.1f}% of the ceiling"
    )


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product on this device: what no training step can exceed."""
    n = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = median(_seconds(lambda: torch.mm(left, right), 10, device) for _ in range(5)) / 10
    return 2 * n**3 / seconds / 1e12


def count_forward_flops(net: str) -> int:
    """Floating-point operations of one image's forward through a network for CIFAR-10."""
    made = _net(net)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        made(torch.zeros(1, 3, SIZE, SIZE))
    return int(counter.get_total_flops())


def _net(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the network is drawn on the CPU
        torch.manual_seed(0)
        return build(
            NetSettings(name=name),
            num_classes=CLASSES,
            in_channels=3,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            image_size=(SIZE, SIZE),
            pretrained=False,
        )


def _time_ours(
    experiment: Experiment, size: int, settings: BenchSettings, flops: int, peak: float
) -> dict[str, Any]:
    engine = Engine(experiment.runtime)
    run_step, setup = _prepare(experiment, size, engine, settings.warmup)
    with engine.training_numerics():
        setup_seconds = _seconds(setup, 1, engine.device)
        ms = 1e3 * median(
            _seconds(run_step, settings.steps, engine.device) / settings.steps
            for _ in range(settings.repeats)
        )
    recipe, share = experiment.recipe, size // engine.processes.size
    work = units(*recipe.rules, recipe.attack.steps)
    return {
        "ms": round(ms, 4),
        "seconds_per_epoch": round(ms * (settings.images // size) / 1e3, 3),
        "setup_seconds": round(setup_seconds, 1),
        "tflop": round(work * flops * size / 1e12, 5),
        "ceiling_share": round(work * flops * share / 1e12 / (ms / 1e3) / peak, 5),
    }


def _prepare(
    experiment: Experiment, size: int, engine: Engine, warmup: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A function that makes one step in the last phase, and one that makes the first ones."""
    n, device, recipe = 8 * size, engine.device, experiment.recipe
    draw = rng.stream(0, "bench")
    images = torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (n,), generator=draw)
    channels_last = bool(engine.settings.channels_last)
    augment, epochs = experiment.augment, experiment.optim.epochs
    data = Augmented(Split(images, labels), device, augment, channels_last=channels_last)
    check_shares(data, recipe, replace(experiment.optim, batch_size=size), engine.processes)
    net = _net(experiment.net.name).to(device)
    if engine.settings.batch_norm == "synchronized":
        synchronize(net, engine.processes)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for rule in recipe.rules:
        rule.setup(RunInfo(data.labels, CLASSES, epochs, net, engine.autocast, engine.processes))
        rule.advance(epochs - 0.5)
    optimizer = make_optimizer(recipe.trained(net), experiment.optim, device)
    step = TrainStep(net, data, recipe, optimizer, engine)
    step.set_lr(1e-3)  # small: the weights of a hundred steps on noise must stay finite
    phase = Phase(*(rule.phase(epochs - 1) for rule in recipe.rules))
    plan = data.plan(seed=0, epoch=0, views=recipe.objective.views)
    made = iter(range(sys.maxsize))

    def once() -> None:
        number = next(made)
        start = number % 8 * size
        step(plan[start : start + size], phase, number)
        for rule in recipe.rules:
            rule.after_step()

    def first() -> None:
        for _ in range(warmup):
            once()

    return once, first


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
    steps = experiment.recipe.attack.steps
    # Its label rule keeps its table on a GPU, whatever the device.
    if (
        settings.reference is None
        or not loss_name
        or not net_name
        or (loss_name == "SGLS" and device.type != "cuda")
    ):
        return None
    with _importable(Path(settings.reference)):
        net: nn.Module = importlib.import_module("models").model_dict[net_name](CLASSES).to(device)
        losses = importlib.import_module("losses.loss")
        draw = rng.stream(0, "bench")
        image = torch.rand(size, 3, SIZE, SIZE, generator=draw).to(device)
        label = torch.randint(0, CLASSES, (size,), generator=draw)
        criterion = (
            losses.AT(perturb_steps=steps)
            if loss_name == "AT"
            else losses.SGLS(label.numpy(), CLASSES, es=0, perturb_steps=steps)
        )
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
        index, label = torch.arange(size), label.to(device)

        def once() -> None:
            optimizer.zero_grad()
            logits, loss = criterion(image, label, index, 1, net, optimizer)
            loss.backward(retain_graph=True)
            optimizer.step()
            _read(loss, logits, label)

        with _tuned_convolutions():
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


@contextmanager
def _tuned_convolutions() -> Iterator[None]:
    """cuDNN as the reference sets it: it tries its kernels, and convolutions may use TF32."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
