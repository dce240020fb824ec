"""Where an attack is to get: away from a class, or to one.

A goal is a tensor of class numbers [b]. As int64 they are labels: the network is fooled where it answers
anything else. As int32, which :func:`to_reach` makes, they are targets: it is fooled where it answers just
that. The type says which without a look at the device, and stays with the numbers through indexing and
captured steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_reach(target: Tensor) -> Tensor:
    """The goal to reach these classes, [b] int32."""
    return target.to(torch.int32)


def reaches(goal: Tensor) -> bool:
    """Whether the classes are to be reached; otherwise they are to be left."""
    return goal.dtype == torch.int32


def classes_of(goal: Tensor) -> Tensor:
    """The classes of a goal, [b] int64, whichever way it goes."""
    return goal.long()


def fooled(logits: Tensor, goal: Tensor) -> Tensor:
    """Where the network's answer is what the goal asks for, [b] bool.

    Args:
        logits: [b, k].
        goal: [b]; or labels as probabilities [b, k], of which the largest names the class.
    """
    answer = logits.argmax(dim=1)
    if goal.ndim == 2:
        goal = goal.argmax(dim=1)
    return answer == goal if reaches(goal) else answer != goal
