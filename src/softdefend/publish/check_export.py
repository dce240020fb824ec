"""Export a run's checkpoint, and measure the file against the network: same logits, same robust accuracy?"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.attacks import Attack
from softdefend.core.digest import file_digest
from softdefend.core.environment import versions
from softdefend.core.errors import SettingError
from softdefend.core.files import keep_earlier, move, parse_json, write_atomic
from softdefend.core.identity import check_weights
from softdefend.core.store import plain
from softdefend.core.threat import ThreatModel
from softdefend.core.weight_files import load_weights
from softdefend.data import DataBundle, Resident, load, subset
from softdefend.evaluation import Ensemble, Evaluator
from softdefend.evaluation.autoattack import parse
from softdefend.evaluation.records import Rate
from softdefend.evaluation.settings import Size, check_size, count_of
from softdefend.execution.engine import resolve_device
from softdefend.experiments.evaluate import open_run, run_identity
from softdefend.experiments.network import make_net
from softdefend.publish.export import SUFFIXES, Run, open_exported, quantize, write_network

_log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of logits, in units of the largest logit where that is above one."""

QUANTIZATIONS = ("int8",)
_BATCH = 500
_CALIBRATION = 256
"""Training images by which the ranges of activations are found."""
_ODD = 3
"""A batch of another size than that of the tracing."""


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and on what it is checked."""

    format: str = "onnx"
    """onnx, torchscript, torch-export, or robustbench (a state dict by the names that RobustBench uses)."""
    quantize: str | None = None
    """int8, with onnx: convolutions and linear layers in 8 bits."""
    which: str = "best"
    """best or last."""
    size: Size = 500
    """Test images on which the file is compared with the network."""
    attacks: tuple[str, ...] = ("pgd-20",)
    """Attacks on the network; the images they find are tried on the file."""
    seed: int = 0
    """Of the attacks."""


def export_run(
    folder: Path, settings: ExportSettings, output: Path | None = None, *, device: str = "auto"
) -> tuple[Path, dict[str, Any]]:
    """Write a checkpoint of a run as a file that runs elsewhere, and what it was measured to do beside it.

    The adversarial images are made on the network and tried on the file: what the file keeps of them is an
    upper bound of its robust accuracy.

    Args:
        folder: the run folder.
        settings: see there.
        output: of the file; ``export/`` in the run folder if None. A ``.json`` of the same name is written.
        device: of the attacks; the file runs on the CPU.

    What other settings or weights replace is kept in ``earlier/`` beside it.

    Returns:
        The file, and what stands in its JSON.

    Raises:
        SettingError: a run or settings that do not fit, a network that cannot be traced, or a file that gives
            other logits or classes than the network.
    """
    _check(settings)
    experiment = open_run(folder)
    chosen = resolve_device(device)
    bundle = load(experiment.data)
    check_size("--size", settings.size, 1)
    net = make_net(experiment, bundle)
    weights = folder / f"{settings.which}.safetensors"
    metadata = load_weights(net, weights)
    check_weights(weights, metadata, settings.which, run_identity(experiment, bundle))
    net.eval()
    name = f"{settings.which}-{settings.quantize}" if settings.quantize else settings.which
    path = output or folder / "export" / f"{name}{SUFFIXES[settings.format]}"
    temporary = path.with_name(f".new-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(net, bundle, temporary, settings)
        run = open_exported(
            temporary,
            settings.format,
            network=experiment.net.name,
            classes=len(bundle.classes),
            channels=bundle.test.images.shape[1],
        )
        threat = experiment.recipe.threat
        found = measure(net, run, bundle, threat, settings, chosen)
        if settings.quantize is None:
            _refuse_difference(found, settings.format)
        about = {
            "file": path.name,
            "sha256": file_digest(temporary),
            "bytes": temporary.stat().st_size,
            "weights": file_digest(weights),
            "network": experiment.net.name,
            "settings": asdict(settings),
            "norm": threat.norm,
            "eps": str(threat.eps),
            **found,
            "versions": versions(chosen),
        }
        described = path.with_name(f"{path.name}.json")
        if path.is_file() and not _same_export(described, about):
            _log.info(f"what stood at {path} is kept in {keep_earlier(path, described)}")
        move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomic(described, (json.dumps(about, indent=1) + "\n").encode())
    return path, about


def _same_export(described: Path, about: dict[str, Any]) -> bool:
    """Whether the JSON beside an exported file names the same weights and settings. The file itself differs
    from call to call."""
    try:
        known = parse_json(described.read_bytes())
    except (OSError, ValueError):
        return False
    names = ("weights", "settings")
    return isinstance(known, dict) and all(known.get(name) == plain(about[name]) for name in names)


def _check(settings: ExportSettings) -> None:
    if settings.format not in SUFFIXES:
        raise SettingError("--format", repr(settings.format), ", ".join(SUFFIXES))
    if settings.which not in ("best", "last"):
        raise SettingError("--which", repr(settings.which), "best or last")
    if settings.quantize is not None and settings.quantize not in QUANTIZATIONS:
        raise SettingError("--quantize", repr(settings.quantize), " or ".join(QUANTIZATIONS))
    if settings.quantize is not None and settings.format != "onnx":
        given = f"{settings.quantize} with --format {settings.format}"
        raise SettingError("--quantize", given, "it with --format onnx")


def _write(net: nn.Module, bundle: DataBundle, path: Path, settings: ExportSettings) -> None:
    example = _pixels(bundle.test.images[:2])
    if settings.quantize is None:
        write_network(net, example, path, settings.format)
        return
    whole = path.with_name(f"{path.name}.float.onnx")
    try:
        write_network(net, example, whole, settings.format)
        shown = subset(bundle.train.labels, min(_CALIBRATION, len(bundle.train)))
        quantize(whole, _pixels(bundle.train.images[shown]), path)
    finally:
        whole.unlink(missing_ok=True)


def _pixels(images: Tensor) -> Tensor:
    """uint8 images as the networks take them."""
    return images.float() / 255


class _Comparison:
    """A network and a file on the same images, which come batch by batch.

    Args:
        net: on the CPU, as the file is, in eval mode.
        run: of the file.
        label: [n] int64, on the CPU.
    """

    def __init__(self, net: nn.Module, run: Run, label: Tensor) -> None:
        self.net, self.run, self.label = net, run, label
        self.right = {who: torch.ones(len(label), dtype=torch.bool) for who in ("network", "file")}
        self.difference = self.largest = 0.0
        self.other = 0

    @torch.no_grad()
    def add(self, start: int, images: Tensor) -> None:
        """Images of the samples from ``start`` on: who is wrong on them is wrong from now on."""
        here = images.cpu()
        mine, theirs = self.net(here).float(), self.run(here).float()
        few = self.run(here[:_ODD]).float()
        if not torch.allclose(few, theirs[:_ODD], rtol=1e-3, atol=1e-3):
            raise SettingError("--format", "a file whose logits depend on the batch", "another format")
        self.difference = max(self.difference, float((mine - theirs).abs().max()))
        self.largest = max(self.largest, float(mine.abs().max()))
        self.other += int((mine.argmax(1) != theirs.argmax(1)).sum())
        part = slice(start, start + len(here))
        for who, logits in (("network", mine), ("file", theirs)):
            self.right[who][part] &= logits.argmax(1) == self.label[part]

    def rates(self) -> dict[str, dict[str, Any]]:
        """Who is still right, with 95% Wilson intervals."""
        return {who: asdict(Rate.of(right)) for who, right in self.right.items()}


def measure(
    net: nn.Module,
    run: Run,
    bundle: DataBundle,
    threat: ThreatModel,
    settings: ExportSettings,
    device: torch.device,
) -> dict[str, Any]:
    """What an exported file does on test images and on adversarial images found on the network.

    Returns:
        ``n`` images; ``largest_difference`` of logits, ``largest_logit`` and the number of predictions that
        differ (``other_class``), over clean and adversarial images; ``clean`` and ``robust`` accuracy of
        ``network`` and ``file``, with 95% Wilson intervals.
    """
    labels, data = bundle.test.labels, Resident(bundle.test, device)
    index = subset(labels, count_of(settings.size, len(labels)))
    comparison = _Comparison(copy.deepcopy(net), run, labels[index])
    evaluator = Evaluator(net.to(device), data, threat, batch_size=_BATCH, seed=settings.seed)
    for start in range(0, len(index), _BATCH):
        comparison.add(start, data.take(index[start : start + _BATCH].to(device)).image)
    clean = comparison.rates()
    for attack in _attacks(settings, threat, len(bundle.classes)):
        for start in range(0, len(index), _BATCH):
            _, adversarial, _, _ = evaluator.show(attack, index[start : start + _BATCH].to(device))
            comparison.add(start, adversarial)
    return {
        "n": len(index),
        "largest_difference": comparison.difference,
        "largest_logit": comparison.largest,
        "other_class": comparison.other,
        "clean": clean,
        "robust": comparison.rates(),
    }


def _attacks(settings: ExportSettings, threat: ThreatModel, k: int) -> list[Attack]:
    """The attacks one by one, also those of an ensemble."""
    made = [parse(name, k) for name in settings.attacks]
    attacks = [member for one in made for member in (one.members if isinstance(one, Ensemble) else (one,))]
    for attack in attacks:
        attack.check(threat)
    return attacks


def _refuse_difference(found: dict[str, Any], kind: str) -> None:
    """Refuse a file that does not compute what its network does."""
    scale = max(1.0, found["largest_logit"])
    if found["other_class"] or not found["largest_difference"] <= TOLERANCE * scale:
        given = (
            f"{kind} whose logits differ by up to {found['largest_difference']:.2g} from the network's, "
            f"with {found['other_class']} other classes"
        )
        raise SettingError("--format", given, f"logits within {TOLERANCE * scale:.1g}, and the same classes")


def summary(about: dict[str, Any]) -> str:
    """What was measured, in two lines."""
    n, rates = about["n"], {name: about[name] for name in ("clean", "robust")}
    cells = [
        f"{name} {100 * rate['network']['rate']:.1f}% -> {100 * rate['file']['rate']:.1f}%"
        for name, rate in rates.items()
    ]
    attacks = ", ".join(about["settings"]["attacks"])
    return (
        f"{about['file']}: {about['bytes']:,} bytes, logits within {about['largest_difference']:.2g}\n"
        f"network -> file on {n:,} test images: {', '.join(cells)} ({attacks}, found on the network)"
    )
