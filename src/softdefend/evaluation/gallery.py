"""The images that a network holds on to least and best, kept for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from softdefend.attacks import margin
from softdefend.core.files import write_atomic
from softdefend.data import Resident
from softdefend.evaluation.table import Table
from softdefend.execution.network_mode import frozen, tf32


def hardest_first(table: Table, clean_margin: NDArray[np.float32], eps: float) -> NDArray[np.int64]:
    """Positions of the samples that are right on the clean image, from the hardest to the easiest to keep.

    Hard is what few attacks leave right; among equals, what falls at a short distance (distances within a
    hundredth of ``eps`` are equal: most attacks use all they may); then what the network is least sure of.

    Args:
        table: of the evaluation, n samples.
        clean_margin: [n], how far the label's logit is above the best other one on the clean image.
        eps: of the threat.
    """
    distance = np.round(table.smallest_distance.astype(np.float64) / eps, 2)
    order = np.lexsort((clean_margin, distance, table.survived))
    return np.asarray(order[table.right[order]], dtype=np.int64)


def write_gallery(
    net: nn.Module,
    data: Resident,
    table: Table,
    path: Path,
    *,
    eps: float,
    count: int,
    classes: tuple[str, ...],
    batch_size: int = 500,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write the ``count`` hardest and ``count`` easiest images, fewer where fewer are classified correctly.

    The safetensors file holds, for m images in the order from hardest to easiest: ``image`` [m, c, h, w]
    float32 in [0, 1]; ``index``, ``label``, ``prediction`` (in the worst case), ``survived`` (attacks), all
    int64; ``distance`` (float32, infinite where no attack succeeded) and ``hard`` (uint8, 1 for the first
    half). Its metadata names the classes, the number of attacks and the ``count`` that was asked for, and
    holds ``about``: whose images these are.
    """
    n = len(table.label)
    with torch.no_grad(), frozen(net, "eval"), tf32(False):
        margins = [
            -margin(net(batch.image).float(), batch.label).cpu()
            for index in torch.split(torch.arange(n, device=data.labels.device), batch_size)
            for batch in [data.take(index)]
        ]
    order = hardest_first(table, torch.cat(margins).numpy(), eps)
    half = min(count, len(order) // 2)
    chosen = np.concatenate([order[:half], order[len(order) - half :]])
    tensors: dict[str, Tensor] = {
        "image": data.take(torch.from_numpy(chosen).to(data.labels.device)).image.cpu().contiguous(),
        "index": torch.from_numpy(chosen),
        "hard": (torch.arange(2 * half) < half).to(torch.uint8),
    }
    for name, column in (
        ("label", table.label),
        ("prediction", table.worst_prediction),
        ("survived", table.survived),
        ("distance", table.smallest_distance),
    ):
        tensors[name] = torch.from_numpy(column[chosen].copy())
    metadata = {"classes": json.dumps(classes), "attacks": str(len(table.attacks)), "asked": str(count)}
    write_atomic(path, to_safetensors(tensors, metadata={**(about or {}), **metadata}))
