"""Read the files beside an evaluation: table, audit, corruptions, transfer attacks, gallery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from softdefend.core.errors import SettingError
from softdefend.core.files import parse_json
from softdefend.core.safetensors_files import open_safetensors
from softdefend.core.threat import ThreatModel
from softdefend.evaluation.table import Table, read_table
from softdefend.evaluation.union import KeptEvaluation, kept_evaluations

ABOUT = ("weights", "test_data", "norm", "eps")
"""What files beside each other must agree in before they are about one network and one question."""


@dataclass(frozen=True)
class GalleryImages:
    """m test images from the hardest to the easiest to keep, the first half hard, the second easy.

    Attributes:
        image: [m, c, h, w] in [0, 1].
        index, label, prediction, survived: position in the test set, class, predicted class in the worst
            case, number of attacks withstood; int64.
        distance: the shortest way on which an attack succeeded; infinite where none did.
        hard: 1 for the hard half.
        classes: names.
        attacks: how many attacks there were.
    """

    image: NDArray[np.float32]
    index: NDArray[np.int64]
    label: NDArray[np.int64]
    prediction: NDArray[np.int64]
    survived: NDArray[np.int64]
    distance: NDArray[np.float32]
    hard: NDArray[np.uint8]
    classes: tuple[str, ...]
    attacks: int


@dataclass(frozen=True)
class Details:
    """What is known of one checkpoint beside its accuracies; None where it was not asked."""

    table: Table | None = None
    audit: dict[str, Any] | None = None
    corruptions: dict[str, Any] | None = None
    transfer: dict[str, Any] | None = None
    gallery: GalleryImages | None = None
    certificate: dict[str, Any] | None = None
    optimality: dict[str, Any] | None = None
    threats: tuple[KeptEvaluation, ...] = ()
    """Its evaluations under all threats, its own first; none where there is one alone."""


def read_details(folder: Path, which: str, evaluation: dict[str, Any]) -> Details:
    """The details of ``evaluation``, which stands in ``folder/{which}.json``.

    What is about other weights, other test data or another threat is left out: the evaluation is newer.

    Raises:
        SettingError: a file that cannot be understood.
    """
    table = read_table(folder / f"{which}.parquet")
    if table is not None and len(table.label) != evaluation.get("n"):
        table = None
    audit = _read_companion(folder / f"{which}-audit.json", evaluation)
    corruptions = _read_companion(folder / f"{which}-corruptions.json", evaluation)
    transfer = _read_companion(folder / f"{which}-transfer.json", evaluation)
    certificate = _read_companion(folder / f"{which}-certificate.json", evaluation, ("weights", "test_data"))
    optimality = _read_companion(folder / f"{which}-optimality.json", evaluation)
    for name, content, fits, accepted in (
        ("audit", audit, _is_audit, "findings, verdict and summary"),
        ("corruptions", corruptions, _is_table, "corruptions by name with mean and severities"),
        ("transfer", transfer, _is_attacks, "attacks by name, each with its rate"),
        ("certificate", certificate, _is_certificate, "curves of radius and rate"),
        ("optimality", optimality, _is_optimality, "attacks by name, and curves over a grid"),
    ):
        if content is not None and not fits(content):
            raise SettingError(str(folder / f"{which}-{name}.json"), "other content", accepted)
    gallery = _gallery(folder / f"{which}-gallery.safetensors", table, evaluation)
    threats = _threats(folder, which, evaluation)
    return Details(table, audit, corruptions, transfer, gallery, certificate, optimality, threats)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _threats(folder: Path, which: str, evaluation: dict[str, Any]) -> tuple[KeptEvaluation, ...]:
    others = [path for path in folder.glob(f"{which}-l*.json") if path.with_suffix(".parquet").is_file()]
    if not others or "weights" not in evaluation:
        return ()
    own = ThreatModel(evaluation["norm"], evaluation["eps"])
    kept = kept_evaluations(folder, which, own, evaluation, skip=True)
    return tuple(kept) if len(kept) > 1 else ()


def read_mapping(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        SettingError: it cannot be read, or holds something else.
    """
    try:
        content = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise SettingError(str(path), f"unreadable JSON ({error})", "the file as it was written") from error
    return check_mapping(path, content)


def check_mapping(path: Path, value: Any) -> dict[str, Any]:
    """``value``, which stands in the file at ``path``.

    Raises:
        SettingError: it is no mapping.
    """
    if not isinstance(value, dict):
        raise SettingError(str(path), f"a {type(value).__name__}", "a mapping of names to values")
    return value


def _read_companion(
    path: Path, evaluation: dict[str, Any], about: Sequence[str] = (*ABOUT, "network")
) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = read_mapping(path)
    matches = all(content.get(name) == evaluation.get(name) for name in ("epoch", *about))
    return content if matches else None


def _is_audit(content: dict[str, Any]) -> bool:
    findings = content.get("findings")
    return (
        all(isinstance(content.get(name), str) for name in ("verdict", "summary"))
        and isinstance(findings, list)
        and all(isinstance(row, dict) and isinstance(row.get("check"), str) for row in findings)
    )


def _is_table(content: dict[str, Any]) -> bool:
    table = content.get("corruptions")
    return (
        isinstance(table, dict)
        and is_number(content.get("mean"))
        and all(
            isinstance(row, dict)
            and is_number(row.get("mean"))
            and isinstance(row.get("severities"), list)
            and all(isinstance(rate, dict) and is_number(rate.get("rate")) for rate in row["severities"])
            for row in table.values()
        )
    )


def _is_attacks(content: dict[str, Any]) -> bool:
    attacks = content.get("attacks")
    return isinstance(attacks, dict) and all(
        isinstance(rate, dict) and is_number(rate.get("rate")) for rate in attacks.values()
    )


def _is_certificate(content: dict[str, Any]) -> bool:
    settings = content.get("settings")
    return (
        isinstance(settings, dict)
        and all(is_number(settings.get(name)) for name in ("sigma", "samples", "alpha"))
        and all(is_number(content.get(name)) for name in ("n", "abstained", "average_radius"))
        and all(
            isinstance(content.get(name), list)
            and all(
                isinstance(point, dict) and is_number(point.get("radius")) and is_number(point.get("rate"))
                for point in content[name]
            )
            for name in ("curve", "empirical")
        )
    )


def _is_optimality(content: dict[str, Any]) -> bool:
    attacks, grid, curves = (content.get(name) for name in ("attacks", "grid", "curves"))
    return (
        isinstance(attacks, dict)
        and all(
            isinstance(row, dict)
            and all(is_number(row.get(name)) for name in ("optimality", "found", "closest"))
            for row in attacks.values()
        )
        and isinstance(grid, list)
        and all(is_number(eps) for eps in grid)
        and isinstance(curves, dict)
        and all(
            isinstance(curve, list) and len(curve) == len(grid) and all(is_number(rate) for rate in curve)
            for curve in curves.values()
        )
    )


def _gallery(path: Path, table: Table | None, evaluation: dict[str, Any]) -> GalleryImages | None:
    if not path.is_file() or table is None:
        return None
    names = [name for name in GalleryImages.__dataclass_fields__ if name not in ("classes", "attacks")]
    try:
        with open_safetensors(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
            if any(metadata.get(name) != evaluation.get(name) for name in ABOUT):
                return None
            classes = tuple(str(name) for name in parse_json(metadata.get("classes", "[]")))
            attacks = int(metadata.get("attacks", len(table.attacks)))
    except (SafetensorError, OSError, ValueError) as error:
        raise SettingError(
            str(path), f"unreadable pictures ({error})", "the file as it was written"
        ) from error
    if any(len(tensor) != len(tensors["image"]) for tensor in tensors.values()):
        raise SettingError(str(path), "tensors of different length", "the file as it was written")
    return GalleryImages(**tensors, classes=classes, attacks=attacks)
