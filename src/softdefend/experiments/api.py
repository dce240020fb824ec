"""The short way from Python: any module, any tensors in [0, 1]."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.attacks import PGD, Attack
from softdefend.core.errors import SettingError
from softdefend.core.rule import Rule
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import AugmentSettings, DataBundle, Resident, from_tensors, split
from softdefend.evaluation import Ensemble, Evaluation, Evaluator
from softdefend.evaluation.autoattack import averages_draws, parse
from softdefend.evaluation.preflight import LOOK, preflight
from softdefend.execution.engine import resolve_device
from softdefend.execution.microbatch import fitting_microbatch
from softdefend.execution.network_mode import frozen
from softdefend.execution.search_network import Precision
from softdefend.experiments.complaints import RULES, rules
from softdefend.labels import BNMode, Hard, LabelRule
from softdefend.models import check_logits
from softdefend.objectives import PGDAT, Objective
from softdefend.report import RunRecord, read_run
from softdefend.training import (
    OptimSettings,
    Recipe,
    RuntimeSettings,
    SaveSettings,
    Trainer,
    ValidateSettings,
)
from softdefend.weights import Plain, WeightRule


def train(
    net: nn.Module,
    data: DataBundle | tuple[Tensor, Tensor],
    *,
    folder: Path | str,
    threat: ThreatModel | None = None,
    label: LabelRule | None = None,
    objective: Objective | None = None,
    weight: WeightRule | None = None,
    attack: PGD | None = None,
    attack_bn: BNMode = "eval",
    optim: OptimSettings | None = None,
    augment: AugmentSettings | None = None,
    validate: ValidateSettings | None = None,
    runtime: RuntimeSettings | None = None,
    save: SaveSettings | None = None,
    name: str = "run",
    seed: int = 0,
    progress: bool = True,
) -> RunRecord:
    """Train ``net`` in place, robustly; continue where ``folder`` holds an unfinished run.

    Afterwards ``net`` is in train mode and holds the weights that were trained. The best and the last ones
    that predict (with EMA or SWA: the average) are in ``folder`` as safetensors; see
    :func:`softdefend.evaluation.load_weights`.

    Args:
        net: images [b, c, h, w] float32 in [0, 1] to logits [b, k]; normalization belongs inside
            (see :func:`softdefend.normalized`).
        data: a bundle, or images [n, c, h, w] (uint8, or float in [0, 1]) and integer labels [n], of which a
            fifth is set aside as test set and a tenth of the rest (at most 1000) held out for validation.
        folder: the run folder.
        threat: l-inf at 8/255 when None.
        label, objective, weight: the recipe; plain PGD adversarial training when None.
        attack: the attack inside training; PGD-10 with steps of a quarter of eps when None.
        others: see each class.

    Raises:
        SettingError: something that does not fit; the line says what.
        DivergenceError: the loss or a weight is no longer finite, the loss is far above that of guessing and
            of the first step, or ``validate.alarm`` is ``stop`` and rings.
    """
    _check_kinds(
        {
            "net": (net, nn.Module),
            "threat": (threat, ThreatModel),
            "label": (label, LabelRule),
            "objective": (objective, Objective),
            "weight": (weight, WeightRule),
            "attack": (attack, PGD),
            "optim": (optim, OptimSettings),
            "augment": (augment, AugmentSettings),
            "validate": (validate, ValidateSettings),
            "runtime": (runtime, RuntimeSettings),
            "save": (save, SaveSettings),
        }
    )
    if not (isinstance(data, DataBundle) or (isinstance(data, (tuple, list)) and len(data) == 2)):
        raise SettingError("data", f"a {type(data).__name__}", "a DataBundle, or a pair (images, labels)")
    bundle = data if isinstance(data, DataBundle) else from_tensors(*data)
    settings: dict[str, Any] = {
        "threat": threat or ThreatModel(),
        "attack": attack or PGD(),
        "attack_bn": attack_bn,
        "label": label or Hard(),
        "objective": objective or PGDAT(),
        "weight": weight or Plain(),
        "optim": optim or OptimSettings(),
        "augment": augment or AugmentSettings(),
        "validate": validate or ValidateSettings(),
        "runtime": runtime or RuntimeSettings(),
        "save": save or SaveSettings(),
    }
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    check_logits(net, tuple(bundle.train.images.shape[1:]), len(bundle.classes), device)
    trainer = Trainer(
        net,
        bundle,
        Recipe(settings["threat"], settings["attack"], settings["label"], settings["objective"], attack_bn),
        folder,
        optim=settings["optim"],
        augment=settings["augment"],
        validate=settings["validate"],
        runtime=settings["runtime"],
        save=settings["save"],
        weight=settings["weight"],
        seed=seed,
        config={
            "name": name,
            "seed": seed,
            "data": {"source": bundle.name},
            **{k: plain(v) for k, v in settings.items()},
        },
        progress=progress,
    )
    try:
        trainer.fit()
    finally:
        trainer.folder.close()
    return read_run(Path(folder))


def evaluate(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel | None = None,
    attacks: Sequence[str | Attack | Ensemble] = ("pgd-20",),
    batch_size: int = 500,
    physical_batch: int | None = None,
    precision: Precision = "exact",
    compile: bool | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """Clean and robust accuracy of any module on any images, in eval mode and fp32.

    Before anything is attacked, :func:`softdefend.evaluation.preflight.preflight` looks at the first images.
    ``net`` is moved to the device; its mode and gradients are put back as they were.

    Args:
        net: images [b, c, h, w] float32 in [0, 1] to logits [b, k].
        images: [n, c, h, w], uint8 or float in [0, 1].
        labels: [n] integers in [0, k).
        threat: l-inf at 8/255 when None.
        attacks: attacks, or names of them (docs/attacks.md) such as ``autoattack``; all different. A network
            that draws random numbers is refused unless one of them averages over its draws (``-eot``,
            ``autoattack-rand``).
        batch_size, precision, compile, seed: as :class:`softdefend.evaluation.Evaluator` has them.
        physical_batch: images computed at once; on a GPU found from its free memory when None.

    Raises:
        SettingError: images, labels, a threat or a network that do not fit.
    """
    checked = split(images, labels)
    chosen = resolve_device(device)
    net = net.to(chosen)
    shape, least = tuple(checked.images.shape[1:]), int(checked.labels.max()) + 1
    k = check_logits(net, shape, None, chosen, least=least)
    data = Resident(checked, chosen)
    made = [parse(attack, k) if isinstance(attack, str) else attack for attack in attacks]
    threat = threat or ThreatModel()
    steady = not averages_draws([attack.name for attack in made])
    with frozen(net, "eval"):
        shown = data.take(torch.arange(min(data.n, LOOK), device=chosen))
        preflight(net, shown.image, shown.label, threat, classes=k, assumes_determinism=steady)
    if physical_batch is None and chosen.type == "cuda":
        physical_batch = fitting_microbatch(net, data.take(data.labels.new_zeros(1)).image)
    evaluator = Evaluator(
        net,
        data,
        threat,
        batch_size=batch_size,
        seed=seed,
        microbatch=physical_batch,
        precision=precision,
        compile=compile,
    )
    return evaluator(made, progress=progress)


def plain(value: Any) -> Any:
    """Settings objects as plain values for a configuration file.

    Of a rule its constructor arguments: a rule that has been set up holds more. Left out of them are objects
    that no file can hold, such as networks: a rule that takes one tells it from others on a resume, as KD
    does with the checksums in its ``state_dict``.

    Raises:
        SettingError: a rule with a constructor argument that it does not keep under its own name.
    """
    if isinstance(value, (Budget, Path)):
        return str(value)
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Rule):
        kind = type(value)
        held = {name: _kept(value, name) for name in _arguments(kind)}
        return {
            "class_path": f"{kind.__module__}.{kind.__qualname__}",
            "init_args": {name: plain(item) for name, item in held.items() if _recordable(item)},
        }
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _recordable(value: Any) -> bool:
    """Whether :func:`plain` says all that there is to say of a rule's argument: not of a network."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_recordable, value))
    if isinstance(value, dict):
        return all(map(_recordable, value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return all(_recordable(getattr(value, field.name)) for field in fields(value))
    return value is None or isinstance(value, (str, int, float, bool, Rule, Budget, Path, Tensor))


def _arguments(kind: type) -> list[str]:
    """Names of a class's constructor arguments; behind ``**kwargs`` stand those of the next class."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        further = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names |= {parameter.name: None for parameter in parameters if parameter.kind not in further}
        if inspect.Parameter.VAR_KEYWORD not in {parameter.kind for parameter in parameters}:
            break
    return list(names)


def _kept(rule: Rule, name: str) -> Any:
    """A constructor argument as the rule keeps it: an attribute of its own or a property.

    Raises:
        SettingError: there is none.
    """
    if name in vars(rule):
        return vars(rule)[name]
    if inspect.isdatadescriptor(inspect.getattr_static(type(rule), name, None)):
        return getattr(rule, name)
    kind = next((key for key, base in RULES.items() if isinstance(rule, base)), "rule")
    given = f"an argument that {type(rule).__name__} does not keep"
    raise SettingError(
        f"{kind}.{name}", given, f"one kept under its own name, as by self.{name} = {name} in __init__"
    )


def _check_kinds(given: dict[str, tuple[Any, type]]) -> None:
    """Refuse a class where an object of it is wanted, or something else altogether; None is a default.

    Raises:
        SettingError: it names the argument.
    """
    for name, (value, wanted) in given.items():
        if value is None or isinstance(value, wanted):
            continue
        if isinstance(value, type) and issubclass(value, wanted):
            raise SettingError(name, f"the class {value.__name__}", f"an object of it, as {value.__name__}()")
        known = (
            ", ".join(f"{rule}()" for rule in rules(name)) if name in ("label", "objective", "weight") else ""
        )
        what = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
        accepted = f"an object of {wanted.__name__}" + (f": {known}, or your own" if known else "")
        raise SettingError(name, what, accepted)
