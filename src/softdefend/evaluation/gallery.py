"""The images that a network holds on to least and best, kept for the report."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from softdefend.attacks import margin
from softdefend.data import Resident
from softdefend.evaluation.table import Table
from softdefend.execution.network_mode import frozen, tf32


def hardest_first(table: Table, clean_margin: NDArray[np.float32], eps: float) -> NDArray[np.int64]:
    """Rows of the samples that are right on the clean image, from the hardest to the easiest to keep.

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


def choose_gallery(
    net: nn.Module, data: Resident, table: Table, *, eps: float, count: int, batch_size: int = 500
) -> dict[str, Tensor]:
    """The ``count`` hardest and ``count`` easiest images, fewer where fewer are classified correctly.

    Returns:
        For m images in the order from hardest to easiest: ``image`` [m, c, h, w] float32 in [0, 1];
        ``index``, ``label``, ``prediction`` (in the worst case), ``survived`` (attacks), all int64;
        ``distance`` (float32, infinite where no attack succeeded) and ``hard`` (uint8, 1 for the first half).
    """
    index = torch.from_numpy(table.index.copy())
    order = hardest_first(table, _clean_margins(net, data, index, batch_size), eps)
    half = min(count, len(order) // 2)
    chosen = np.concatenate([order[:half], order[len(order) - half :]])
    tensors = {
        "image": data.take(index[chosen].to(data.labels.device)).image.cpu(),
        "index": index[chosen],
        "hard": (torch.arange(2 * half) < half).to(torch.uint8),
    }
    for name, column in (
        ("label", table.label),
        ("prediction", table.worst_prediction),
        ("survived", table.survived),
        ("distance", table.smallest_distance),
    ):
        tensors[name] = torch.from_numpy(column[chosen].copy())
    return tensors


@torch.no_grad()
def _clean_margins(net: nn.Module, data: Resident, index: Tensor, batch_size: int) -> NDArray[np.float32]:
    """How far the label's logit is above the best other one, of the samples at ``index`` [n]."""
    with frozen(net, "eval"), tf32(False):
        margins = [
            -margin(net(batch.image).float(), batch.label).cpu()
            for part in torch.split(index.to(data.labels.device), batch_size)
            for batch in [data.take(part)]
        ]
    return np.asarray(torch.cat(margins).numpy())
