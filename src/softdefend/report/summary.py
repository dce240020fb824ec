"""A report's headline and summary, in words that are computed from the runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from softdefend.report.figures import norm_label
from softdefend.report.runs import Group, RunRecord, setting
from softdefend.report.tables import Estimate, Row, attack_label, result

_MOST_NAMED = 4


def data_name(run: RunRecord) -> str:
    """The name of the data: the evaluation's, else the configuration's."""
    named = (evaluation.get("name_of_data") for evaluation in run.evaluations.values())
    return str(next((name for name in named if name), None) or setting(run, "data.source") or "unknown data")


def threat(run: RunRecord) -> str:
    """The threat of the training, such as ``ℓ∞, ε = 8/255``."""
    return f"{norm_label(setting(run, 'threat.norm') or 'unknown norm')}, ε = {setting(run, 'threat.eps')}"


def heading(runs: Sequence[RunRecord]) -> str:
    """Data, threat and network; where the runs differ, all are named."""
    parts = [
        {data_name(run): None for run in runs},
        {threat(run): None for run in runs},
        {str(setting(run, "net.name") or "unknown network"): None for run in runs},
    ]
    return " · ".join(" and ".join(part) for part in parts)


def summary(groups: Sequence[Group], rows: Sequence[Row]) -> str:
    """Who is ahead at the last epoch, by how much, and how the best checkpoint compares with the last."""
    evaluated = [(group, row) for group, row in zip(groups, rows, strict=True) if row.robust.last]
    if not evaluated:
        return f"No last checkpoint has been evaluated yet. Epochs finished: {_progress(groups)}."
    sentences = [_lead(evaluated), _differences([row for _, row in evaluated])]
    if len(evaluated) < len(groups):
        waiting = [group for group, row in zip(groups, rows, strict=True) if not row.robust.last]
        sentences.append(f"Not evaluated yet; epochs finished: {_progress(waiting)}.")
    return " ".join(sentence for sentence in sentences if sentence)


def _mean(estimate: Estimate | None) -> float:
    return estimate.mean if estimate else float("-inf")


def _lead(evaluated: Sequence[tuple[Group, Row]]) -> str:
    ranked = sorted(evaluated, key=lambda pair: _mean(pair[1].robust.last), reverse=True)
    (group, first), attack = ranked[0], attack_label(ranked[0][1].attack)
    accuracy = f"{100 * _mean(first.robust.last):.2f}%{_over(first)}"
    trained = any(run.metrics for one, _ in evaluated for run in one.runs)
    when = "At the last epoch " if trained else ""
    if len(ranked) == 1:
        return f"{when}{first.recipe} keeps {accuracy} accuracy under {attack}."
    rival, second = ranked[1]
    gap = 100 * (_mean(first.robust.last) - _mean(second.robust.last))
    other = f"{100 * _mean(second.robust.last):.2f}%{_over(second)}"
    if gap < 0.005:
        names = f"{first.recipe} and {second.recipe}"
        return f"{when}{names} are level under {attack}: {accuracy} against {other}."
    lead = (
        f"{when}{first.recipe} has the highest accuracy under {attack}, {accuracy}; "
        f"{second.recipe} {'comes next with' if len(ranked) > 2 else 'has'} {other}, {gap:.2f} points less."
    )
    return f"{lead} {_certainty(group, rival, first, second)}".rstrip()


def _over(row: Row) -> str:
    n = row.robust.last.n if row.robust.last else 0
    return f" (mean of {n} runs)" if n > 1 else ""


def _certainty(group: Group, rival: Group, first: Row, second: Row) -> str:
    ours, theirs = (_last_by_seed(one, first.attack) for one in (group, rival))
    shared = sorted(set(ours) & set(theirs))
    if len(shared) > 1:
        ahead = sum(ours[seed] > theirs[seed] for seed in shared)
        return f"{first.recipe} is ahead on {ahead} of {len(shared)} seeds that both were run with."
    high = second.robust.last and second.robust.last.interval
    low = first.robust.last and first.robust.last.interval
    if not high or not low:
        return ""
    if high[1] < low[0]:
        return "Their confidence intervals do not overlap."
    return "Their confidence intervals overlap: with one run each this may be chance."


def _last_by_seed(group: Group, attack: str) -> dict[int, float]:
    rates: dict[int, list[float]] = {}
    for run in group.runs:
        last = result(run, "last", attack)
        if last:
            rates.setdefault(run.seed, []).append(last["rate"])
    return {seed: fmean(every) for seed, every in rates.items()}


def _differences(rows: Sequence[Row]) -> str:
    known = [(row.robust.difference.mean, row.recipe) for row in rows if row.robust.difference]
    if not known:
        return ""
    points = [f"{100 * difference:+.2f} points for {recipe}" for difference, recipe in known]
    if len(known) > _MOST_NAMED:
        points = [f"from {points[known.index(min(known))]} to {points[known.index(max(known))]}"]
    return f"Best minus last checkpoint under {attack_label(rows[0].attack)}: {', '.join(points)}."


def _progress(groups: Sequence[Group]) -> str:
    parts = []
    for group in groups:
        done = sorted({int(run.metrics[-1]["epoch"]) if run.metrics else 0 for run in group.runs})
        spread = f"{done[0]} to {done[-1]}" if len(done) > 1 else f"{done[0]}"
        planned = setting(group.runs[0], "optim.epochs")
        parts.append(f"{group.label} {spread}" + (f" of {planned}" if planned else ""))
    return ", ".join(parts)
