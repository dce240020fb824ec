"""Constants and helpers that several folders of tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softdefend.core.rule import RunInfo
from softdefend.data import Batch
from softdefend.labels import Supervision

K = 4
"""Classes of the small data set in conftest.py."""


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would be too slow."""


def about(net: nn.Module, labels: Tensor | None = None, epochs: int = 10) -> RunInfo:
    """A run of ``net`` on samples of K classes in turn, unless labels are given."""
    return RunInfo(torch.arange(20) % K if labels is None else labels, K, epochs, net)


def believed(target: Tensor, label: Tensor | None = None) -> Supervision:
    """The supervision of a rule that returns ``target`` [b, k] and nothing else."""
    return Supervision(target.argmax(1) if label is None else label, target)


def batch_of(image: Tensor, label: Tensor | None = None) -> Batch:
    """The first samples of the training set."""
    index = torch.arange(len(image))
    return Batch(index, image, index % K if label is None else label)


def tiny_net(classes: int = K, seed: int = 0) -> nn.Module:
    """A small network with BatchNorm and dropout for greyscale images of 6x6 to 8x8 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(32, classes),
        )
