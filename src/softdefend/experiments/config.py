"""Configuration: a protocol, a preset and dotted overrides, resolved to one experiment.

A *protocol* fixes data, network, threat, training attack and schedule; a *preset* names one combination of
label rule, objective and weight rule. Both are YAML files shipped with the package, and any file of the same
form can stand in their place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]
from jsonargparse.typing import register_type

from softdefend.attacks import PGD, CWLinf
from softdefend.core.errors import SettingError, did_you_mean
from softdefend.core.hints import Slot
from softdefend.core.registry import Registry
from softdefend.core.rule import Rule
from softdefend.core.settings import Settings, Tree, Word
from softdefend.core.threat import Budget
from softdefend.core.words import assignments
from softdefend.core.yaml_files import flatten, read_yaml
from softdefend.data import DataSettings
from softdefend.evaluation import EvaluateSettings
from softdefend.models import NetSettings
from softdefend.training.config import RULES, TrainConfig, flat, flat_docstrings, flat_hints, nest
from softdefend.training.plain import plain

register_type(Budget, serializer=str, deserializer=Budget)

_ATTACKS: Registry[type[PGD]] = Registry("training-attacks")
"""Attacks that training and validation may use, by name."""
for _kind in (PGD, CWLinf):
    _ATTACKS.register(_kind.__name__)(_kind)

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
    if os.path.isfile(name):
        return Path(name)
    accepted = f"the path of a YAML file, or one of {', '.join(shipped)}{did_you_mean(name, shipped)}"
    raise SettingError(f"--{kind}", repr(name), accepted)


def split_files(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Separate ``--config NAME`` and ``--preset NAME`` from the other words.

    Returns:
        The files, protocols first: a preset wins over a protocol wherever both say something, and dotted
        overrides win over both; then the other words.

    Raises:
        SettingError: an unknown name, or a name missing.
    """
    files: dict[str, list[Path]] = {kind: [] for kind in _FOLDERS}
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        kind = flag.removeprefix("--")
        if flag in ("--config", "--preset"):
            files[kind].append(find(kind, value if equals else next(rest, "")))
        else:
            others.append(word)
    return [*files["config"], *files["preset"]], others


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
    defaults, texts = flat(TrainConfig()), flat_docstrings()
    for name, hint in flat_hints().items():
        default = plain(defaults[name]) if isinstance(defaults[name], Rule) else defaults[name]
        text = texts[name].replace("%", "%%")  # argparse formats it
        parser.add_argument(f"--{name}", type=hint, default=default, help=text)
    parser.add_argument("--folder", type=str | None, default=None, help="run folder (runs/NAME-seedSEED)")
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="continue from this checkpoint of the run in the folder, in place of the newest; --init_from "
        "starts a new run from one",
    )
    parser.add_argument("--progress", type=bool, default=True, help="show progress bars")
    return parser


@cache
def _parser() -> ArgumentParser:
    """One parser for every :func:`resolve`: making it takes as long as parsing with it."""
    return make_parser()


@dataclass(frozen=True, kw_only=True)
class Experiment(TrainConfig):
    """A run of the command line: its settings, with data, network and evaluation, and where it runs."""

    data: DataSettings
    net: NetSettings
    evaluate: EvaluateSettings
    folder: Path
    resume: Path | None = None
    progress: bool = True


@cache
def _settings() -> Settings:
    """The settings of a run, and where it runs."""
    defaults = flat(TrainConfig())
    slots = {name: Slot(hint, defaults[name]) for name, hint in flat_hints().items()}
    about = {"folder": Slot(str | None, None), "resume": Slot(str | None, None), "progress": Slot(bool, True)}
    registries: dict[type, Registry[Any]] = {flat_hints()[kind]: known for kind, known in RULES.items()}
    return Settings(slots | about, registries={**registries, PGD: _ATTACKS})


def plain_settings(arguments: Sequence[str] | dict[str, Any]) -> Tree:
    """What :func:`resolve` takes, as plain values: those that are given, of the right names and types.

    Raises:
        SettingError: an unknown key, a value of the wrong type, or nothing where a value is needed.
    """
    settings, tree = _settings(), Tree()
    files, words = ([], []) if isinstance(arguments, dict) else split_files(arguments)
    for content in [arguments] if isinstance(arguments, dict) else map(read_yaml, files):
        tree = settings.update(tree, content)
    for name, text in assignments(words):
        tree = settings.update(tree, {name: Word(text)})
    for name, accepted in settings.missing(tree):
        raise SettingError(name, "nothing", accepted)
    return tree


def print_config(words: Sequence[str], *, skip_default: bool = False, skip_unset: bool = False) -> str:
    """The configuration that words stand for, as a YAML file that ``--config`` takes.

    Args:
        words: of ``softdefend train``.
        skip_default: leave out what is as its default.
        skip_unset: leave out what is null.
    """
    parser = _parser()
    parsed = parser.parse_object(plain_settings(words))
    return str(parser.dump(parsed, skip_default=skip_default, skip_unset=skip_unset))


def resolve(arguments: Sequence[str] | dict[str, Any]) -> Experiment:
    """Command-line words, or the content of a run's ``config.yaml``, to an experiment.

    Raises:
        SettingError: an unknown key, a value of the wrong type or outside its range.
    """
    parser = _parser()
    parsed = parser.parse_object(plain_settings(arguments))
    try:
        made = parser.instantiate(parsed)
        settings = nest({name: made[name] for name in flat_hints()})
    except SettingError as error:
        tree = json.loads(parser.dump(parsed, format="json", skip_unset=False, skip_validation=True))
        raise _located(error, tree) from error
    if not made.folder and (made.name in ("", "..") or Path(made.name).name != made.name):
        raise SettingError("name", repr(made.name), "a name without folders, or a --folder beside it")
    return Experiment(
        **settings,
        folder=Path(made.folder or f"runs/{made.name}-seed{made.seed}"),
        resume=Path(made.resume) if made.resume else None,
        progress=made.progress,
    )


def _located(error: SettingError, tree: Mapping[str, Any]) -> SettingError:
    """The error with its setting's whole name: a ``Schedule`` does not know that it is ``optim.schedule``."""
    values = {key.replace(".init_args", ""): value for key, value in flatten(tree).items()}
    named = [key for key in values if f".{key}".endswith(f".{error.setting}")]
    exact = [key for key in named if str(values[key]) == str(error.given).strip("'")]
    return SettingError((exact or named or [error.setting])[0], error.given, error.accepted)
