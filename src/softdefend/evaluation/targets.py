"""The class that each image is to be taken for, where an evaluation is targeted."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from softdefend.core import rng
from softdefend.core.errors import SettingError, did_you_mean
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


def check_target_or_name(targeted: str) -> None:
    """Refuse what names no target and cannot be the name of a class.

    Raises:
        SettingError: nothing, or a number that is none of a class.
    """
    if not targeted or re.fullmatch(r"[-+.\d]+", targeted):
        check_targeted(targeted)


def by_number(targeted: str, classes: Sequence[str]) -> str:
    """The same target, a class by its number where it is given by its name.

    Args:
        targeted: a rule, a class number or a class name; what can be read as a rule or a number is one.
        classes: names, in the order of the logits.

    Raises:
        SettingError: none of these.
    """
    if targeted in RULES:
        return targeted
    if targeted.isdecimal():
        return str(int(targeted))  # 3 and 03 are one class, whose result has one name
    if targeted in classes:
        return str(list(classes).index(targeted))
    names = f"{', '.join(RULES)}, a class number or a class name, such as {classes[0]}"
    names += did_you_mean(targeted, [*RULES, *classes])
    raise SettingError("evaluate.targeted", repr(targeted), names)


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
