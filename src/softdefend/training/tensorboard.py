"""Metrics as TensorBoard events, for who asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_scalars(folder: Path, row: Mapping[str, Any]) -> None:
    """Add the numbers of an epoch's row to the events in a folder."""
    from torch.utils.tensorboard import SummaryWriter  # needs an optional package

    # purge_step takes back what an earlier, killed process wrote beyond its last checkpoint.
    with SummaryWriter(str(folder), purge_step=row["epoch"]) as writer:
        for name, value in row.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, row["epoch"])
