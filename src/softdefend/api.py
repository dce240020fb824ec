"""The short way from Python: any module, any tensors in [0, 1]."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.attacks import PGD, Attack
from softdefend.data import AugmentSettings, DataBundle, Resident, from_tensors, split
from softdefend.evaluation import Ensemble, Evaluation, Evaluator
from softdefend.evaluation.autoattack import parse
from softdefend.evaluation.physical import images_at_once
from softdefend.evaluation.searching import Precision
from softdefend.labels import BNMode, Hard, LabelRule
from softdefend.models import check_logits
from softdefend.objectives import PGDAT, Objective
from softdefend.report import RunRecord, read_run
from softdefend.rule import Rule
from softdefend.threat import Budget, ThreatModel
from softdefend.training import (
    OptimSettings,
    Recipe,
    RuntimeSettings,
    SaveSettings,
    Trainer,
    ValidateSettings,
)
from softdefend.training.engine import resolve_device
from softdefend.weights import Plain, WeightRule


def train(
    net: nn.Module,
    data: DataBundle | tuple[Tensor, Tensor],
    *,
    folder: Path | str,
    threat: ThreatModel | None = None,
    label: LabelRule | None = None,
    objective: Objective | None = None,
    weight: WeightRule | None = None,
    attack: PGD | None = None,
    attack_bn: BNMode = "eval",
    optim: OptimSettings | None = None,
    augment: AugmentSettings | None = None,
    validate: ValidateSettings | None = None,
    runtime: RuntimeSettings | None = None,
    save: SaveSettings | None = None,
    name: str = "run",
    seed: int = 0,
    progress: bool = True,
) -> RunRecord:
    """Train ``net`` in place, robustly; continue where ``folder`` holds an unfinished run.

    Afterwards ``net`` holds the last weights, and ``folder`` the best and last ones as safetensors.

    Args:
        net: images [b, c, h, w] float32 in [0, 1] to logits [b, k]; normalisation belongs inside
            (see :func:`softdefend.normalised`).
        data: a bundle, or images [n, c, h, w] (uint8, or float in [0, 1]) and integer labels [n], of which a
            tenth is held out for validation.
        folder: the run folder.
        threat: l-inf at 8/255 when None.
        label, objective, weight: the recipe; plain PGD adversarial training when None.
        attack: the attack inside training; PGD-10 with steps of a quarter of eps when None.
        others: see each class.

    Raises:
        SettingError: something that does not fit; the line says what.
        DivergenceError: the loss or a weight is no longer finite.
    """
    bundle = data if isinstance(data, DataBundle) else from_tensors(*data)
    settings: dict[str, Any] = {
        "threat": threat or ThreatModel(),
        "attack": attack or PGD(),
        "attack_bn": attack_bn,
        "label": label or Hard(),
        "objective": objective or PGDAT(),
        "weight": weight or Plain(),
        "optim": optim or OptimSettings(),
        "augment": augment or AugmentSettings(),
        "validate": validate or ValidateSettings(),
        "runtime": runtime or RuntimeSettings(),
        "save": save or SaveSettings(),
    }
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    check_logits(net, tuple(bundle.train.images.shape[1:]), len(bundle.classes), device)
    trainer = Trainer(
        net,
        bundle,
        Recipe(settings["threat"], settings["attack"], settings["label"], settings["objective"], attack_bn),
        folder,
        optim=settings["optim"],
        augment=settings["augment"],
        validate=settings["validate"],
        runtime=settings["runtime"],
        save=settings["save"],
        weight=settings["weight"],
        seed=seed,
        config={
            "name": name,
            "seed": seed,
            "data": {"source": bundle.name},
            **{k: plain(v) for k, v in settings.items()},
        },
        progress=progress,
    )
    try:
        trainer.fit()
    finally:
        trainer.folder.close()
    return read_run(Path(folder))


def evaluate(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel | None = None,
    attacks: Sequence[str | Attack | Ensemble] = ("pgd-20",),
    batch_size: int = 500,
    physical_batch: int | None = None,
    precision: Precision = "exact",
    compile: bool | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """Clean and robust accuracy of any module on any images, in eval mode and fp32.

    ``net`` is moved to the device; its mode and gradients are put back as they were.

    Args:
        net: images [b, c, h, w] float32 in [0, 1] to logits [b, k].
        images: [n, c, h, w], uint8 or float in [0, 1].
        labels: [n] integers in [0, k).
        threat: l-inf at 8/255 when None.
        attacks: attacks, or names of them (docs/attacks.md) such as ``autoattack``; all different.
        batch_size, precision, compile, seed: as :class:`softdefend.evaluation.Evaluator` has them.
        physical_batch: images computed at once; on a GPU found from its free memory when None.

    Raises:
        SettingError: images, labels or a network that do not fit.
    """
    checked = split(images, labels)
    chosen = resolve_device(device)
    net = net.to(chosen)
    shape, least = tuple(checked.images.shape[1:]), int(checked.labels.max()) + 1
    k = check_logits(net, shape, None, chosen, least=least)
    data = Resident(checked, chosen)
    if physical_batch is None and chosen.type == "cuda":
        physical_batch = images_at_once(net, data.take(data.labels.new_zeros(1)).image)
    evaluator = Evaluator(
        net,
        data,
        threat or ThreatModel(),
        batch_size=batch_size,
        seed=seed,
        physical_batch=physical_batch,
        precision=precision,
        compile=compile,
    )
    made = [parse(attack, k) if isinstance(attack, str) else attack for attack in attacks]
    return evaluator(made, progress=progress)


def plain(value: Any) -> Any:
    """Settings objects as plain values for a configuration file."""
    if isinstance(value, Budget):
        return str(value)
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    kind = type(value)
    # Constructor arguments only: a rule that has been set up holds more.
    arguments = {
        name: plain(held)
        for name in inspect.signature(kind).parameters
        if isinstance(held := vars(value).get(name), (str, int, float, bool, Rule))
    }
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}
