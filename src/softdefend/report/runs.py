"""Read run folders, finished or still running, and group them by recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from softdefend.core.errors import SettingError
from softdefend.core.files import parse_json
from softdefend.core.safetensors_files import open_safetensors
from softdefend.core.weight_files import read_metadata
from softdefend.core.yaml_files import flatten, read_yaml
from softdefend.report.details import Details, check_mapping, is_number, read_details, read_mapping

CHECKPOINTS = ("best", "last")

OUTSIDE = "outside"
"""The part of a result folder's configuration that says where a network that was not trained here is from."""

GROUP_SECTIONS = (
    "data",
    "augment",
    "net",
    "threat",
    "attack",
    "attack_bn",
    "label",
    "objective",
    "weight",
    "optim",
)
"""Parts of the configuration that must agree, but for seeds, before runs of one name are one recipe."""


_MEASURES = (
    *("step", "lr", "loss", "target_entropy"),
    *(f"{split}_{name}" for split in ("train", "val", "test") for name in ("clean", "robust", "fgsm")),
)
"""What a row of metrics has numbers for."""


@dataclass(frozen=True)
class ExampleImages:
    """A few test images with what a network made of them; m images of shape [c,h,w] in [0, 1]."""

    image: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    label: NDArray[np.int64]
    clean_prediction: NDArray[np.int64]
    adversarial_prediction: NDArray[np.int64]
    clean_confidence: NDArray[np.float32]
    adversarial_confidence: NDArray[np.float32]
    classes: tuple[str, ...]
    checkpoint: str


@dataclass
class RunRecord:
    """What a run folder says.

    Attributes:
        folder: the run folder.
        name: the recipe's name.
        seed: the run's seed.
        config: the resolved configuration, nested.
        environment: versions, device, commit; empty where the file is absent.
        metrics: one row per finished epoch, in the order of epochs.
        evaluations: by checkpoint ("best", "last"); those that have been evaluated.
        examples: example images of the last checkpoint that has some.
        timing: rows of epoch and seconds.
        details: by checkpoint, what else its evaluation left.
    """

    folder: Path
    name: str
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    examples: ExampleImages | None = None
    timing: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Details] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """The runs of one recipe: the same settings, usually several seeds."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The distinct seeds, in ascending order."""
        return tuple(sorted({run.seed for run in self.runs}))


def read_run(folder: Path) -> RunRecord:
    """Read one run folder.

    A run that is still going is fine: missing evaluations are left out, and a last line of
    ``metrics.jsonl`` that is not complete yet is ignored. Where an epoch has several rows the last counts.

    Raises:
        SettingError: not a run folder (no ``config.yaml``), or a file in it that cannot be understood.
    """
    folder = Path(folder)
    config_path = folder / "config.yaml"
    if not os.path.isfile(config_path):
        accepted = "a run folder written by training (it holds config.yaml)"
        raise SettingError("run folder", folder, accepted)
    config = read_yaml(config_path)
    rows = _read_lines(folder / "metrics.jsonl")
    by_epoch = {_metrics_row(folder / "metrics.jsonl", row)["epoch"]: row for row in rows}
    environment = folder / "environment.json"
    evaluations = {
        which: _evaluation(path, _writer(folder / f"{which}.safetensors"))
        for which in CHECKPOINTS
        if (path := folder / "evaluation" / f"{which}.json").is_file()
    }
    return RunRecord(
        folder=folder,
        name=str(config.get("name") or folder.name),
        seed=_seed(config_path, config),
        config=config,
        environment=read_mapping(environment) if environment.is_file() else {},
        metrics=[by_epoch[epoch] for epoch in sorted(by_epoch)],
        evaluations=evaluations,
        examples=next(filter(None, (_examples(folder, which) for which in reversed(CHECKPOINTS))), None),
        timing=_timing(folder / "timing.jsonl"),
        details={
            which: read_details(folder / "evaluation", which, evaluation)
            for which, evaluation in evaluations.items()
        },
    )


def setting(run: RunRecord, path: str) -> Any:
    """A value of the configuration by its dotted path, or None."""
    value: Any = run.config
    for key in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Runs by recipe, in the order in which the recipes first appear.

    Runs of one name that differ in :data:`GROUP_SECTIONS` are different recipes; what differs then becomes
    part of the label. A folder given twice counts once.
    """
    unique = {os.path.realpath(run.folder): run for run in runs}.values()
    groups: dict[_Key, list[RunRecord]] = {}
    for run in unique:
        groups.setdefault(_key(run), []).append(run)
    return [Group(_label(key, list(groups)), tuple(members)) for key, members in groups.items()]


_Key = tuple[str, frozenset[tuple[str, str]]]
"""The name of a recipe, and its settings by dotted path."""


def _key(run: RunRecord) -> _Key:
    leaves = flatten({name: run.config.get(name) for name in GROUP_SECTIONS})
    return run.name, frozenset(
        (path, str(value)) for path, value in leaves.items() if "seed" not in path.rpartition(".")[2]
    )


def _label(key: _Key, keys: list[_Key]) -> str:
    name, leaves = key
    rivals = [settings for rival, settings in keys if rival == name]
    own = sorted(leaves - frozenset.intersection(*rivals))
    parts = [f"{path.removesuffix('.class_path').replace('.init_args', '')} {value}" for path, value in own]
    return f"{name} ({', '.join(parts)})" if parts else name


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = _lines(path)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(check_mapping(path, parse_json(line)))
        except ValueError as error:
            if number == len(lines) and not isinstance(error, SettingError):
                break  # the run is still going: the writer has not finished this line
            raise SettingError(f"{path} line {number}", f"unreadable JSON ({error})", "one object") from error
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise SettingError(str(path), f"an unreadable file ({error})", "JSON Lines") from error


def _timing(path: Path) -> list[dict[str, Any]]:
    """The rows of ``timing.jsonl``. They only inform, so one that is damaged is left out."""
    rows = []
    for line in _lines(path) if path.is_file() else []:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("epoch"), int) and is_number(row.get("seconds")):
            rows.append(row)
    return rows


def _seed(path: Path, config: dict[str, Any]) -> int:
    seed = config.get("seed", 0)
    if not isinstance(seed, int):
        raise SettingError(f"{path}: seed", seed, "a whole number")
    return seed


def _metrics_row(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("epoch"), int):
        raise SettingError(str(path), f"a row with epoch {row.get('epoch')!r}", "rows with a whole epoch")
    for name in _MEASURES:
        if not isinstance(row.get(name), int | float | None):
            raise SettingError(str(path), f"{name} {row[name]!r} in epoch {row['epoch']}", "a number or null")
    return row


def _writer(weights: Path) -> str | None:
    """The settings' digest of the run that wrote a file of weights; None where the file does not say."""
    try:
        run = read_metadata(weights).get("run")
    except (OSError, SafetensorError, ValueError):
        return None
    return run.get("settings") if isinstance(run, dict) else None


def _evaluation(path: Path, writer: str | None) -> dict[str, Any]:
    """Read an evaluation of weights that ``writer`` has written."""
    evaluation = read_mapping(path)
    if writer is not None and evaluation.get("run", writer) != writer:
        accepted = "one of the weights in the folder; softdefend evaluate makes it anew"
        raise SettingError(str(path), "an evaluation of another run's weights", accepted)
    attacks = evaluation.get("attacks")
    if not isinstance(attacks, dict):
        raise SettingError(str(path), "an evaluation without attacks", "attacks by name, each with its rate")
    worst = {"worst": evaluation["worst"]} if evaluation.get("worst") else {}
    for name, rate in {"clean": evaluation.get("clean"), **attacks, **worst}.items():
        if not isinstance(rate, dict) or not is_number(rate.get("rate")):
            raise SettingError(f"{path}: {name}", rate, "an object with a rate in [0, 1]")
    _rows(path, evaluation, "eps_curve", ("value", "rate"))
    _rows(path, evaluation, "per_class", ("clean", "robust"))
    return evaluation


def _rows(path: Path, evaluation: dict[str, Any], name: str, numbers: tuple[str, ...]) -> None:
    rows = evaluation.get(name) or []
    flat = rows if isinstance(rows, list) else [None]
    if not all(isinstance(row, dict) and all(is_number(row.get(n)) for n in numbers) for row in flat):
        raise SettingError(f"{path}: {name}", rows, f"a list of objects with {' and '.join(numbers)}")


def _examples(folder: Path, which: str) -> ExampleImages | None:
    path = folder / "evaluation" / f"{which}-examples.safetensors"
    if not path.is_file():
        return None
    names = [name for name in ExampleImages.__dataclass_fields__ if name not in ("classes", "checkpoint")]
    try:
        with open_safetensors(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in names}
            classes = parse_json((file.metadata() or {}).get("classes", "[]"))
    except (SafetensorError, OSError, ValueError) as error:
        raise SettingError(
            str(path), f"unreadable examples ({error})", "the file as it was written"
        ) from error
    shape = tensors["image"].shape
    fits = len(shape) == 4 and tensors["adversarial"].shape == shape
    if not fits or any(tensor.shape[:1] != shape[:1] for tensor in tensors.values()):
        given = f"tensors of shape {[list(t.shape) for t in tensors.values()]}"
        raise SettingError(str(path), given, "image and adversarial [m,c,h,w], the others [m]")
    return ExampleImages(**tensors, classes=tuple(str(name) for name in classes), checkpoint=which)
