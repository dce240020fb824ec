"""Robust in several threats at once: sample by sample, from a checkpoint's kept evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softdefend.core.errors import SettingError
from softdefend.core.store import ResultStore
from softdefend.core.threat import ThreatModel
from softdefend.evaluation.checkpoint import result_name
from softdefend.evaluation.records import Rate
from softdefend.evaluation.table import Table, read_table


@dataclass(frozen=True)
class KeptEvaluation:
    """What is kept of a checkpoint under one threat.

    Attributes:
        name: of its files, NAME.
        threat: that it was attacked under.
        result: ``evaluation/NAME.json``.
        table: ``evaluation/NAME.parquet``.
    """

    name: str
    threat: ThreatModel
    result: dict[str, Any]
    table: Table

    @property
    def robust(self) -> NDArray[np.bool_]:
        """Samples that every attack left right, [n]."""
        return _left(self.table)

    @property
    def title(self) -> str:
        """The threat in words: ``l2 128/255``."""
        return title_of(self.threat)


def title_of(threat: ThreatModel) -> str:
    """A threat in words: ``l2 128/255``."""
    return f"{threat.norm} {threat.eps}"


def kept_evaluations(
    folder: Path, which: str, trained: ThreatModel, result: Mapping[str, Any], *, skip: bool = False
) -> list[KeptEvaluation]:
    """Every evaluation of the same weights on the same data, the trained threat's first.

    Args:
        folder: ``evaluation/`` of the run.
        which: the checkpoint.
        trained: the threat of the training.
        result: ``NAME.json`` of one of them.
        skip: leave out one without its table.

    Raises:
        SettingError: one without its table.
    """
    store = ResultStore(folder)
    kept = []
    for path in sorted(folder.glob(f"{which}*.json"), key=lambda path: path.stem):
        known = store.read(path.stem)
        about = ("weights", "test_data", "which", "network")
        if known is None or any(known.get(name) != result.get(name) for name in about):
            continue
        threat = ThreatModel(known["norm"], known["eps"])
        if path.stem != result_name(which, trained, threat):  # an audit, or targets
            continue
        table = read_table(store.path(path.stem, ".parquet"))
        if table is not None and int(_left(table).sum()) == known["worst"]["count"]:
            kept.append(KeptEvaluation(path.stem, threat, known, table))
        elif not skip:
            given = "no table" if table is None else "a table of another evaluation"
            accepted = f"the one of {path.name}; without both it is evaluated anew"
            raise SettingError(str(store.path(path.stem, ".parquet")), given, accepted)
    return kept


def of_same_images(kept: Sequence[KeptEvaluation]) -> bool:
    """Whether evaluations are all of the same test images."""
    return all(_same_images(kept[0].table, one.table) for one in kept)


def robust_in_union(kept: Sequence[KeptEvaluation]) -> NDArray[np.bool_]:
    """Samples that every attack under every threat left right, [n].

    Raises:
        SettingError: fewer than two threats, or evaluations of other images.
    """
    check_images({one.title: one.table.index for one in kept})
    return np.asarray(np.logical_and.reduce([one.robust for one in kept]))


def rate_in_union(kept: Sequence[KeptEvaluation]) -> Rate:
    """The share of samples that :func:`robust_in_union` names, with its interval."""
    return Rate.of(torch.from_numpy(robust_in_union(kept)))


def check_images(index: Mapping[str, NDArray[np.int64]]) -> None:
    """Refuse threats that have no union.

    Args:
        index: positions in the data of the images under each threat, by its title.

    Raises:
        SettingError: fewer than two threats, or other images in one.
    """
    if len(index) < 2:
        accepted = "evaluations under two threats; first, for example, --norm l2 --eps 128/255"
        raise SettingError("--union", f"{', '.join(index)} alone", accepted)
    (first, images), *others = index.items()
    for title, other in others:
        if not np.array_equal(images, other):
            given = f"other images under {title} than under {first}"
            raise SettingError("--union", given, "evaluations of the same images (--size)")


def union_text(which: str, kept: Sequence[KeptEvaluation]) -> str:
    """A line for each threat, and one for their union.

    Args:
        which: the checkpoint.
        kept: its evaluations.

    Raises:
        SettingError: see :func:`robust_in_union`.
    """
    union = robust_in_union(kept)
    rows = {**{one.title: one.robust for one in kept}, "union": union}
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {Rate.of(torch.from_numpy(flags))}" for name, flags in rows.items()]
    return "\n".join([f"{which}: robust in each threat and in all, {len(union)} images:", *lines])


def _same_images(one: Table, other: Table) -> bool:
    return np.array_equal(one.index, other.index) and np.array_equal(one.label, other.label)


def _left(table: Table) -> NDArray[np.bool_]:
    robust = [columns.robust for columns in table.attacks.values()]
    return np.asarray(np.logical_and.reduce([table.right, *robust]))
