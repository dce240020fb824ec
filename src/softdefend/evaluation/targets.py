"""The class that each image is to be taken for, where an evaluation is targeted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softdefend.core import rng
from softdefend.core.errors import SettingError
from softdefend.execution.randomness import hashed

RULES = ("next", "random", "least-likely")


def check_targeted(targeted: str, k: int | None = None) -> None:
    """Refuse what names no target.

    Args:
        targeted: one of :data:`RULES`, or a class number.
        k: classes, where known.

    Raises:
        SettingError: neither, or a class that there is not.
    """
    if targeted in RULES:
        return
    if not targeted.isdecimal() or len(targeted) > 9 or (k is not None and int(targeted) >= k):
        numbers = "a class number" if k is None else f"a class number from 0 to {k - 1}"
        raise SettingError("evaluate.targeted", repr(targeted), f"{', '.join(RULES)} or {numbers}")


def choose_targets(targeted: str, label: Tensor, logits: Tensor, index: Tensor, seed: int) -> Tensor:
    """The target of each image, [n] int64; its label only where a class is asked for that it has.

    Args:
        targeted: ``next`` is the class after the label, the first after the last. ``random`` draws from the
            other classes, for each image by its position in the data. ``least-likely`` has the smallest clean
            logit but for the label. Or a class number.
        label: [n] int64.
        logits: clean, [n, k], k >= 2.
        index: positions in the data, [n] int64.
        seed: of the draws.

    Raises:
        SettingError: see :func:`check_targeted`.
    """
    k = logits.shape[1]
    check_targeted(targeted, k)
    if targeted == "next":
        return (label + 1) % k
    if targeted == "random":
        drawn = hashed(rng.key(seed, "evaluate/target"), index, 1).flatten()
        other = (drawn * (k - 1)).long().clamp_max(k - 2)
        return other + (other >= label)
    if targeted == "least-likely":
        return logits.scatter(1, label[:, None], math.inf).argmin(dim=1)
    return torch.full_like(label, int(targeted))
