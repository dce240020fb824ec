"""The comparison every report starts with: best, last and their difference, by recipe over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softdefend.report.details import is_number
from softdefend.report.runs import RunRecord, group_runs

DEFAULT_ATTACK = "pgd-20"

ABSENT = "–"

_SPELLED = {"autoattack": "AutoAttack", "square": "Square", "worst": "worst of all", "apgd-t": "APGD-T"}


@dataclass(frozen=True)
class Estimate:
    """One number of a table, in [0, 1] (a difference: in [-1, 1]).

    Attributes:
        mean: over the runs that have the number.
        std: sample standard deviation (n - 1) over these runs; None for a single run.
        n: how many runs have the number.
        interval: the evaluation's own (low, high), for a single run; None otherwise.
    """

    mean: float
    std: float | None
    n: int
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Triple:
    """The best and the last checkpoint, and best minus last over the runs that have both."""

    best: Estimate | None
    last: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class Row:
    """One recipe: its distinct seeds, its number of runs, and accuracy on clean and attacked images."""

    recipe: str
    seeds: tuple[int, ...]
    runs: int
    attack: str
    clean: Triple
    robust: Triple


def comparison_rows(runs: Sequence[RunRecord], attack: str | None = None) -> list[Row]:
    """One row for each recipe, in the order of first appearance.

    Args:
        runs: the runs to compare.
        attack: which attack of the evaluations, or ``"worst"`` for the worst of all; by default PGD-20,
            or the first attack there is where no run has been attacked with PGD-20.
    """
    attack = default_attack(runs) if attack is None else attack
    return [
        Row(
            recipe=group.label,
            seeds=group.seeds,
            runs=len(group.runs),
            attack=attack,
            clean=_triple(group.runs, "clean"),
            robust=_triple(group.runs, attack),
        )
        for group in group_runs(runs)
    ]


def default_attack(runs: Sequence[RunRecord]) -> str:
    """PGD-20 where some run has it, else the first attack of any evaluation."""
    names = [name for run in runs for result in run.evaluations.values() for name in result["attacks"]]
    return DEFAULT_ATTACK if DEFAULT_ATTACK in names or not names else names[0]


def attack_label(name: str) -> str:
    """``pgd-20`` as people write it: PGD-20."""
    return _SPELLED.get(name, name.upper() if name.islower() else name)


def result(run: RunRecord, which: str, measure: str) -> dict[str, Any] | None:
    """The object with ``rate``, ``low``, ``high`` of a checkpoint for "clean", "worst" or an attack."""
    evaluation = run.evaluations.get(which)
    if evaluation is None:
        return None
    results = evaluation if measure in ("clean", "worst") else evaluation["attacks"]
    rate: dict[str, Any] | None = results.get(measure)
    return rate


def estimate(values: Sequence[float], interval: tuple[float, float] | None = None) -> Estimate | None:
    """Mean and sample standard deviation; None for no values. The interval is that of a single value."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], None, 1, interval)
    return Estimate(statistics.fmean(values), statistics.stdev(values), len(values))


def _triple(runs: Sequence[RunRecord], measure: str) -> Triple:
    best, last = ([result(run, which, measure) for run in runs] for which in ("best", "last"))
    comparable = [_conditions(run, "best") == _conditions(run, "last") for run in runs]
    both = [
        one["rate"] - other["rate"]
        for one, other, same in zip(best, last, comparable, strict=True)
        if one and other and same
    ]
    return Triple(_estimate(best), _estimate(last), estimate(both))


def _conditions(run: RunRecord, which: str) -> list[Any]:
    """What accuracies must share to be subtracted from each other: the images, and how they were attacked."""
    evaluation = run.evaluations.get(which, {})
    settings = evaluation.get("settings") or {}
    names = ("norm", "eps", "seed", "precision", "batch_size")
    part = None if settings.get("size") is None else settings.get("subset")
    return [evaluation.get("n"), part, *(settings.get(name) for name in names)]


def _estimate(results: Sequence[dict[str, Any] | None]) -> Estimate | None:
    present = [result for result in results if result]
    low, high = (present[0].get("low"), present[0].get("high")) if present else (None, None)
    interval = (low, high) if is_number(low) and is_number(high) else None
    return estimate([result["rate"] for result in present], interval)


def number_text(value: Any) -> str:
    """A count or measure from a file as text; a dash where it is none."""
    if not is_number(value):
        return ABSENT
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def percent(value: Estimate | None, *, signed: bool = False) -> str:
    """``54.33 ± 0.21`` in per cent (or points, with a sign, for a difference); a dash where absent."""
    if value is None:
        return ABSENT
    spread = "" if value.std is None else f" ± {100 * value.std:.2f}"
    mean = round(100 * value.mean, 2) + 0.0  # without the sign of a negative zero
    return (f"{mean:+.2f}" if signed else f"{mean:.2f}") + spread


def seeds_text(row: Row) -> str:
    """How many seeds; with the number of runs where a seed was run more than once."""
    count = str(len(row.seeds))
    return count if row.runs == len(row.seeds) else f"{count} ({row.runs} runs)"


def cells(row: Row) -> list[str]:
    """The six numbers of a row as text: clean best, last, difference, then the same under the attack."""
    return [
        text
        for triple in (row.clean, row.robust)
        for text in (percent(triple.best), percent(triple.last), percent(triple.difference, signed=True))
    ]


def text_table(rows: Sequence[Row]) -> str:
    """Aligned plain text for a terminal; accuracies in per cent, ± is the standard deviation over seeds."""
    names = ["recipe", "seeds", *["best", "last", "diff"] * 2]
    table = [names, *([row.recipe, seeds_text(row), *cells(row)] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    groups = ["clean %", f"{attack_label(rows[0].attack)} %" if rows else "robust %"]
    spans = [sum(widths[start : start + 3]) + 4 for start in (2, 5)]
    widths[4] += max(0, len(groups[0]) - spans[0])
    widths[7] += max(0, len(groups[1]) - spans[1])
    spans = [sum(widths[start : start + 3]) + 4 for start in (2, 5)]
    head = " " * (widths[0] + widths[1] + 2) + "".join(
        f" | {name:<{span}}" for name, span in zip(groups, spans, strict=True)
    )
    lines = [head, *(_line(line, widths) for line in table)]
    lines.insert(2, "-" * max(len(line) for line in lines))
    return "\n".join(line.rstrip() for line in lines)


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    padded = [f"{texts[0]:<{widths[0]}}", *(f"{t:>{w}}" for t, w in zip(texts[1:], widths[1:], strict=True))]
    return " | ".join(["  ".join(padded[0:2]), "  ".join(padded[2:5]), "  ".join(padded[5:8])])


def markdown_table(rows: Sequence[Row]) -> str:
    """The same table as GitHub-flavoured Markdown."""
    attack = attack_label(rows[0].attack) if rows else "robust"
    head = ["recipe", "seeds"]
    head += [f"{measure} {column}" for measure in ("clean", attack) for column in ("best", "last", "diff")]
    lines = [head, ["---", *["--:"] * 7]]
    lines += [[_markdown(row.recipe), seeds_text(row), *cells(row)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
