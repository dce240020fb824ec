"""Accuracy under common corruptions, computed on the fly for images of any size, after CIFAR-10-C.

Seventeen of the nineteen corruptions of Hendrycks and Dietterich ("Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", arXiv 1903.12261) at five severities, with the constants of the
authors' ``make_cifar_c.py`` (hendrycks/robustness, commit 8190fe3), which were chosen for 32x32 images;
larger images suffer relatively less from blurs and streaks. Frost is left out, which needs photographs, and
spatter, which needs an edge detector. Frost is one of the fifteen in the published mean, so a mean over these
is comparable between networks evaluated here, not with a leaderboard's. It is a plain mean of accuracies: the
paper's mean corruption error, divided by AlexNet's, has no baseline outside ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from softdefend.core import rng
from softdefend.core.errors import SettingError
from softdefend.core.processes import ALONE, Processes
from softdefend.data import Split
from softdefend.evaluation import distortions
from softdefend.evaluation.checkpoint import Checkpoint
from softdefend.evaluation.evaluate import answers
from softdefend.evaluation.measurement import Measurement
from softdefend.evaluation.records import Rate
from softdefend.evaluation.settings import EvaluateSettings
from softdefend.execution.network_mode import frozen, tf32

SEVERITIES = (1, 2, 3, 4, 5)

_Corruption = Callable[[Tensor, Any, Sequence[torch.Generator]], Tensor]

CORRUPTIONS: dict[str, tuple[_Corruption, tuple[Any, ...]]] = {
    "gaussian_noise": (distortions.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (distortions.shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (distortions.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (distortions.speckle_noise, (0.06, 0.10, 0.12, 0.16, 0.20)),
    "defocus_blur": (distortions.defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "glass_blur": (distortions.glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": (distortions.motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "zoom_blur": (distortions.zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "gaussian_blur": (distortions.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "snow": (
        distortions.snow,
        (
            (0.10, 0.2, 1.00, 0.60, 8, 3, 0.95),
            (0.10, 0.2, 1.00, 0.50, 10, 4, 0.90),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.90),
            (0.25, 0.3, 2.25, 0.60, 12, 6, 0.85),
            (0.30, 0.3, 1.25, 0.65, 14, 12, 0.80),
        ),
    ),
    "fog": (distortions.fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "brightness": (distortions.brightness, (0.05, 0.10, 0.15, 0.20, 0.30)),
    "contrast": (distortions.contrast, (0.75, 0.50, 0.40, 0.30, 0.15)),
    "saturate": (distortions.saturate, ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))),
    "elastic_transform": (
        distortions.elastic_transform,
        ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (distortions.pixelate, (0.95, 0.90, 0.85, 0.75, 0.65)),
    "jpeg_compression": (distortions.jpeg_compression, (80, 65, 58, 50, 40)),
}
"""Each corruption with its constant at severity 1 to 5, as in CIFAR-10-C."""


def corrupt(
    images: Tensor, name: str, severity: int, seed: int = 0, *, positions: Sequence[int] | None = None
) -> Tensor:
    """Corrupted copies of ``images``.

    The draws of an image depend on ``seed``, ``name`` and its position alone: neither on the other images
    nor on the severity, so that a higher severity is the same damage, stronger. (The published data set drew
    anew.)

    Args:
        images: [n, c, h, w] on the CPU, uint8 or floating point in [0, 1]. With other than 1 or 3 channels,
            JPEG and pixelation treat each channel as a gray image; without three, saturation has no effect.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: of all that is random.
        positions: [n], of the images in the data set; 0, 1, ... when None.

    Returns:
        The same shape and dtype, in the same range. uint8 is cut to whole levels, not rounded, as the
        published code does; JPEG and pixelation work on 8-bit levels whatever the dtype.

    Raises:
        SettingError: an unknown name, another severity, or images of another form.
    """
    if name not in CORRUPTIONS:
        raise SettingError("corruption", repr(name), ", ".join(CORRUPTIONS))
    if severity not in SEVERITIES:
        raise SettingError("severity", severity, "1 to 5")
    if images.dim() != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        given = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise SettingError("images", given, "[n, c, h, w], uint8 or floating point in [0, 1]")
    eight_bit = images.dtype == torch.uint8
    image = images.float() / 255 if eight_bit else images.float()
    function, levels = CORRUPTIONS[name]
    steps = range(len(image)) if positions is None else positions
    generators = [rng.stream(seed, f"corrupt/{name}", step=step) for step in steps]
    damaged = function(image, levels[severity - 1], generators).clamp(0, 1)
    # 1e-3 of a level: k/255 times 255 must not fall to k - 1
    return (255 * damaged + 1e-3).to(torch.uint8) if eight_bit else damaged.to(images.dtype)


def evaluate_corruptions(
    net: nn.Module,
    data: Split,
    *,
    device: torch.device | str = "cpu",
    names: Sequence[str] = tuple(CORRUPTIONS),
    index: Tensor | None = None,
    batch_size: int = 500,
    seed: int = 0,
    progress: bool = False,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Accuracy under every corruption and severity, in eval mode and float32.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k], on ``device``.
        data: images and labels.
        device: where the network runs; the images are corrupted on the CPU.
        names: which corruptions.
        index: positions [n] int64 of the images to take; all of them when None.
        batch_size: images at once; no part of the result.
        seed: of all that is random.
        progress: show a bar.
        processes: those that measure together, each some of the batches.

    Returns:
        For JSON: ``n``, ``seed``, ``clean`` (a :class:`Rate`), ``corruptions`` (by name, the ``Rate`` at each
        severity and their ``mean``), ``mean`` (over corruptions and severities, not normalized).

    Raises:
        SettingError: an unknown name.
    """
    index = torch.arange(len(data)) if index is None else index.cpu()

    @torch.no_grad()
    def rate(change: Callable[[Tensor, Tensor], Tensor]) -> Rate:
        right, parts = [], torch.split(index, batch_size)
        for part in processes.deal(parts):
            image = change(data.images[part], part)
            image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
            label = data.labels[part]
            right.append(answers(net(image.to(device)).cpu(), label.cpu()) == label.cpu())
        return Rate.of(torch.cat(processes.collect(right, len(parts))))

    table: dict[str, Any] = {}
    with frozen(net, "eval"), tf32(False):
        clean = rate(lambda image, _: image)
        for name in tqdm(names, desc="corruptions", leave=False, disable=None if progress else True):
            rates = [rate(_corruptor(name, severity, seed)) for severity in SEVERITIES]
            mean = fmean(one.rate for one in rates)
            table[name] = {"mean": mean, "severities": [asdict(one) for one in rates]}
    return {
        "n": len(index),
        "seed": seed,
        "clean": asdict(clean),
        "corruptions": table,
        "mean": fmean(row["mean"] for row in table.values()),
        "mean_is": "plain mean of accuracies over corruptions and severities, no AlexNet normalization",
    }


def _corruptor(name: str, severity: int, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda image, index: corrupt(image, name, severity, seed, positions=index.tolist())


def corruption_measurement(checkpoint: Checkpoint, settings: EvaluateSettings) -> Measurement:
    """Accuracy of a checkpoint under every corruption and severity."""

    def measure() -> dict[str, Any]:
        return evaluate_corruptions(
            checkpoint.net,
            checkpoint.source.bundle.test,
            device=checkpoint.device,
            index=checkpoint.subset(settings.size, settings.subset),
            batch_size=settings.microbatch or settings.batch_size,
            seed=settings.seed,
            progress=checkpoint.source.progress,
            processes=checkpoint.source.processes,
        )

    images = settings.images(len(checkpoint.source.bundle.test))
    depends_on = {**images, "seed": settings.seed, "corruptions": list(CORRUPTIONS)}
    return Measurement("-corruptions", depends_on, measure, corruption_table, together=True)


def corruption_table(result: dict[str, Any]) -> str:
    """Accuracy in per cent by corruption and severity as aligned text."""
    table = result["corruptions"]
    width = max(len(name) for name in (*table, "corruption"))
    lines = [f"{'corruption':<{width}}" + "".join(f"{severity:>7}" for severity in SEVERITIES) + "   mean"]
    lines += [
        f"{name:<{width}}"
        + "".join(f"{100 * rate['rate']:7.1f}" for rate in row["severities"])
        + f"{100 * row['mean']:7.1f}"
        for name, row in table.items()
    ]
    return "\n".join([*lines, f"{'mean':<{width}}{'':35}{100 * result['mean']:7.1f}"])
