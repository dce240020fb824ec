"""Configuration: a protocol, a preset and dotted overrides, resolved to one experiment.

A *protocol* fixes data, network, threat, training attack and schedule; a *preset* names one combination of
label rule, objective and weight rule. Both are YAML files shipped with the package, and any file of the same
form can stand in their place.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]
from jsonargparse.typing import register_type

from softdefend.attacks import PGD
from softdefend.data import AugmentSettings, DataSettings
from softdefend.errors import SettingError
from softdefend.evaluation import EvaluateSettings
from softdefend.labels import BNMode, LabelRule
from softdefend.models import NetSettings
from softdefend.objectives import Objective
from softdefend.threat import Budget, ThreatModel
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
        SettingError: an unknown name, or a name missing.
    """
    files: dict[str, list[str]] = {kind: [] for kind in _FOLDERS}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        kind = flag.removeprefix("--")
        if flag in ("--config", "--preset"):
            name = value if equals else next(words, "")
            files[kind].append(f"--config={find(kind, name)}")
        else:
            rest.append(word)
    return [*files["config"], *files["preset"], *rest]


def make_parser(prog: str = "softdefend train") -> ArgumentParser:
    """The parser of everything that defines a run."""
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
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
        help="batch normalisation while attacking in training: eval (SGLS, TRADES), train (Rice et al., AWP) "
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
    parser = make_parser()
    try:
        if isinstance(arguments, dict):
            parsed = parser.parse_object(arguments)
        else:
            parsed = parser.parse_args(expand(arguments))
        config = json.loads(parser.dump(parsed, format="json", skip_unset=False))
        made = parser.instantiate(parsed)
    except ArgumentError as error:
        raise readable(error) from error
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


_RULES: dict[str, type] = {"label": LabelRule, "objective": Objective, "weight": WeightRule}


def readable(error: ArgumentError) -> SettingError:
    """The parser's complaint as one line that names the setting, what was given and what is accepted."""
    text = " ".join(str(error).split())
    key = re.search(r'Parser key "([^"]+)"', text)
    unknown = re.search(r"unrecognized arguments: (.*)|[Oo]ption '([^']+)' is not accepted", text)
    got = re.search(r"Expected an? (.+?)\. Got value: (.+)$", text)
    setting = key[1] if key else "command line"
    if unknown:
        given = f"unknown setting {unknown[1] or unknown[2]}"
        return SettingError(setting, given, "the settings that --help lists")
    if setting in _RULES and "class_path" not in text:
        given = text.rpartition(": ")[2]
        return SettingError(
            setting, given, " or ".join(rules(setting)) + ", or the import path of your own class"
        )
    if got:
        return SettingError(setting, got[2], got[1])
    return SettingError(setting, text.partition(":")[2].strip() or text, "what --help says of it")


def rules(kind: str) -> list[str]:
    """Names of the rules that stand for ``label``, ``objective`` or ``weight`` in a configuration."""
    import softdefend

    base = _RULES[kind]
    members = (getattr(softdefend, name) for name in softdefend.__all__)
    return sorted(
        m.__name__ for m in members if isinstance(m, type) and issubclass(m, base) and m is not base
    )
