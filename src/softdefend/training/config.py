"""All settings of a run in one list.

The parser of the command line, :func:`softdefend.train`, the trainer and the run folder take their settings
from here: to add one, add a field to one of these classes.

In files, on the command line and as keywords the fields of :class:`Recipe` stand beside those of
:class:`TrainConfig`, as ``label``, not ``recipe.label``. That is the *flat* form, of which :func:`nest` and
:func:`flat` are the two directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from torch import nn

from softdefend.attacks import FGSM, PGD
from softdefend.core.docstrings import field_docstrings
from softdefend.core.errors import SettingError
from softdefend.core.hints import check_fields, check_type
from softdefend.core.registry import Registry
from softdefend.core.threat import ThreatModel
from softdefend.data import AugmentSettings, DataSettings
from softdefend.evaluation import EvaluateSettings
from softdefend.execution.engine import RuntimeSettings
from softdefend.labels import LABELS, BNMode, Hard, LabelRule
from softdefend.models import NetSettings
from softdefend.objectives import OBJECTIVES, PGDAT, GaussianNoise, Objective
from softdefend.training.optim import OptimSettings
from softdefend.training.settings import SaveSettings, ValidateSettings
from softdefend.weights import WEIGHTS, Plain, WeightRule

BROUGHT = ("data", "net", "evaluate")
"""The settings in whose place a caller from Python brings objects of his own."""
RULES: dict[str, Registry[Any]] = {"label": LABELS, "objective": OBJECTIVES, "weight": WEIGHTS}
"""The settings that name a rule, and the rules there are."""


@dataclass(frozen=True)
class Recipe:
    """The three independent answers, and the threat and attack that they are trained against.

    Raises:
        SettingError: something of another type, or an attack with a loss of its own: in training the
            objective says what the attack climbs.
    """

    label: LabelRule = field(default_factory=Hard)
    """which label do we believe?"""
    objective: Objective = field(default_factory=PGDAT)
    """what do we minimise?"""
    weight: WeightRule = field(default_factory=Plain)
    """at which weights?"""
    threat: ThreatModel = field(default_factory=ThreatModel)
    """what the adversary may change"""
    attack: PGD = field(default_factory=PGD)
    """the attack inside training"""
    attack_bn: BNMode = "eval"
    """batch normalization while attacking in training: eval (SGLS, TRADES), train (Rice et al., AWP) or batch
    (batch statistics, running ones untouched)"""
    eps_ramp: float = 0.0
    """share of the epochs, in [0, 1], over which eps of training rises by equal amounts to threat.eps, and a
    given attack.step_size with it; validation is always at threat.eps"""

    def __post_init__(self) -> None:
        _check_types(self)
        check_type("attack_bn", self.attack_bn, BNMode)
        if self.attack.loss != "ce":
            accepted = "ce, the default: in training the objective says what the attack climbs"
            raise SettingError("attack.loss", repr(self.attack.loss), accepted)
        if not 0 <= self.eps_ramp <= 1:
            raise SettingError("eps_ramp", self.eps_ramp, "a share of the epochs, in [0, 1]")
        if self.eps_ramp and isinstance(self.objective, GaussianNoise):
            given = f"{self.eps_ramp} with GaussianNoise"
            raise SettingError("eps_ramp", given, "0: its noise does not depend on threat.eps")
        self.attack.check(self.threat)
        step = float(self.attack.step_size or 0)
        if self.threat.norm == "linf" and step > 1:
            accepted = "at most 1: pixel values lie in [0, 1], so 2 levels of 255 are 2/255"
            raise SettingError("attack.step_size", self.attack.step_size, accepted)

    @property
    def rules(self) -> tuple[LabelRule, Objective, WeightRule]:
        """The three answers."""
        return self.label, self.objective, self.weight

    def trained(self, net: nn.Module) -> nn.Module:
        """What has the weights that are trained, once the rules are set up: the network, and the layers that
        the objective adds."""
        layers = self.objective.layers
        return net if layers is None else nn.ModuleList([net, layers])


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that defines a run, except where it is written and how it is watched.

    A caller from Python brings images and a network of his own and evaluates the result himself: ``data``,
    ``net`` and ``evaluate`` are then None.

    Raises:
        SettingError: something of another type, or a seed out of range.
    """

    name: str = "run"
    """what tables and figures call this recipe"""
    seed: int = 0
    """of every random draw in training"""
    data: DataSettings | None = field(default_factory=DataSettings)
    """which images"""
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    """random changes to training images"""
    net: NetSettings | None = field(default_factory=NetSettings)
    """which network"""
    recipe: Recipe = field(default_factory=Recipe)
    """label rule, objective, weight rule, threat and attack"""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """optimizer and length of the run"""
    validate: ValidateSettings = field(default_factory=ValidateSettings)
    """what is measured after an epoch"""
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    """device and precision"""
    save: SaveSettings = field(default_factory=SaveSettings)
    """checkpoints"""
    init_from: str | None = None
    """what to start from in place of fresh weights: a run folder (its best weights), a file of weights, or a
    checkpoint, whose state is taken too: momentum, averages, memories and the epochs behind it"""
    init_sha256: str | None = None
    """sha256 of that file; the run folder records it"""
    evaluate: EvaluateSettings | None = field(default_factory=EvaluateSettings)
    """the evaluation of the finished run"""

    def __post_init__(self) -> None:
        _check_types(self)
        if self.augment.plain_first and self.recipe.objective.views == 1:
            given = f"true with {type(self.recipe.objective).__name__}, which has one view of an image"
            raise SettingError("augment.plain_first", given, "false, or an objective with several views")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingError("seed", self.seed, "a whole number from -2^63 to 2^63 - 1")


def flat(config: TrainConfig) -> dict[str, Any]:
    """The values of all settings by flat name, but for what a caller from Python brings."""
    content = {own.name: getattr(config, own.name) for own in fields(TrainConfig)}
    recipe = content.pop("recipe")
    content |= {own.name: getattr(recipe, own.name) for own in fields(Recipe)}
    return {name: content[name] for name in flat_hints() if name not in BROUGHT or content[name] is not None}


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by flat name as arguments of :class:`TrainConfig`."""
    names = {own.name for own in fields(Recipe)}
    recipe = Recipe(**{name: value for name, value in values.items() if name in names})
    return {"recipe": recipe, **{name: value for name, value in values.items() if name not in names}}


@cache
def flat_hints() -> dict[str, Any]:
    """The type of every setting by flat name; without the None of a run from Python."""
    hints = _spliced(get_type_hints)
    return {name: _without_none(hint) if name in BROUGHT else hint for name, hint in hints.items()}


@cache
def flat_docstrings() -> dict[str, str]:
    """What every setting is, by flat name."""
    return _spliced(field_docstrings)


def _check_types(settings: Any) -> None:
    """Check the types of all fields.

    Raises:
        SettingError: another one, or a class where an object of it is wanted.
    """
    try:
        check_fields(settings, "")
    except SettingError as error:
        accepted = error.accepted
        if error.setting in RULES and accepted.startswith("an object of "):
            accepted += f": {', '.join(f'{rule}()' for rule in RULES[error.setting].names())}, or your own"
        if error.setting == "attack" and error.given == f"a {FGSM.__name__}":
            accepted += ", such as PGD(steps=1, start='none', step_size=threat.eps)"
        raise SettingError(error.setting, error.given, accepted) from None


def _without_none(hint: Any) -> Any:
    """``X`` for ``X | None``."""
    inner = [one for one in get_args(hint) if one is not NoneType]
    return inner[0] if len(inner) == 1 and NoneType in get_args(hint) else hint


def _spliced(describe: Callable[[type], dict[str, Any]]) -> dict[str, Any]:
    """Something about each setting by flat name: the fields of Recipe in the place of ``recipe``."""
    found: dict[str, Any] = {}
    for name, one in describe(TrainConfig).items():
        found |= describe(Recipe) if name == "recipe" else {name: one}
    return found
