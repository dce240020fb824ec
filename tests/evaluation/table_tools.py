"""Tables of made-up evaluations, and their counts by a plain loop."""

from __future__ import annotations

from typing import Any

import numpy as np

from softdefend.evaluation.robustbench import STANDARD
from softdefend.evaluation.table import AttackColumns, Table

N = 40


def make_table(names: tuple[str, ...] = STANDARD) -> Table:
    random = np.random.default_rng(0)
    label = random.integers(0, 4, N)
    clean = np.where(random.random(N) < 0.8, label, (label + 1) % 4)
    attacks = {}
    for name in names:
        said = np.where(random.random(N) < 0.75, clean, (label + 2) % 4)
        distance = (random.random(N) * 0.03).astype(np.float32)
        attacks[name] = AttackColumns(said, distance, (clean == label) & (said == label))
    return Table(np.arange(N), label, clean, attacks)


def rate(count: int) -> dict[str, Any]:
    return {"count": count, "n": N, "rate": count / N}


def make_result(table: Table, **more: Any) -> dict[str, Any]:
    attacks = {
        name: {**rate(int(columns.robust.sum())), "seconds": 1.25 * (i + 1)}
        for i, (name, columns) in enumerate(table.attacks.items())
    }
    return {
        "n": N,
        "norm": "linf",
        "eps": "8/255",
        "name_of_data": "cifar-10-batches-py",
        "clean": rate(int(table.right.sum())),
        "attacks": attacks,
        "worst": rate(table.after_each()[-1][1]),
        **more,
    }


def count_naively(table: Table, names: tuple[str, ...]) -> int:
    total = 0
    for i in range(N):
        said = [table.clean_prediction[i], *(table.attacks[name].prediction[i] for name in names)]
        total += all(word == table.label[i] for word in said)
    return total


def as_ensemble(table: Table) -> Table:
    """The attacks of ``table`` as members of one, each shown only what the ones before it left."""
    left, fooled = table.right, {}
    for name, columns in table.attacks.items():
        fooled[name] = left & (columns.prediction != table.label)
        left = left & ~fooled[name]
    one = AttackColumns(table.worst_prediction, table.smallest_distance, left, fooled)
    return Table(table.index, table.label, table.clean_prediction, {"autoattack": one})
