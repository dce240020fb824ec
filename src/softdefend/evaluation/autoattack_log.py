"""An evaluation in the lines that AutoAttack logs.

Written from the log of fra31/auto-attack (commit a392200, ``autoattack.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softdefend.evaluation.robustbench import ENSEMBLE, STANDARD
from softdefend.evaluation.table import Table, after_each

_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1", "l0": "L0"}
_VERSIONS = {ENSEMBLE: "standard", f"{ENSEMBLE}-plus": "plus", f"{ENSEMBLE}-rand": "rand"}


def log_lines(result: Mapping[str, Any], table: Table | None) -> list[str]:
    """The evaluation in the lines that AutoAttack logs: accuracy at first, after each attack, at the end.

    The lines about single batches and about the range of the adversarial images are left out: an evaluation
    keeps neither.

    Args:
        result: ``evaluation/NAME.json``.
        table: ``evaluation/NAME.parquet``; needed where there are several attacks.

    Raises:
        SettingError: several attacks and no table.
    """
    steps = after_each(result, table)
    n = result["n"]
    names = [name for name, _, _ in steps[1:]]
    lines = [
        f"using {_version(result, names)} version including {', '.join(names)}.",
        f"initial accuracy: {steps[0][1] / n:.2%}",
    ]
    total = 0.0
    for name, count, seconds in steps[1:]:
        total += seconds
        lines.append(f"robust accuracy after {name.upper()}: {count / n:.2%} (total time {total:.1f} s)")
    if table is not None and table.attacks:
        lines.append(f"max {_NORMS[result['norm']]} perturbation: {_largest_distance(table):.5f}")
    lines.append(f"robust accuracy: {steps[-1][1] / n:.2%}")
    return lines


def _version(result: Mapping[str, Any], members: list[str]) -> str:
    """What AutoAttack calls an evaluation with these attacks."""
    version = "standard" if members == list(STANDARD) else "custom"
    if len(result["attacks"]) == 1:
        version = _VERSIONS.get(next(iter(result["attacks"])), version)
    return version


def _largest_distance(table: Table) -> float:
    """Over the images that an attack fooled: as in the original, all others have not been moved."""
    moved = (columns.distance[table.right & ~columns.robust] for columns in table.attacks.values())
    return max(float(distances.max(initial=0.0)) for distances in moved)
