"""What has to hold before several processes train one run together."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch

from softdefend.core.errors import SettingError
from softdefend.core.identity import RunIdentity
from softdefend.core.processes import Processes
from softdefend.data import Augmented
from softdefend.training.config import Recipe
from softdefend.training.optim import OptimSettings

_PACKAGE = Path(__file__).parent.parent


def check_shares(data: Augmented, recipe: Recipe, optim: OptimSettings, processes: Processes) -> None:
    """Refuse batches that cannot be shared evenly.

    Args:
        data: the training images.
        recipe: what is trained on them.
        optim: says in which batches.
        processes: who share them.

    Raises:
        SettingError: a batch, or the last one of an epoch, whose size is no multiple of the processes.
    """
    size, left = processes.size, 0 if data.has_extra else data.n % optim.batch_size
    if size > 1 and data.has_extra and recipe.label.remembers:
        given = f"extra images with {type(recipe.label).__name__} on {size} processes"
        raise SettingError("data.extra", given, "one process, or a label rule without a memory")
    if _uneven(optim.batch_size, optim, size):
        accepted = f"a multiple of {size}, so that each of {size} processes has as many images"
        given = f"{optim.batch_size} on {size} processes"
        if optim.accumulate > 1:
            given, accepted = f"{given}, in {optim.accumulate} parts", f"parts of {accepted}"
        raise SettingError("optim.batch_size", given, accepted)
    if not optim.drop_last and _uneven(left, optim, size):
        given = f"false with a last batch of {left} images on {size} processes"
        raise SettingError("optim.drop_last", given, "true, or another optim.batch_size")


def _uneven(batch: int, optim: OptimSettings, size: int) -> bool:
    """Whether some part of a batch cannot be shared evenly."""
    parts = torch.empty(batch).tensor_split(optim.parts(batch)) if batch else ()
    return any(len(part) % size for part in parts)


def check_agreement(processes: Processes, run: RunIdentity) -> None:
    """Check that all processes train the same run.

    Raises:
        SettingError: in all of them, where one has other code, versions, settings or data.
    """
    if processes.size == 1:
        return
    processes.agree("processes", f"torch {torch.__version__}", "the same torch everywhere")
    processes.agree("processes", f"code {_code()[:12]}", "the same code everywhere")
    processes.agree("processes", f"settings {run.settings[:12]}", "the same settings everywhere")
    processes.agree("data", f"data {run.data[:12]}", "the same data everywhere")


@cache
def _code() -> str:
    """Digest of this package's files."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
