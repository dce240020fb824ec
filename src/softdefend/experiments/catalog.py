"""The grid of recipes: every rule, what it costs, which combinations are published, possible or refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.experiments.config import Experiment, packaged, resolve
from softdefend.labels import Hard, LabelRule
from softdefend.objectives import PGDAT, Objective
from softdefend.training.config import RULES, flat_hints
from softdefend.training.mixture import mixing_refusal
from softdefend.weights import Plain, WeightRule

STEPS = 10
"""Steps of the attack that costs are stated for: PGD-10."""

PUBLISHED: dict[tuple[str, str, str], str] = {
    ("Hard", "PGDAT", "Plain"): "Madry et al. 2018",
    ("Hard", "TRADES", "Plain"): "Zhang et al. 2019",
    ("Hard", "MART", "Plain"): "Wang et al. 2020",
    ("Hard", "PGDAT", "AWP"): "Wu et al. 2020",
    ("Hard", "TRADES", "AWP"): "Wu et al. 2020",
    ("Hard", "MART", "AWP"): "Wu et al. 2020",
    ("Smooth", "PGDAT", "Plain"): "Pang et al. 2021",
    ("Hard", "PGDAT", "SWA"): "Chen et al. 2021",
    ("KD", "PGDAT", "Plain"): "Chen et al. 2021",
    ("KD", "PGDAT", "SWA"): "Chen et al. 2021",
    ("Hard", "TRADES", "EMA"): "Gowal et al. 2020",
    ("SAT", "TRADES", "Plain"): "Huang et al. 2020",
    ("ADR", "PGDAT", "Plain"): "Wu et al. 2024",
    ("ADR", "PGDAT", "EMA"): "Wu et al. 2024",
    ("ADR", "PGDAT", "AWP + EMA"): "Wu et al. 2024",
    ("ADR", "TRADES", "Plain"): "Wu et al. 2024",
    ("ADR", "TRADES", "AWP + EMA"): "Wu et al. 2024",
    ("Hard", "TE", "Plain"): "Dong et al. 2022",
    ("Hard", "TRADESTE", "Plain"): "Dong et al. 2022",
    ("Hard", "MLCAT", "Plain"): "Yu et al. 2022",
    ("Hard", "Consistency", "Plain"): "Tack et al. 2022",
    ("Hard", "NFGSM", "Plain"): "de Jorge et al. 2022",
    ("Hard", "FGSMRS", "Plain"): "Wong et al. 2020",
    ("Hard", "GaussianNoise", "Plain"): "Cohen et al. 2019",
    ("SGLR", "PGDAT", "Plain"): "Yu, Li et al. 2024",
    ("SGLR", "TRADES", "Plain"): "Yu, Li et al. 2024",
    ("ReBAT", "PGDAT", "EMA"): "Wang, Li et al. 2023",
    ("Smooth", "TRADES", "EMA"): "Wang, Pang et al. 2023",
    ("Hard", "DAJAT", "AWP + EMA"): "Addepalli et al. 2022",
    ("Hard", "TRADES", "AWP + EMA"): "Addepalli et al. 2022",
}
"""Combinations of (label rule, objective, weight rule) that were published, and by whom; those we know of."""

BY = {"idbh-pgd-at": "Li & Spratling 2023"}
"""Presets whose source is another than their combination's: of their augmentation or data."""

OURS = ("pgd-at-cutmix-ema", "sglr-paper", "trades-sglr-paper", "mart-awp")
"""Presets of a published combination with a value that is our own choice."""


@dataclass(frozen=True)
class Method:
    """One rule, or one preset, in a line.

    Attributes:
        kind: ``label``, ``objective``, ``weight`` or ``preset``.
        name: of the class or the file.
        summary: what it is.
        source: who published it; for a preset the combination's source, "" where nobody has.
        units: forward units of a training step with PGD-10 (objective, preset), or what the rule adds to one
            of PGD-AT (label and weight rules). A unit is one forward of a batch; a gradient with respect to
            images, or to weights, is one more.
        refusal: why it is refused with CutMix, "" where it is not.
        combination: a preset's label rule, objective and weight rule, else empty.
    """

    kind: str
    name: str
    summary: str
    source: str
    units: float
    refusal: str = ""
    combination: tuple[str, str, str] | tuple[()] = ()


def weight_name(rule: WeightRule) -> str:
    """``AWP + EMA`` where one weight rule holds another."""
    inner = getattr(rule, "average", None)
    own = type(rule).__name__
    return own if inner is None or type(inner).__name__ == "Plain" else f"{own} + {weight_name(inner)}"


def units(label: LabelRule, objective: Objective, weight: WeightRule, steps: int = STEPS) -> float:
    """Forward units of a training step, in the dearest phase of the rules.

    Args:
        label, objective, weight: the rules, set up or not.
        steps: of the configured attack.
    """
    further = (weight.passes - 1) * 3 * objective.forwards * objective.views
    return objective.units(steps) + _clean(label, objective) + label.extra_units + further


def _clean(label: LabelRule, objective: Objective) -> int:
    """The clean forward that a label rule asks for and the objective has not made anyway."""
    probe = torch.zeros(objective.views, 1, 1, 2)

    def net(image: Tensor) -> Tensor:
        return image.flatten(1)

    made = objective.predict(net, probe, probe).clean is not None
    return 0 if made or not label.asks_clean else 1


def catalog() -> list[Method]:
    """Every public rule, in the order of their names, and every shipped preset.

    Raises:
        SettingError: a rule that cannot be made without arguments.
    """
    found = []
    for kind in RULES:
        for name, rule in RULES[kind].items():
            made = _with_defaults(rule)
            refusal = mixing_refusal(made) or ""
            summary = _summary(flat_hints()[kind], made)
            found.append(Method(kind, name, summary, made.source, _own_units(made), refusal))
    return [*found, *map(_preset, packaged("preset"))]


def _with_defaults(rule: type) -> Any:
    try:
        return rule()
    except TypeError as error:
        raise SettingError(
            rule.__name__, f"no object of it ({error})", "a default for every argument"
        ) from error


def _own_units(rule: LabelRule | Objective | WeightRule) -> float:
    if isinstance(rule, Objective):
        return rule.units(STEPS)
    label = rule if isinstance(rule, LabelRule) else Hard()
    weight = rule if isinstance(rule, WeightRule) else Plain()
    return units(label, PGDAT(), weight) - PGDAT().units(STEPS)


def _summary(base: type, rule: object) -> str:
    """The docstring's first sentence, without its mark-up."""
    paragraph = (type(rule).__doc__ or base.__doc__ or "").strip().split("\n\n")[0]
    return _sentence(re.sub(r":class:|`", "", paragraph))


def _preset(name: str) -> Method:
    experiment = resolve(["--preset", name])
    combination = combined(experiment)
    recipe = experiment.recipe
    cost = units(*recipe.rules)
    source = "" if name in OURS else BY.get(name) or PUBLISHED.get(combination, "")
    return Method("preset", name, _comment(name), source, cost, combination=combination)


def combined(experiment: Experiment) -> tuple[str, str, str]:
    """Names of an experiment's label rule, objective and weight rule."""
    recipe = experiment.recipe
    return type(recipe.label).__name__, type(recipe.objective).__name__, weight_name(recipe.weight)


def _comment(preset: str) -> str:
    """The first sentence of a preset file's opening comment."""
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), packaged("preset")[preset].read_text().splitlines()
    )
    return _sentence(" ".join(line.lstrip("# ") for line in lines))


def _sentence(text: str) -> str:
    """The first, up to its own full stop: not that of "et al."."""
    return re.split(r"(?<! al)\.(?= )", " ".join(text.split()))[0].rstrip(".")


def table(methods: Sequence[Method], *, markdown: bool = False) -> str:
    """The catalog and the grid as text, for a terminal or for Markdown."""
    parts = [
        _section("Label rules: which label do we believe?", methods, "label", markdown),
        _section("Objectives: what do we minimise?", methods, "objective", markdown),
        _section("Weight rules: at which weights?", methods, "weight", markdown),
        _section("Presets", methods, "preset", markdown),
        _grid(markdown),
    ]
    return "\n\n".join([_PREFACE, *parts] if markdown else parts)


_PREFACE = """# Methods
Made by `softdefend methods --markdown true`; a test compares the two. A preset is used with `--preset NAME`;
the cards in [methods/](methods/) say what each rule does and where paper, published code and this one part.

Costs are forward units of one training step with PGD-10, in the dearest phase, counted in a test: a forward
of a batch is one unit, a gradient with respect to images, or to weights, one more. Label and weight rules
show what they add to PGD-AT."""


def _section(title: str, methods: Iterable[Method], kind: str, markdown: bool) -> str:
    chosen = [method for method in methods if method.kind == kind]
    if kind == "preset":
        header = ["preset", "label x objective x weight", "units", "published by", "what it is"]
        rows = [
            [m.name, " x ".join(m.combination), f"{m.units:g}", m.source or "–", m.summary] for m in chosen
        ]
    else:
        more = "units" if kind == "objective" else "units more"
        header = ["rule", more, "with CutMix", "source", "what it is"]
        rows = [
            [m.name, f"{m.units:g}", "refused" if m.refusal else "yes", m.source or "–", m.summary]
            for m in chosen
        ]
    return (
        f"{'## ' if markdown else ''}{title}\n" + ("\n" if markdown else "") + _lines(header, rows, markdown)
    )


def _grid(markdown: bool) -> str:
    """Label rules by objectives; a cell names the weight rules it was published with."""
    labels, objectives = RULES["label"].names(), RULES["objective"].names()
    rows = []
    for label in labels:
        cells = [label]
        for objective in objectives:
            with_weights = [w for (a, b, w) in PUBLISHED if (a, b) == (label, objective)]
            cells.append(", ".join(with_weights) or "possible")
        rows.append(cells)
    title = "Combinations: published with these weight rules, or possible"
    note = (
        "Every combination of a label rule, an objective and a weight rule trains. With augment.cutmix those "
        "that hold a refused rule are refused: what these do for an image and its one label has no meaning "
        "for a mixture of two, and two views of one image would be mixtures of different labels."
    )
    body = _lines(["", *objectives], rows, markdown)
    return f"{'## ' if markdown else ''}{title}\n" + ("\n" if markdown else "") + f"{body}\n\n{note}"


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    if markdown:
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines = [header, ["---"] * len(header), *escaped]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in [header, *rows]
    )
