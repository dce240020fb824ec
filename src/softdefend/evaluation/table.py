"""Tables with a row for each sample: write them; read that of an evaluation and count in it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softdefend.core.errors import SettingError


def parquet_bytes(columns: Mapping[str, Any]) -> bytes:
    """A table as a Parquet file, from its columns by name."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class AttackColumns:
    """What one attack did to each of n samples.

    Attributes:
        prediction: class of the adversarial image.
        distance: from the clean image, in the threat's norm.
        robust: right on the clean image and on the adversarial one.
        fooled: by member where the attack is an ensemble: whether this member fooled the network.
        forwards: of each sample; None where they are not known of all samples.
    """

    prediction: NDArray[np.int64]
    distance: NDArray[np.float32]
    robust: NDArray[np.bool_]
    fooled: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    forwards: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Table:
    """An evaluation sample by sample; attacks in the order in which they ran."""

    index: NDArray[np.int64]
    """Positions of the samples in the data."""
    label: NDArray[np.int64]
    clean_prediction: NDArray[np.int64]
    attacks: dict[str, AttackColumns]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Right on the clean image, [n]."""
        return np.asarray(self.clean_prediction == self.label)

    def of_attacks(self, names: Sequence[str]) -> Table:
        """The same with these attacks alone."""
        return replace(self, attacks={name: self.attacks[name] for name in names})

    def after_each(self, names: Sequence[str] | None = None) -> list[tuple[str, int]]:
        """How many samples are still right after the clean pass and after each attack, one upon the other;
        an ensemble counts as its members.

        Args:
            names: only these attacks.
        """
        left = self.right
        counts = [("clean", int(left.sum()))]
        for name in self.attacks if names is None else names:
            columns = self.attacks[name]
            for member, robust in _steps(name, columns):
                left = left & robust
                counts.append((member, int(left.sum())))
        return counts

    @property
    def worst_prediction(self) -> NDArray[np.int64]:
        """The predicted class in the worst case, [n]: the wrong class of the clean image, else that of the
        first attack that succeeded, else the label."""
        prediction = self.clean_prediction.copy()
        for columns in self.attacks.values():
            right = prediction == self.label
            prediction = np.where(right & ~columns.robust, columns.prediction, prediction)
        return prediction

    @property
    def survived(self) -> NDArray[np.int64]:
        """How many attacks each sample withstood, [n]; an ensemble is one attack."""
        zero = np.zeros(len(self.label), np.int64)
        return np.asarray(sum((c.robust.astype(np.int64) for c in self.attacks.values()), zero))

    @property
    def smallest_distance(self) -> NDArray[np.float32]:
        """The shortest way on which some attack succeeded, [n]; infinite where none did."""
        shortest = np.full(len(self.label), np.inf, np.float32)
        for columns in self.attacks.values():
            shortest = np.where(columns.robust, shortest, np.minimum(shortest, columns.distance))
        return shortest


def _steps(name: str, columns: AttackColumns) -> list[tuple[str, NDArray[np.bool_]]]:
    if not columns.fooled:
        return [(name, columns.robust)]
    return [(member, ~fooled) for member, fooled in columns.fooled.items()]


def read_table(path: Path) -> Table | None:
    """The table of an evaluation; None where there is no such file.

    Raises:
        SettingError: a damaged or foreign file.
    """
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:  # pyarrow takes names in UTF-8 only
            content = pq.read_table(file)
        column = {name: _filled(content.column(name)) for name in content.column_names}
        counted = {name for name in content.column_names if not content.column(name).null_count}
        names = [name.removesuffix("/robust") for name in column if name.endswith("/robust")]
        attacks = {}
        for name in names:
            members = [key for key in column if key.startswith(f"{name}/") and key.endswith("/fooled")]
            attacks[name] = AttackColumns(
                prediction=column[f"{name}/prediction"],
                distance=column[f"{name}/distance"],
                robust=column[f"{name}/robust"],
                fooled={key.split("/")[1]: column[key] for key in members},
                forwards=column[f"{name}/forwards"] if f"{name}/forwards" in counted else None,
            )
        return Table(column["index"], column["label"], column["clean_prediction"], attacks)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise SettingError(str(path), "an unreadable table", "the file as the evaluation wrote it") from error


def _filled(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column as an array; null (a sample that a member was not given) is False or 0."""
    nothing = False if pa.types.is_boolean(column.type) else 0
    return np.asarray(column.fill_null(nothing).to_numpy())


def after_each(result: Mapping[str, Any], table: Table | None) -> list[tuple[str, int, float]]:
    """(attack, samples still right, its seconds), clean first, one attack upon the other.

    An ensemble appears as its members.

    Args:
        result: ``evaluation/NAME.json``.
        table: ``evaluation/NAME.parquet``; needed where there are several attacks.

    Raises:
        SettingError: several attacks and no table to intersect them in.
    """
    rows = _rows(result["attacks"])
    if table is not None:
        counts = [count for _, count in table.after_each()]
    elif len(result["attacks"]) > 1:
        raise SettingError("table", "none", "the evaluation's .parquet file beside its .json")
    else:
        counts = [int(row["count"]) for row in (result["clean"], *rows)]
    clock = [("clean", 0.0), *((str(row["name"]), float(row["seconds"])) for row in rows)]
    return [(name, count, seconds) for (name, seconds), count in zip(clock, counts, strict=True)]


def _rows(attacks: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the JSON has of each attack, and of each member of an ensemble."""
    parts = [attack.get("members") or [{**attack, "name": name}] for name, attack in attacks.items()]
    return [row for part in parts for row in part]
