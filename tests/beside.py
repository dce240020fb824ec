"""Training beside other people's published code: the same images in the same order from the same weights.

``SOFTDEFEND_CHECKOUTS`` names a folder that holds checkouts by the name of their repository, such as ``SGLS``
of devicerxx/SGLS; tests whose checkout is not there are skipped.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softdefend.attacks import PGD
from softdefend.core.threat import ThreatModel
from softdefend.data import AugmentSettings, Batch, from_tensors
from softdefend.labels import LabelRule
from softdefend.models.resnet import BasicBlock
from softdefend.objectives import Objective
from softdefend.training import (
    OptimSettings,
    Recipe,
    RuntimeSettings,
    TrainConfig,
    Trainer,
    ValidateSettings,
)
from softdefend.weights import Plain, WeightRule

FOLDER = Path(os.environ.get("SOFTDEFEND_CHECKOUTS", ""))
EPOCHS, BATCH, K = 6, 12, 5
ATTACK = PGD(steps=5, step_size="2/255", start="none")
"""From the image itself: two programs draw different random numbers."""


def needs(repository: str) -> pytest.MarkDecorator:
    """Skips where the checkout is not there."""
    there = "SOFTDEFEND_CHECKOUTS" in os.environ and (FOLDER / repository).is_dir()
    return pytest.mark.skipif(not there, reason=f"SOFTDEFEND_CHECKOUTS holds no checkout {repository}")


def load(repository: str, path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of a checkout as a module, on a machine without a GPU; its siblings can be imported by it."""
    file = FOLDER / repository / path
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    spec = importlib.util.spec_from_file_location(f"theirs_{repository}_{file.stem}".replace("-", "_"), file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def excerpt(repository: str, path: str, chosen: Callable[[ast.Module], list[ast.stmt]]) -> CodeType:
    """Statements of a file of a checkout, to be run by ``exec`` with the names they use: for scripts, and for
    files that import what is not installed here."""
    file = FOLDER / repository / path
    statements = chosen(ast.parse(file.read_text()))
    return compile(ast.Module(statements, []), str(file), "exec")


def definitions(repository: str, path: str, *names: str, **given: Any) -> dict[str, Any]:
    """Functions and classes of a file of a checkout, by name, that see only ``given`` and one another."""

    def chosen(module: ast.Module) -> list[ast.stmt]:
        found = [node for node in module.body if getattr(node, "name", None) in names]
        assert len(found) == len(names)
        return found

    exec(excerpt(repository, path, chosen), given)
    return {name: given[name] for name in names}


def network() -> nn.Module:
    """Small, with batch normalization and a residual block; the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            BasicBlock(8, 16, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, K),
        )


def ours(
    folder: Path,
    label: LabelRule,
    objective: Objective,
    weight: WeightRule | None = None,
    *,
    attack: PGD = ATTACK,
    eps: str = "8/255",
    attack_bn: Any = "eval",
    epochs: int = EPOCHS,
) -> Trainer:
    """A finished run of ours: 36 random images, five classes, three steps an epoch, drops at 1/2 and 3/4."""
    torch.manual_seed(0)
    config = TrainConfig(
        recipe=Recipe(label, objective, weight or Plain(), ThreatModel("linf", eps), attack, attack_bn),
        optim=OptimSettings(epochs=epochs, batch_size=BATCH, lr=0.05, weight_decay=5e-4),
        augment=AugmentSettings("none"),
        validate=ValidateSettings(attack=PGD(steps=1)),
        runtime=RuntimeSettings(device="cpu", threads=1),
    )
    data = from_tensors(torch.rand(60, 3, 8, 8), torch.arange(60) % K, validation=12)
    trainer = Trainer(network(), data, config, folder, progress=False)
    trainer.fit()
    trainer.folder.close()
    return trainer


def sgd(net: nn.Module, trainer: Trainer) -> torch.optim.SGD:
    """The optimizer of the run, for their network."""
    optim = trainer.optim
    return torch.optim.SGD(net.parameters(), optim.lr, optim.momentum, weight_decay=optim.weight_decay)


def theirs(trainer: Trainer, optimizer: torch.optim.Optimizer, step: Callable[[Batch, int], None]) -> None:
    """Their loop over the run's batches.

    Args:
        trainer: a finished run.
        optimizer: whose learning rate follows the run's schedule.
        step: takes a batch and the epoch, counted from one, and makes one update.
    """
    for epoch in range(1, trainer.optim.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = trainer.optim.lr * trainer.optim.schedule.factor(
                epoch - 1, 0.0, trainer.optim.epochs
            )
        order = trainer.train_data.plan(seed=trainer.config.seed, epoch=epoch - 1, views=1, strong=False)
        for number in range(trainer.steps_per_epoch):
            step(trainer.train_data.batch(order[number * BATCH : (number + 1) * BATCH]), epoch)


def same(name: str, found: Tensor, expected: Tensor, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """One tensor of ours against theirs; an attack's sign turns rounding into pixels, hence the tolerance."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def assert_same_network(trainer: Trainer, net: nn.Module, **tolerance: float) -> None:
    """Weights, running statistics and how often these have moved."""
    for (name, found), expected in zip(
        trainer.net.state_dict().items(), net.state_dict().values(), strict=True
    ):
        same(name, found, expected, **tolerance)
