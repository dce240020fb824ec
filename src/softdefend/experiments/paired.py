"""Two recipes on the same test images: McNemar's test, and the verdicts it needs, as a row keeps them."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softdefend.core.digest import checksum
from softdefend.core.errors import SettingError
from softdefend.evaluation.table import Table


@dataclass(frozen=True)
class Difference:
    """How the second of two networks does on the images of the first.

    Attributes:
        n: images.
        first, second: shares that each gets right, in [0, 1].
        lost, won: images that only the first gets right, and only the second.
        p: of McNemar's exact test (Psychometrika 12, 1947): the two-sided binomial probability of so uneven a
            split of the images on which the two disagree, if both were equally good.
    """

    n: int
    first: float
    second: float
    lost: int
    won: int
    p: float

    @property
    def value(self) -> float:
        """Share of the second less that of the first."""
        return self.second - self.first

    @property
    def error(self) -> float:
        """Standard error of the difference over draws of test images; training's own chance is not in it."""
        return math.sqrt(max(self.lost + self.won - (self.won - self.lost) ** 2 / self.n, 0.0)) / self.n


def difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Difference:
    """Compare verdicts [n] on the same images.

    Raises:
        SettingError: of different numbers of images.
    """
    from scipy.stats import binomtest  # takes a second to import: only where it is used

    if first.shape != second.shape or not len(first):
        raise SettingError("verdicts", f"{len(first)} and {len(second)}", "those of the same images")
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    p = float(binomtest(won, lost + won).pvalue) if lost + won else 1.0
    return Difference(len(first), float(first.mean()), float(second.mean()), lost, won, p)


def verdicts(table: Table, right: Mapping[str, NDArray[np.bool_]] | None = None) -> dict[str, Any]:
    """What a row keeps of an evaluation: whether each image was right, as bits in base64.

    Args:
        table: of the evaluation.
        right: verdicts [n] by measure; clean and under each attack of the table if None.
    """
    parts = {"index": table.index, "label": table.label}
    images = checksum((name, torch.tensor(values)) for name, values in parts.items())
    if right is None:
        right = {"clean": table.right, **{name: columns.robust for name, columns in table.attacks.items()}}
    packed = {name: _pack(flags) for name, flags in right.items()}
    return {"n": len(table.label), "images": images, "right": packed}


def compare(first: Mapping[str, Any], second: Mapping[str, Any], measure: str) -> Difference | None:
    """Compare what two rows keep, for ``clean`` or an attack; None where they have no verdicts on the same
    images."""
    if any(not kept or measure not in kept["right"] for kept in (first, second)):
        return None
    if first["images"] != second["images"]:
        return None
    return difference(*(_unpack(kept["right"][measure], kept["n"]) for kept in (first, second)))


def _pack(flags: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(flags).tobytes()).decode()


def _unpack(text: str, n: int) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n).astype(bool)
