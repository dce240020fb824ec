"""Configuration: a protocol, a preset and dotted overrides, resolved to one experiment.

A *protocol* fixes data, network, threat, training attack and schedule; a *preset* names one combination of
label rule, objective and weight rule. Both are YAML files shipped with the package, and any file of the same
form can stand in their place.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]
from jsonargparse.typing import register_type

from softdefend.attacks import PGD
from softdefend.core.errors import SettingError
from softdefend.core.threat import Budget, ThreatModel
from softdefend.core.yaml_files import flatten, read_yaml
from softdefend.data import AugmentSettings, DataSettings
from softdefend.evaluation import EvaluateSettings
from softdefend.experiments.complaints import RULES, readable
from softdefend.labels import BNMode, LabelRule
from softdefend.models import NetSettings
from softdefend.objectives import Objective
from softdefend.training import (
    OptimSettings,
    Recipe,
    RuntimeSettings,
    SaveSettings,
    ValidateSettings,
)
from softdefend.weights import WeightRule

register_type(Budget, serializer=str, deserializer=Budget)

_FOLDERS = {"config": "protocols", "preset": "presets"}

_HINTS: dict[str, Any] = {
    "name": str,
    "seed": int,
    "progress": bool,
    "data": DataSettings,
    "augment": AugmentSettings,
    "net": NetSettings,
    "threat": ThreatModel,
    "attack": PGD,
    "attack_bn": BNMode,
    "label": LabelRule,
    "objective": Objective,
    "weight": WeightRule,
    "optim": OptimSettings,
    "validate": ValidateSettings,
    "runtime": RuntimeSettings,
    "save": SaveSettings,
    "evaluate": EvaluateSettings,
}
"""Settings that must have a value."""


def packaged(kind: str) -> dict[str, Path]:
    """The shipped YAML files of one kind (``config`` or ``preset``) by name."""
    root = Path(str(resources.files("softdefend") / "configs" / _FOLDERS[kind]))
    return {path.stem: path for path in sorted(root.glob("*.yaml"))}


def find(kind: str, name: str) -> Path:
    """A shipped file by name, else a file by path.

    Raises:
        SettingError: neither exists.
    """
    shipped = packaged(kind)
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise SettingError(f"--{kind}", repr(name), f"the path of a YAML file, or one of {', '.join(shipped)}")


def expand(arguments: Sequence[str]) -> list[str]:
    """Write ``--config NAME`` and ``--preset NAME`` as paths, protocols first: a preset wins over a protocol
    wherever both speak, and dotted overrides win over both.

    Raises:
        SettingError: an unknown name, a name missing, or a file that is no configuration.
    """
    files: dict[str, list[str]] = {kind: [] for kind in _FOLDERS}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        kind = flag.removeprefix("--")
        if flag in ("--config", "--preset"):
            path = find(kind, value if equals else next(words, ""))
            _refuse_misfits(read_yaml(path), _HINTS)
            files[kind].append(f"--config={path}")
        else:
            rest.append(word)
    return [*files["config"], *files["preset"], *rest]


def first_given(words: Sequence[str], names: Container[str]) -> str | None:
    """The first of some settings (``--seed``) that words give, as ``--seed 1`` or ``--seed=1``."""
    return next((name for word in words if (name := word.partition("=")[0]) in names), None)


def make_parser(prog: str = "softdefend train") -> ArgumentParser:
    """The parser of everything that defines a run."""
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a robust classifier. Name a protocol (--config) and a recipe (--preset), or give "
        "YAML files; override any setting by its dotted name.",
        epilog=f"protocols: {', '.join(packaged('config'))}; presets: {', '.join(packaged('preset'))}",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a protocol, by name or path")
    parser.add_argument("--name", type=str, default="run", help="what tables and figures call this recipe")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw in training")
    parser.add_argument("--folder", type=str | None, default=None, help="run folder (runs/NAME-seedSEED)")
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="continue from this checkpoint, in place of the newest",
    )
    parser.add_argument("--progress", type=bool, default=True, help="show progress bars")
    parser.add_argument("--data", type=DataSettings, default=DataSettings())
    parser.add_argument("--augment", type=AugmentSettings, default=AugmentSettings())
    parser.add_argument("--net", type=NetSettings, default=NetSettings())
    parser.add_argument("--threat", type=ThreatModel, default=ThreatModel())
    parser.add_argument("--attack", type=PGD, default=PGD(), help="the attack inside training")
    parser.add_argument(
        "--attack_bn",
        type=BNMode,
        default="eval",
        help="batch normalization while attacking in training: eval (SGLS, TRADES), train (Rice et al., AWP) "
        "or batch (batch statistics, running ones untouched)",
    )
    parser.add_argument(
        "--label", type=LabelRule, default={"class_path": "Hard"}, help="which label do we believe?"
    )
    parser.add_argument(
        "--objective", type=Objective, default={"class_path": "PGDAT"}, help="what do we minimise?"
    )
    parser.add_argument(
        "--weight", type=WeightRule, default={"class_path": "Plain"}, help="at which weights?"
    )
    parser.add_argument("--optim", type=OptimSettings, default=OptimSettings())
    parser.add_argument("--validate", type=ValidateSettings, default=ValidateSettings())
    parser.add_argument("--runtime", type=RuntimeSettings, default=RuntimeSettings())
    parser.add_argument("--save", type=SaveSettings, default=SaveSettings())
    parser.add_argument("--evaluate", type=EvaluateSettings, default=EvaluateSettings())
    return parser


@cache
def _parser() -> ArgumentParser:
    """One parser for every :func:`resolve`: making it takes as long as parsing with it."""
    return make_parser()


@dataclass(frozen=True)
class Experiment:
    """A resolved configuration, as plain values and as objects."""

    config: dict[str, Any]
    name: str
    seed: int
    folder: Path
    resume: Path | None
    progress: bool
    data: DataSettings
    augment: AugmentSettings
    net: NetSettings
    recipe: Recipe
    weight: WeightRule
    optim: OptimSettings
    validate: ValidateSettings
    runtime: RuntimeSettings
    save: SaveSettings
    evaluate: EvaluateSettings


def resolve(arguments: Sequence[str] | dict[str, Any]) -> Experiment:
    """Command-line words, or the content of a run's ``config.yaml``, to an experiment.

    Raises:
        SettingError: an unknown key, a value of the wrong type or outside its range.
    """
    parser = _parser()
    try:
        if isinstance(arguments, dict):
            _refuse_misfits(arguments, _HINTS)
            parsed = parser.parse_object(arguments)
        else:
            parsed = parser.parse_args(expand(arguments))
    except argparse.ArgumentError as error:
        raise readable(error, parser) from error
    # The parser has validated what it parsed; once more would take a fifth as long as all the rest.
    config = json.loads(parser.dump(parsed, format="json", skip_unset=False, skip_validation=True))
    _refuse_misfits(config, _HINTS)
    try:
        made = parser.instantiate(parsed)
    except SettingError as error:
        raise _located(error, config) from error
    if not -(2**63) <= made.seed < 2**63:
        raise SettingError("seed", made.seed, "a whole number from -2^63 to 2^63 - 1")
    if not made.folder and (made.name in ("", "..") or Path(made.name).name != made.name):
        raise SettingError("name", repr(made.name), "a name without folders, or a --folder beside it")
    return Experiment(
        config=config,
        name=made.name,
        seed=made.seed,
        folder=Path(made.folder or f"runs/{made.name}-seed{made.seed}"),
        resume=Path(made.resume) if made.resume else None,
        progress=made.progress,
        recipe=Recipe(made.threat, made.attack, made.label, made.objective, made.attack_bn),
        **{
            key: made[key]
            for key in (
                "data",
                "augment",
                "net",
                "weight",
                "optim",
                "validate",
                "runtime",
                "save",
                "evaluate",
            )
        },
    )


def _located(error: SettingError, config: Mapping[str, Any]) -> SettingError:
    """The error with its setting's whole name: a ``Schedule`` does not know that it is ``optim.schedule``."""
    values = {key.replace(".init_args", ""): value for key, value in flatten(config).items()}
    named = [key for key in values if f".{key}".endswith(f".{error.setting}")]
    exact = [key for key in named if str(values[key]) == str(error.given).strip("'")]
    return SettingError((exact or named or [error.setting])[0], error.given, error.accepted)


def _refuse_misfits(content: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse what the parser lets through: null for anything, and a section that is not a mapping."""
    for name, value in content.items():
        hint, setting = hints.get(name), f"{prefix}{name}"
        if value is None and hint is not None and type(None) not in get_args(hint):
            raise SettingError(setting, "null", "a value, as --help says")
        if not is_dataclass(hint) or (isinstance(value, str) and setting in RULES):
            continue
        if not isinstance(value, Mapping):
            names = ", ".join(field.name for field in fields(hint))
            raise SettingError(setting, repr(value), f"its settings by name: {names}")
        inner = value.get("init_args") or {} if "class_path" in value else value
        _refuse_misfits(inner, get_type_hints(hint), f"{setting}.")
