"""Parts of a data set to measure on: an order of the images of which every beginning stands for the whole."""

from __future__ import annotations

import heapq
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream

SubsetOrder = Literal["stratified", "first"]
"""Which images a part of a data set holds: of every class its share, or the first of the data."""


def subset_order(labels: Tensor, how: SubsetOrder = "stratified", seed: int = 0) -> Tensor:
    """The positions of all images, in the order in which parts of a data set take them.

    The first n are the part of n images, so a smaller part lies in a larger one. Labels and seed alone
    decide, so the part is the same for every network.

    ``stratified``: among the first n, for every n, each class is less than one image away from its share
    n m / N, where it has m of the N images. ``seed`` draws which of its images come first, and which class
    where several may. ``first``: the order of the data, the convention of RobustBench and AutoAttack; in data
    that are sorted by class these are images of few classes.

    Args:
        labels: [N] integers.
        how: ``stratified`` or ``first``.
        seed: of the stratified order.

    Returns:
        [N] int64, a permutation of the positions.

    Raises:
        SettingError: an unknown ``how``.
    """
    if how not in get_args(SubsetOrder):
        raise SettingError("subset", how, " or ".join(get_args(SubsetOrder)))
    total = len(labels)
    if how == "first" or not total:
        return torch.arange(total)
    drawn = torch.randperm(total, generator=stream(seed, "subset-order"))
    _, class_at, counts = np.unique(labels.cpu()[drawn].numpy(), return_inverse=True, return_counts=True)
    sizes = torch.from_numpy(counts)
    rank = torch.from_numpy(class_at).argsort(stable=True)  # by class, and within each as drawn
    size = sizes.repeat_interleave(sizes)
    nth = torch.arange(total) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    # The count of a class is less than one away from its share as long as its n-th image stands neither
    # before the first place nor after the last. An order that keeps to all of them exists (Tijdeman, Discrete
    # Mathematics 32, 1980), and to take the one whose last place is nearest finds it.
    first, last = nth * total // size, ((nth + 1) * total - 1) // size
    by_first = first.argsort(stable=True)
    coming = zip(first[by_first].tolist(), (last * total + rank)[by_first].tolist(), strict=True)
    ready: list[int] = []
    order = []
    following = next(coming, None)
    for place in range(total):
        while following is not None and following[0] <= place:
            heapq.heappush(ready, following[1])
            following = next(coming, None)
        order.append(heapq.heappop(ready) % total)
    return drawn[torch.tensor(order)]


def subset(labels: Tensor, size: int | None, how: SubsetOrder = "stratified", seed: int = 0) -> Tensor:
    """The positions of the first ``size`` images of :func:`subset_order`.

    Args:
        labels: [N] integers.
        size: how many; None, or as many as there are: all of them, in the order of the data.
        how, seed: as for :func:`subset_order`.

    Returns:
        [min(size, N)] int64.
    """
    if size is None or size >= len(labels):
        size, how = len(labels), "first"
    return subset_order(labels, how, seed)[:size]


def describe_subset(labels: Tensor, positions: Tensor, how: SubsetOrder = "stratified") -> str:
    """Describe a part of a data set: how many images and classes of how many it holds, in one line.

    >>> describe_subset(torch.arange(4).repeat_interleave(50), torch.arange(60), "first")
    'the first 60 of 200 images, which are of 2 of the 4 classes'
    """
    labels = labels.cpu()
    classes, held = (len(set(part.tolist())) for part in (labels, labels[positions.cpu()]))
    if len(positions) == len(labels):
        return f"all {len(labels)} images, of {classes} classes"
    which = "the first" if how == "first" else "a stratified"
    return f"{which} {len(positions)} of {len(labels)} images, which are of {held} of the {classes} classes"
