"""The parts of a report's page; each returns nothing, or a short note, where the runs do not have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from softdefend.report.blocks import Report, figures, number, paragraph, picture, swatched, titled
from softdefend.report.curves import first_with
from softdefend.report.details import is_number
from softdefend.report.figures import Plot, Series, class_means, class_plot, epoch_plot, eps_plot
from softdefend.report.markup import Html, details, join, row, scrolling_table, tag
from softdefend.report.runs import CHECKPOINTS, OUTSIDE, Examples, RunRecord
from softdefend.report.tables import ABSENT, Cell, Row, attack_label, percent, seeds_text

# more lines than this in one figure cannot be told apart: then training and test, best and last get their own
_MOST_TOGETHER = 3

# 24 examples of 3 pictures with noise in them are about one megabyte
_MOST_EXAMPLES = 24

_ON = {
    "test_robust": "test images",
    "val_robust": "validation images",
    "test_clean": "test images",
    "val_clean": "validation images",
    "train_robust": "training images",
    "train_clean": "training images",
}


def comparison(report: Report) -> Html:
    """The table of best, last and difference."""
    evaluated = [row for row in report.rows if row.clean.best or row.clean.last]
    if not evaluated:
        return titled("Best, last and their difference", paragraph("No checkpoint has been evaluated yet."))
    attack = attack_label(report.rows[0].attack)
    groups = tag(
        "tr",
        tag("th", "recipe", rowspan=2, scope="col"),
        tag("th", "seeds", rowspan=2, scope="col"),
        tag("th", "clean accuracy, %", colspan=3, scope="colgroup"),
        tag("th", f"accuracy under {attack}, %", colspan=3, scope="colgroup"),
    )
    columns = tag("tr", *(tag("th", name, scope="col") for name in ["best", "last", "best − last"] * 2))
    body = [
        tag(
            "tr",
            tag("th", swatched(report, line.recipe), scope="row"),
            tag("td", seeds_text(line)),
            *(
                tag("td", cell)
                for triple in (line.clean, line.robust)
                for cell in (
                    _number(triple.best),
                    _number(triple.last),
                    _number(triple.difference, signed=True),
                )
            ),
        )
        for line in report.rows
    ]
    return titled(
        "Best, last and their difference",
        scrolling_table("Accuracy of the best and of the last checkpoint", join(groups, columns), body),
        paragraph(_legend(report, evaluated)),
    )


def _number(cell: Cell | None, *, signed: bool = False) -> Html:
    text = join(percent(cell, signed=signed).replace("-", "−"))
    if cell is None or cell.interval is None:
        return text
    low, high = (f"{100 * end:.2f}" for end in cell.interval)
    return join(text, tag("small", f"[{low}, {high}]"))


def _legend(report: Report, rows: Sequence[Row]) -> str:
    evaluations = [e for group in report.groups for run in group.runs for e in run.evaluations.values()]
    sizes = " and ".join(sorted({f"{number(e.get('n'))} {e.get('split', '')} images" for e in evaluations}))
    present = [cell for r in rows for t in (r.clean, r.robust) for cell in (t.best, t.last) if cell]
    spread = (
        "± is the standard deviation over runs (n − 1). "
        if any(cell.std is not None for cell in present)
        else ""
    )
    names = sorted({str(e["interval"]) for e in evaluations if e.get("interval")})
    bracket = (
        f"Brackets: interval ({', '.join(names)}). " if names and any(c.interval for c in present) else ""
    )
    modes = sorted({str(e["precision"]) for e in evaluations if e.get("precision")})
    searched = f"Precision of the attacks' searches: {', '.join(modes)}. " if modes else ""
    outside = any(OUTSIDE in run.config for group in report.groups for run in group.runs)
    only = " Networks that were not trained here have one checkpoint, shown as last." if outside else ""
    best = "Best: the checkpoint that was selected during training."
    return f"Counted on {sizes}. {spread}{bracket}{searched}{best}{only}"


def learning_curves(report: Report) -> Html:
    """Robust and clean accuracy, loss and target entropy by epoch."""
    robust = first_with(report.groups, ("test_robust", "val_robust"))
    clean = first_with(report.groups, ("test_clean", "val_clean"))
    plots = [
        *_accuracy(report, "Robust accuracy", [robust, "train_robust"]),
        *_accuracy(report, "Clean accuracy", [clean, "train_clean"]),
        epoch_plot("Training loss", report.groups, report.color, [Series("loss", "")], ""),
        epoch_plot("Target entropy", report.groups, report.color, [Series("target_entropy", "")], "nats"),
    ]
    drawn = [plot for plot in plots if plot]
    if all(OUTSIDE in run.config for group in report.groups for run in group.runs):
        return Html("")
    if not drawn:
        return titled("Learning curves", paragraph("No epoch has been finished yet."))
    several = any(len(group.runs) > 1 for group in report.groups)
    notes = ["Lines are means over runs, bands reach from the lowest to the highest run."] if several else []
    if robust is None:
        notes.append("No robust accuracy on held-out images was recorded during training.")
    elif robust == "val_robust":
        notes.append("The test set was not monitored: the curves are of the validation images.")
    else:
        notes.append("Test images were monitored only; no checkpoint was selected on them.")
    if first_with(report.groups, ("train_robust",)):
        notes.append("Training accuracy is counted on the images of the training steps, as attacked there.")
    return titled("Learning curves", figures(drawn), paragraph(" ".join(notes)), *_remarks(report))


_REMARKS = {
    "guessing": "stood at the accuracy of guessing in epoch {first}: the learning rate may start too high.",
    "stuck": "still stood at the accuracy of guessing in epoch {first}: probably for good.",
    "uniform": "trained towards nearly uniform labels in {count} of {epochs} epochs, first in epoch {first}: "
    "little is left for them to teach.",
    "catastrophic_overfitting": "withstood one attack step and not several (catastrophic overfitting) after "
    "{count} of {epochs} epochs, first after epoch {first}.",
}
"""What to say of epochs that training has marked, by name of the mark."""


def _remarks(report: Report) -> list[Html]:
    """A line for everything that training noted of a run."""
    found = []
    for run in (run for group in report.groups for run in group.runs):
        for name, text in _REMARKS.items():
            marked = [line["epoch"] for line in run.metrics if _marked(line, name)]
            if marked:
                said = text.format(first=marked[0], count=len(marked), epochs=len(run.metrics))
                found.append(paragraph(f"Note: {run.name}, seed {run.seed}, {said}"))
    return found


def _marked(line: Mapping[str, Any], name: str) -> bool:
    hints = line.get("hints")
    return line.get(name) is True or (isinstance(hints, list) and name in hints)


def _accuracy(report: Report, title: str, columns: Sequence[str | None]) -> list[Plot | None]:
    series = [Series(column, _ON[column]) for column in columns if column]
    if len(report.groups) <= _MOST_TOGETHER:
        return [epoch_plot(title, report.groups, report.color, series, "%")]
    return [
        epoch_plot(f"{title} on {one.label}", report.groups, report.color, [Series(one.column, "")], "%")
        for one in series
    ]


def eps_curves(report: Report) -> Html:
    """Robust accuracy against eps."""
    if len(report.groups) <= _MOST_TOGETHER:
        both = "Robust accuracy of the best and the last checkpoint"
        plots = [eps_plot(both, report.groups, report.color)]
    else:
        plots = [
            eps_plot(f"Robust accuracy of the {which} checkpoint", report.groups, report.color, [which])
            for which in CHECKPOINTS
        ]
    drawn = [plot for plot in plots if plot]
    if not drawn:
        return Html("")
    evaluations = [one for group in report.groups for run in group.runs for one in run.evaluations.values()]
    rows = [row for one in evaluations for row in one.get("eps_curve") or []]
    sizes = " or ".join(f"{n:,}" for n in sorted({row["n"] for row in rows if is_number(row.get("n"))}))
    note = (
        f"PGD-20 on the first {sizes} test images. " if sizes else "PGD-20. "
    ) + "Bands: the evaluation's interval for one run, lowest to highest run for several."
    return titled("Robust accuracy against ε", figures(drawn), paragraph(note))


def classes(report: Report) -> Html:
    """Accuracy by class, of the best checkpoint where there is one."""
    which = next((w for w in CHECKPOINTS if any(class_means(group, w) for group in report.groups)), None)
    if which is None:
        return Html("")
    tables = {group.label: class_means(group, which) for group in report.groups}
    tables = {label: table for label, table in tables.items() if table}
    plot = class_plot(
        f"Clean and robust accuracy of the {which} checkpoint", report.groups, report.color, which
    )
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    head = join(
        tag(
            "tr",
            tag("th", "class", rowspan=2, scope="col"),
            *(tag("th", swatched(report, label), colspan=2, scope="colgroup") for label in tables),
        ),
        row("th", *["clean, %", "robust, %"] * len(tables)),
    )
    body = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", text) for t in tables.values() for text in _pair(t, name)),
        )
        for name in names
    ]
    table = scrolling_table(f"Accuracy by class, {which} checkpoint", head, body)
    return titled("Accuracy by class", figures([plot] if plot else []), details("The same as a table", table))


def _pair(table: dict[str, tuple[float, float]], name: str) -> list[str]:
    return [f"{100 * value:.1f}" for value in table[name]] if name in table else [ABSENT, ABSENT]


def examples(report: Report) -> Html:
    """Images, magnified perturbations and adversarial images, with what the network made of them."""
    found = [
        (group.label, run)
        for group in report.groups
        for run in [next((run for run in group.runs if run.examples), None)]
        if run
    ]
    each = max(2, min(6, _MOST_EXAMPLES // max(1, len(found))))
    parts = [_example_block(report, label, run, each) for label, run in found]
    return titled("Example images", *parts) if parts else Html("")


def _example_block(report: Report, label: str, run: RunRecord, most: int) -> Html:
    assert run.examples is not None
    shown = run.examples
    largest = float(np.abs(shown.adversarial - shown.image).max(initial=0.0))
    factor = max(1, round(0.5 / largest)) if largest else 1
    cards = [_example(shown, i, factor) for i in range(min(most, len(shown.label)))]
    note = (
        f"Seed {run.seed}. The perturbation is magnified {factor} times around gray; "
        f"its largest change of a pixel is {largest:.4f} on the scale from 0 to 1."
    )
    return join(tag("h3", swatched(report, label)), paragraph(note), tag("div", *cards, class_="examples"))


def _example(shown: Examples, i: int, factor: int) -> Html:
    truth = _class(shown, shown.label[i])
    delta = 0.5 + factor * (shown.adversarial[i] - shown.image[i])
    outcomes = [
        ("clean", shown.image[i], shown.clean_prediction[i], shown.clean_confidence[i]),
        (
            "adversarial",
            shown.adversarial[i],
            shown.adversarial_prediction[i],
            shown.adversarial_confidence[i],
        ),
    ]
    clean, adversarial = (
        picture(
            image,
            f"{name} image of class {truth}",
            join(name, tag("br"), tag("b", _class(shown, prediction)), f" {100 * float(confidence):.0f}%"),
            _verdict(prediction == shown.label[i]),
        )
        for name, image, prediction, confidence in outcomes
    )
    change = picture(
        delta, f"perturbation, magnified {factor} times", join("perturbation", tag("br"), f"× {factor}")
    )
    return tag("div", tag("p", "true class: ", tag("b", truth)), clean, change, adversarial, class_="example")


def _verdict(correct: bool) -> Html:
    word, mark = ("correct", "✓") if correct else ("wrong", "✗")
    return tag("span", f"{mark} {word}", class_=word)


def _class(shown: Examples, index: Any) -> str:
    i = int(index)
    return shown.classes[i] if 0 <= i < len(shown.classes) else str(i)


def attacks(report: Report) -> Html:
    """Every count of every evaluation, with what the attack cost."""
    names = ("recipe", "seed", "checkpoint", "epoch", "attack", "still correct", "accuracy, %", "interval, %")
    cost = ("forward passes", "backward passes", "seconds")
    body = [
        row("td", group.label, str(run.seed), which, str(evaluation.get("epoch", ABSENT)), *cells)
        for group in report.groups
        for run in group.runs
        for which, evaluation in run.evaluations.items()
        for cells in _attack_cells(evaluation)
    ]
    if not body:
        return Html("")
    table = scrolling_table("Every evaluation and its cost", row("th", *names, *cost), body)
    return details("Every evaluation and its cost", table)


def _attack_cells(evaluation: dict[str, Any]) -> list[list[str]]:
    results = {"clean": evaluation["clean"], **evaluation["attacks"]}
    if evaluation["attacks"] and evaluation.get("worst"):
        results["worst"] = evaluation["worst"]
    return [
        [
            "none (clean)" if name == "clean" else attack_label(name),
            f"{number(found.get('count'))} of {number(found.get('n'))}",
            f"{100 * found['rate']:.2f}",
            _interval(found),
            *(number(found.get(cost)) for cost in ("forwards", "backwards", "seconds")),
        ]
        for name, found in results.items()
    ]


def _interval(found: dict[str, Any]) -> str:
    low, high = found.get("low"), found.get("high")
    return f"{100 * low:.2f} to {100 * high:.2f}" if is_number(low) and is_number(high) else ABSENT


def provenance(report: Report) -> Html:
    """Runs, versions, commits, seeds, and every resolved configuration."""
    runs = [(group.label, run) for group in report.groups for run in group.runs]
    names = ("softdefend", "commit", "torch", "python", "device", "platform", "started")
    head = row("th", "recipe", "run", "seed", "epochs", "seconds per epoch", *names)
    body = [
        row(
            "td",
            label,
            run.folder.name,
            str(run.seed),
            str(run.metrics[-1]["epoch"] if run.metrics else 0),
            _seconds(run),
            *(str(run.environment.get(name, ABSENT)) for name in names),
        )
        for label, run in runs
    ]
    configs = [
        details(
            f"{label}, seed {run.seed} ({run.folder.name})",
            tag("pre", yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True), tabindex=0),
        )
        for label, run in runs
    ]
    return details(
        "Runs, versions and full configuration",
        scrolling_table("Runs", head, body),
        tag("h3", "Configuration"),
        *configs,
    )


def _seconds(run: RunRecord) -> str:
    seconds = [line["seconds"] for line in run.timing if is_number(line.get("seconds"))]
    return f"{sum(seconds) / len(seconds):.1f}" if seconds else ABSENT
