"""A checkpoint of a tiny network, in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from softdefend.core.threat import Budget, ThreatModel
from softdefend.core.weight_files import save_weights
from softdefend.data import DataBundle
from softdefend.evaluation import CheckpointSource, EvaluateSettings
from softdefend.evaluation.checkpoint import Checkpoint
from tiny import tiny_net

THREAT = ThreatModel("linf", Budget("0.1"))
CPU = torch.device("cpu")
QUICK = EvaluateSettings(("fgsm", "pgd-3"), curve_size=0, examples=2, batch_size=10)


def make_source(folder: Path, bundle: DataBundle, *, seed: int = 0, **changes: Any) -> CheckpointSource:
    """Weights of a tiny network in ``folder``, and another network to take them.

    The outputs are spread far apart: a network that always gives one class could not be attacked.
    """
    which = changes.get("which", "last")
    net = tiny_net(len(bundle.classes), seed=seed)
    with torch.no_grad():
        net[-1].weight.mul_(10)
        net[-1].bias.zero_()
    save_weights(net, folder / f"{which}.safetensors", {"epoch": 3})
    known: dict[str, Any] = {"which": which, "trained": THREAT, "threat": THREAT, "architecture": "tiny"}
    return CheckpointSource(tiny_net(len(bundle.classes), seed=7), bundle, folder, **{**known, **changes})


def make_checkpoint(folder: Path, bundle: DataBundle, **changes: Any) -> Checkpoint:
    """On the CPU, from :func:`make_source`."""
    return Checkpoint(make_source(folder, bundle, **changes), CPU)
