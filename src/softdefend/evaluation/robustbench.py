"""An evaluation as RobustBench's ``model_info`` JSON.

Written from the files of RobustBench/robustbench (commit 78fcc9e, ``model_info/`` and ``utils.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget
from softdefend.evaluation.table import Table
from softdefend.models.robustbench import CALLED

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""Members of the standard ensemble (Croce and Hein, arXiv 2003.01690), in the order in which they run."""

ENSEMBLE = "autoattack"

FIELDS: dict[str, Any] = {
    "link": "",
    "name": "",
    "authors": "",
    "additional_data": None,
    "number_forward_passes": 1,
    "dataset": "",
    "venue": "",
    "architecture": "",
    "eps": "",
    "clean_acc": "",
    "reported": None,
    "autoattack_acc": "",
    "footnote": None,
}
"""Fields of a ``model_info`` file in their order. What is text in RobustBench's own files is empty where
nobody has said it: its code splits and joins it. ``external`` and ``unreliable`` are left out where unknown:
it takes the presence of ``external`` for a number."""

_DATASETS = {"cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100"}


def check_standard(attacks: Mapping[str, Any] | tuple[str, ...], n: int, full: int, precision: str) -> None:
    """Refuse an evaluation that ``autoattack_acc`` does not stand for.

    Args:
        attacks: names of the attacks.
        n: images attacked.
        full: images of the test set.
        precision: of the evaluation: ``exact``, ``strict`` or another.

    Raises:
        SettingError: the standard ensemble was not run, or not on all images, or not exactly.
    """
    accepted = f"--attacks {ENSEMBLE} on all {full} test images (--size null), with exact or strict precision"
    if ENSEMBLE not in attacks and not set(STANDARD) <= set(attacks):
        raise SettingError("--robustbench", f"an evaluation with {', '.join(attacks)}", accepted)
    if n < full:
        raise SettingError("--robustbench", f"an evaluation on {n} of {full} images", accepted)
    if precision not in ("exact", "strict"):
        raise SettingError("--robustbench", f"an evaluation with precision {precision}", accepted)


def model_info(
    result: Mapping[str, Any],
    table: Table | None,
    *,
    full: int,
    architecture: str | None = None,
    additional_data: bool | None = None,
    unreliable: bool | None = None,
    transferred: int | None = None,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An evaluation as RobustBench's ``model_info``.

    As in its own files accuracies are text, in per cent with up to two digits, and so is eps.

    Args:
        result: ``evaluation/NAME.json``.
        table: ``evaluation/NAME.parquet``; needed where the members of the ensemble were run one by one.
        full: images of the test set.
        architecture: of the network.
        additional_data: whether it was trained on more than the training set; None if that is not known.
        unreliable: whether an audit found masked gradients; None without one.
        transferred: images that stay robust under those made against other networks; None without any.
        known: what was written before: facts that no evaluation knows (authors, venue, ...) are kept.
            ``external`` and ``unreliable`` are kept while the figures and eps they were written for stand.

    Returns:
        The fields. Where attacks beyond the ensemble lowered the worst case further, or images made against
        other networks did more, that is ``external``.

    Raises:
        SettingError: the standard ensemble was not run on the full test set.
    """
    attacks = result["attacks"]
    precision = str((result.get("settings") or {}).get("precision", "exact"))
    check_standard(attacks, result["n"], full, precision)
    robust, n = _ensemble_count(result, table), result["n"]
    content = {**FIELDS, **(known or {})}
    content["dataset"] = _DATASETS.get(str(result["name_of_data"]), result["name_of_data"])
    content["architecture"] = content["architecture"] or CALLED.get(str(architecture), architecture or "")
    if content["additional_data"] is None:
        content["additional_data"] = additional_data
    content["eps"] = str(result["eps"])
    content["clean_acc"] = _percent(result["clean"]["rate"])
    content["autoattack_acc"] = _percent(robust / n)
    judged = ("clean_acc", "autoattack_acc", "eps")
    if known and not all(_equal(known.get(field), content[field]) for field in judged):
        for verdict in ("external", "unreliable"):
            content.pop(verdict, None)
    least = min(result["worst"]["count"], robust if transferred is None else transferred)
    if least < robust:
        content["external"] = _percent(least / n)
    if unreliable is not None:
        content["unreliable"] = unreliable
    return content


def _percent(rate: float) -> str:
    return str(round(100 * rate, 2))


def _equal(one: Any, other: Any) -> bool:
    """Whether two fields are the same number. Published files hold numbers and ratios as text."""
    try:
        return float(Budget(one)) == float(Budget(other))
    except SettingError:
        return False


_ISSUE = """\
# Paper Information

- **Paper Title**: {name}
- **Paper URL**: {link}
- **Paper authors**: {authors}

# Leaderboard Claim(s)

## Model 1

- **Architecture**: {architecture}
- **Threat Model**: {norm}
- **eps**: {eps}
- **Clean accuracy**: {clean_acc}%
- **Robust accuracy**: {robust}%
- **Additional data**: {additional_data}
- **Evaluation method**: {method}
- **Checkpoint and code**:

# Model Zoo:

- [ ] I want to add my models to the Model Zoo (check if true)
- [ ] I use an architecture that is included among those of RobustBench or in `timm`.
- [ ] I agree to release my model(s) under MIT license **OR** under a custom license, located here:
"""
"""The form of RobustBench's issue for a new model, ``.github/ISSUE_TEMPLATE/new-model.md`` there."""

_NORMS = {"linf": "Linf", "l2": "L2"}


def issue_text(content: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The text of RobustBench's new-model issue; what no evaluation knows is left to be filled in.

    Args:
        content: of :func:`model_info`.
        result: ``evaluation/NAME.json``.
    """
    known = {True: "true", False: "false", None: ""}
    versions = result.get("versions", {})
    images, version = f"{result['n']:,} test images", versions.get("softdefend", "")
    precision = result.get("precision", "exact")
    method = f"AutoAttack (standard) on all {images}, by softdefend {version} in {precision} precision"
    return _ISSUE.format(
        **{key: content.get(key) or "" for key in ("name", "link", "authors", "architecture")},
        norm=_NORMS.get(str(result["norm"]), result["norm"]),
        eps=content["eps"],
        clean_acc=content["clean_acc"],
        robust=content.get("external", content["autoattack_acc"]),
        additional_data=known.get(content["additional_data"], ""),
        method=method,
    )


def read_known(path: Path) -> dict[str, Any]:
    """The fields of an earlier file; empty where there is none.

    Raises:
        SettingError: a file that is no JSON object.
    """
    if not os.path.exists(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError("--robustbench", f"{path}, which is no JSON", "a new or a JSON file") from error
    if not isinstance(content, dict):
        raise SettingError("--robustbench", f"{path}, which holds no object", "a new or a JSON file")
    return content


def _ensemble_count(result: Mapping[str, Any], table: Table | None) -> int:
    attacks = result["attacks"]
    if ENSEMBLE in attacks:
        return int(attacks[ENSEMBLE]["count"])
    if table is None:
        raise SettingError("table", "none", "the evaluation's .parquet file beside its .json")
    return table.after_each(STANDARD)[-1][1]
