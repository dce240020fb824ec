"""How people labelled the images of a run: files of votes, matched to its training and test images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softdefend.analysis.runs import AnalyzedRun, source_positions
from softdefend.core.arrays import open_arrays
from softdefend.core.errors import SettingError


@dataclass(frozen=True, eq=False)
class HumanLabels:
    """Distributions of human labels, rows [n, k] summing to one, in the order of the run's own images.

    Attributes:
        train: for the training images, or None.
        test: for the test images, or None.
    """

    train: Tensor | None = None
    test: Tensor | None = None


def read_human_labels(
    run: AnalyzedRun, train: str | None, train_keys: tuple[str, ...], test: str | None
) -> HumanLabels:
    """Read human labels and put them in the order of the run's images.

    Args:
        train: .npz with one array of labels [n] for each annotator, in the order of the data source, as
            CIFAR-10N has it.
        train_keys: these arrays.
        test: .npz with ``counts`` [n, k], how many people chose each class of each test image, as CIFAR-10H
            has it.

    Raises:
        SettingError: a file that cannot be read or does not fit.
    """
    votes = None
    if train is not None:
        at = source_positions(run)
        arrays = _arrays("--train_votes", train, train_keys)
        labels = [_votes(train, name, array, int(at.max()) + 1, run.k) for name, array in arrays.items()]
        votes = distribution([one[at] for one in labels], run.k)
    counts = None
    if test is not None:
        array = _arrays("--test_votes", test, ("counts",))["counts"]
        wanted = (len(run.bundle.test), run.k)
        if array.shape != wanted or array.dtype.kind not in "iu" or (array.sum(axis=1) < 1).any():
            given = f"counts {array.dtype} {list(array.shape)} in {test}"
            raise SettingError("--test_votes", given, f"whole numbers {list(wanted)}, a vote in each row")
        whole = torch.from_numpy(array.astype(np.int64))
        counts = whole.double() / whole.sum(dim=1, keepdim=True)
    return HumanLabels(votes, counts)


def distribution(labels: list[Tensor], k: int) -> Tensor:
    """The share of annotators that chose each class, [n, k], from the labels [n] of each of them."""
    return torch.stack([nn.functional.one_hot(one, k).double() for one in labels]).mean(dim=0)


def check_exists(flag: str, path: str | None) -> None:
    """Refuse a file of human labels that is named and not there.

    Raises:
        SettingError: it names the flag.
    """
    if path is not None and not os.path.isfile(path):
        raise SettingError(flag, path, "an existing .npz file")


def _arrays(flag: str, path: str, keys: tuple[str, ...]) -> dict[str, np.ndarray[Any, Any]]:
    check_exists(flag, path)
    try:
        with open_arrays(Path(path)) as file:
            missing = [key for key in keys if key not in file.names]
            if missing or not keys:
                raise SettingError(
                    flag, f"{path} without {', '.join(missing)}", f"arrays {', '.join(file.names)}"
                )
            return {key: file.read(key) for key in keys}
    except SettingError:
        raise
    except (OSError, ValueError) as error:
        raise SettingError(flag, f"{path} ({error})", "an .npz file of plain integer arrays") from None


def _votes(path: str, name: str, array: np.ndarray[Any, Any], least: int, k: int) -> Tensor:
    fits = array.dtype.kind in "iu" and array.ndim == 1 and len(array) >= least
    if not fits or array.min() < 0 or array.max() >= k:
        given = f"{name} {array.dtype} {list(array.shape)} in {path}"
        raise SettingError("--train_votes", given, f"one label in 0..{k - 1} for each image of the source")
    return torch.from_numpy(array.astype(np.int64))
