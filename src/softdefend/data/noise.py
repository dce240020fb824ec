"""Label noise: pure functions from labels to labels. The clean labels stay with the caller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softdefend.core.arrays import ArrayFile, open_arrays
from softdefend.core.errors import SettingError

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_CONFUSIONS = {
    "truck": "automobile",
    "bird": "airplane",
    "deer": "horse",
    "cat": "dog",
    "dog": "cat",
}
"""The usual asymmetric noise of CIFAR-10 (Patrini et al., CVPR 2017, arXiv:1609.03683, section 5)."""


def symmetric(labels: Tensor, classes: int, rate: float, generator: torch.Generator) -> Tensor:
    """Give exactly round(rate n) of the samples a uniformly random *other* class.

    The literature also uses another convention, a class uniform over *all* classes, which leaves one in
    ``classes`` of the chosen labels as it was: rate r there is rate r (classes - 1) / classes here.

    Args:
        labels: [n] int64 in 0..classes - 1.
        classes: number of classes, >= 2.
        rate: share of wrong labels, in [0, 1).
        generator: a CPU generator.

    Returns:
        [n] int64, a new tensor.
    """
    _check_rate(rate)
    chosen = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy


def asymmetric(labels: Tensor, classes: tuple[str, ...], rate: float, generator: torch.Generator) -> Tensor:
    """Confuse CIFAR-10's look-alike classes (:data:`CIFAR10_CONFUSIONS`).

    In each of the five classes, exactly round(rate n_class) samples get the confused label; the others keep
    theirs. Averaged over CIFAR-10's ten balanced classes, half of ``rate`` of the labels are wrong.

    Args:
        labels: [n] int64.
        classes: class names, CIFAR-10's ten in any order and case.
        rate: share of wrong labels in the confused classes, in [0, 1).
        generator: a CPU generator.

    Returns:
        [n] int64, a new tensor.

    Raises:
        SettingError: other classes than CIFAR-10's.
    """
    _check_rate(rate)
    position = {name.lower(): i for i, name in enumerate(classes)}
    if len(classes) != len(CIFAR10_CLASSES) or set(position) != set(CIFAR10_CLASSES):
        raise SettingError(
            "data.noise",
            f"asymmetric with classes {_few(classes)}",
            f"asymmetric noise only with CIFAR-10's classes ({', '.join(CIFAR10_CLASSES)})",
        )
    noisy = labels.clone()
    for source, confused in CIFAR10_CONFUSIONS.items():
        members = (labels == position[source]).nonzero().flatten()
        chosen = torch.randperm(len(members), generator=generator)[: round(rate * len(members))]
        noisy[members[chosen]] = position[confused]
    return noisy


def from_file(path: str, key: str | None, clean: Tensor, classes: int, first_label: int = 0) -> Tensor:
    """Read labels from an array of an .npz file, such as ``worse_label`` of CIFAR-10N.

    CIFAR-10N is of Wei et al., ICLR 2022, arXiv:2110.12088.

    Args:
        path: the file. Arrays of Python objects are refused (``allow_pickle=False``).
        key: name of the array; may be None if the file holds only one.
        clean: [n] int64, the source's own labels, in the same order. If the file has a ``clean_label`` array
            it must equal them: that is how a file in another order is found out.
        classes: number of classes.
        first_label: what the file has for class 0.

    Returns:
        [n] int64.

    Raises:
        SettingError: a missing or unreadable file, an unknown key, labels of another length, type or range.
    """
    try:
        with open_arrays(Path(path)) as file:
            if key is None and len(file.names) == 1:
                key = file.names[0]
            if key not in file.names:
                raise SettingError("data.noise_key", key, f"one of {', '.join(file.names)}")
            noisy = _labels(path, file, key, len(clean), classes, first_label)
            own = clean
            if "clean_label" in file.names:
                own = _labels(path, file, "clean_label", len(clean), classes, first_label)
    except SettingError:
        raise
    except FileNotFoundError:
        raise SettingError("data.noise_file", path, "an existing .npz file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SettingError(
            "data.noise_file", f"{path} ({reason})", "an .npz file of plain integer arrays"
        ) from None
    wrong = int((own != clean).sum())
    if wrong:
        raise SettingError(
            "data.noise_file",
            f"{path}, whose clean_label differs from the source's for {wrong} of {len(clean)} images",
            "a file in the source's order",
        )
    return noisy


def _labels(path: str, file: ArrayFile, key: str, n: int, classes: int, first: int) -> Tensor:
    dtype, shape = file.header(key)
    if dtype.hasobject:
        raise ValueError("Python objects")
    if dtype.kind not in "iu" or shape != (n,):
        given = f"{dtype} {list(shape)} in {path}"
        raise SettingError("data.noise_file", given, f"one integer label for each of the {n} training images")
    array = file.read(key)
    outside = (array < first) | (array >= first + classes)
    if outside.any():
        row = int(outside.argmax())
        raise SettingError(
            "data.noise_file",
            f"label {array[row]} at row {row} of {path}",
            f"labels in {first}..{first + classes - 1}",
        )
    return torch.from_numpy(array.astype(np.int64)) - first


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise SettingError("data.noise_rate", rate, "a value in [0, 1)")


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
