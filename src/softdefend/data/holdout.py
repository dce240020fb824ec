"""Draws of part of a data set by class.

They make the validation split, the test split of sources that have none, and small training sets.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_by_class(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` positions without replacement, each class in proportion to its size.

    Shares are rounded by largest remainders, so the counts add up to ``count`` exactly and no class is more
    than one sample away from its share. Which of equal remainders is rounded up is drawn, so that of many
    small classes all are as likely to be among the draw.

    Args:
        labels: [n] int64.
        count: 0..n.
        generator: a CPU generator.

    Returns:
        [count] int64 positions, ascending.
    """
    sizes = torch.bincount(labels)
    # Integers, not floats: shares and remainders must be the same on every machine.
    quota, remainder = sizes * count // len(labels), sizes * count % len(labels)
    left = count - int(quota.sum())
    order = torch.randperm(len(labels), generator=generator)
    lot = torch.randperm(len(sizes), generator=generator)  # decides among equal remainders only
    quota[(remainder * len(sizes) - lot).argsort(descending=True)[:left]] += 1
    by_class = order[labels[order].argsort(stable=True)]
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    return by_class[rank < quota[labels[by_class]]].sort().values


def complement(index: Tensor, n: int) -> Tensor:
    """The positions of 0..n - 1 that are not in ``index``, ascending."""
    rest = torch.ones(n, dtype=torch.bool)
    rest[index] = False
    return rest.nonzero().flatten()
