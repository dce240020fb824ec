"""Robust in several threats at once: sample by sample, from a checkpoint's kept evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softdefend.core.errors import SettingError
from softdefend.core.store import ResultStore
from softdefend.core.threat import ThreatModel
from softdefend.evaluation.checkpoint import CheckpointSource
from softdefend.evaluation.records import Rate
from softdefend.evaluation.table import Table, read_table


def union_text(source: CheckpointSource, result: Mapping[str, Any]) -> str:
    """A line for each threat that has a kept evaluation of this checkpoint, and one for their union.

    Args:
        source: the checkpoint.
        result: ``evaluation/NAME.json`` of one of them.

    Raises:
        SettingError: there is no other one, or one is of other images or without its table.
    """
    tables = _kept_tables(source, result)
    if len(tables) < 2:
        accepted = "evaluations under two threats; first, for example, --norm l2 --eps 128/255"
        raise SettingError("--union", f"{', '.join(tables)} alone", accepted)
    first = next(iter(tables.values()))
    for threat, table in tables.items():
        if not (np.array_equal(first.index, table.index) and np.array_equal(first.label, table.label)):
            given = f"other images under {threat} than under {next(iter(tables))}"
            raise SettingError("--union", given, "evaluations of the same images (--size)")
    robust = {threat: _left(table) for threat, table in tables.items()}
    rows = {**robust, "union": np.logical_and.reduce(list(robust.values()))}
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {Rate.of(torch.from_numpy(flags))}" for name, flags in rows.items()]
    return "\n".join(
        [f"{source.which}: robust in each threat and in all, {len(first.label)} images:", *lines]
    )


def _kept_tables(source: CheckpointSource, result: Mapping[str, Any]) -> dict[str, Table]:
    """Tables by threat, of the evaluations of the same weights on the same data."""
    store = ResultStore(source.folder / "evaluation")
    tables = {}
    for path in sorted(store.folder.glob(f"{source.which}*.json"), key=lambda path: path.stem):
        known = store.read(path.stem)
        about = ("weights", "test_data", "which")
        if known is None or any(known.get(name) != result.get(name) for name in about):
            continue
        threat = ThreatModel(known["norm"], known["eps"])
        if path.stem == source.under(threat).name:  # no audit, no targets
            tables[f"{threat.norm} {threat.eps}"] = _table(store, path.stem, known)
    return tables


def _table(store: ResultStore, name: str, known: Mapping[str, Any]) -> Table:
    path = store.path(name, ".parquet")
    table = read_table(path)
    if table is None or int(_left(table).sum()) != known["worst"]["count"]:
        given = "no table" if table is None else "a table of another evaluation"
        raise SettingError(str(path), given, f"the one of {name}.json; without both it is evaluated anew")
    return table


def _left(table: Table) -> NDArray[np.bool_]:
    """Samples that every attack left right, [n]."""
    robust = [columns.robust for columns in table.attacks.values()]
    return np.asarray(np.logical_and.reduce([table.right, *robust]))
