"""What extra training images ask of a run."""

from __future__ import annotations

import math

from softdefend.core.errors import SettingError
from softdefend.data import Augmented
from softdefend.training.config import Recipe
from softdefend.training.optim import OptimSettings


def steps_with_extra(data: Augmented, optim: OptimSettings) -> int:
    """Batches of an epoch: as many as without the extra images, all of one size. An epoch then sees only part
    of the original images, as in the code of Carmon et al. (arXiv 1905.13736) and those that follow it."""
    assert data.extra is not None
    own = optim.batch_size - data.extra.count(optim.batch_size)
    rounded = data.n // optim.batch_size if optim.drop_last else math.ceil(data.n / optim.batch_size)
    return min(rounded, data.n // own)


def check_extra(data: Augmented, recipe: Recipe, optim: OptimSettings) -> None:
    """Refuse extra images that no batch would have, and objectives that remember single images.

    Raises:
        SettingError: one of the two.
    """
    if data.extra is None:
        return
    if data.extra.count(optim.batch_size) == 0:
        given = f"{data.extra.fraction}, no image of a batch of {optim.batch_size}"
        raise SettingError("data.extra_fraction", given, "a larger share, or a larger optim.batch_size")
    if recipe.objective.remembers:
        given = f"extra images with {type(recipe.objective).__name__}"
        raise SettingError("data.extra", given, "an objective that remembers no predictions of single images")
