"""The sections of a run report; where the runs have nothing for one, None or a section with a short note."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from softdefend.report.comparison import Comparison
from softdefend.report.content import (
    LINE_BREAK,
    Block,
    Cell,
    Code,
    Example,
    Examples,
    Folded,
    Heading,
    Paragraph,
    Picture,
    Section,
    Table,
    Text,
    figures,
)
from softdefend.report.curves import first_with
from softdefend.report.details import is_number
from softdefend.report.figures import Plot, Series, class_means, class_plot, epoch_plot, eps_plot
from softdefend.report.runs import CHECKPOINTS, OUTSIDE, ExampleImages, RunRecord
from softdefend.report.tables import (
    ABSENT,
    Estimate,
    Row,
    attack_label,
    number_text,
    percent,
    seeds_text,
)

# more lines than this in one figure cannot be told apart: then training and test, best and last get their own
_MOST_TOGETHER = 3

# 24 examples of 3 pictures with noise in them are about one megabyte
_MOST_EXAMPLES = 24

_COUNTED_ON = {
    "test_robust": "test images",
    "val_robust": "validation images",
    "test_clean": "test images",
    "val_clean": "validation images",
    "train_robust": "training images",
    "train_clean": "training images",
}


def comparison_table(comparison: Comparison) -> Section:
    """The table of best, last and difference."""
    title = "Best, last and their difference"
    evaluated = [row for row in comparison.rows if row.clean.best or row.clean.last]
    if not evaluated:
        return Section(title, [Paragraph("No checkpoint has been evaluated yet.")])
    attack = attack_label(comparison.rows[0].attack)
    table = Table(
        "Accuracy of the best and of the last checkpoint",
        ["best", "last", "best − last"] * 2,
        [_comparison_row(comparison, row) for row in comparison.rows],
        groups=[
            Cell("recipe", rows=2),
            Cell("seeds", rows=2),
            Cell("clean accuracy, %", columns=3),
            Cell(f"accuracy under {attack}, %", columns=3),
        ],
    )
    return Section(title, [table, Paragraph(_legend(comparison, evaluated))])


def _comparison_row(comparison: Comparison, row: Row) -> list[str | Cell]:
    numbers = [
        cell
        for triple in (row.clean, row.robust)
        for cell in (
            _estimate_cell(triple.best),
            _estimate_cell(triple.last),
            _estimate_cell(triple.difference, signed=True),
        )
    ]
    return [comparison.name_cell(row.recipe), seeds_text(row), *numbers]


def _estimate_cell(estimate: Estimate | None, *, signed: bool = False) -> Cell:
    text = percent(estimate, signed=signed).replace("-", "−")
    if estimate is None or estimate.interval is None:
        return Cell(text)
    low, high = (f"{100 * end:.2f}" for end in estimate.interval)
    return Cell(text, small=f"[{low}, {high}]")


def _legend(comparison: Comparison, rows: Sequence[Row]) -> str:
    evaluations = [evaluation for run in comparison.runs for evaluation in run.evaluations.values()]
    counted = {f"{number_text(e.get('n'))} {e.get('split', '')} images" for e in evaluations}
    present = [one for r in rows for t in (r.clean, r.robust) for one in (t.best, t.last) if one]
    spread = (
        "± is the standard deviation over runs (n − 1). "
        if any(one.std is not None for one in present)
        else ""
    )
    names = sorted({str(e["interval"]) for e in evaluations if e.get("interval")})
    bracket = (
        f"Brackets: interval ({', '.join(names)}). " if names and any(c.interval for c in present) else ""
    )
    precisions = sorted({str(e["precision"]) for e in evaluations if e.get("precision")})
    searched = f"Precision of the attacks' searches: {', '.join(precisions)}. " if precisions else ""
    outside = any(OUTSIDE in run.config for run in comparison.runs)
    only = " Networks that were not trained here have one checkpoint, shown as last." if outside else ""
    best = "Best: the checkpoint that was selected during training."
    return f"Counted on {' and '.join(sorted(counted))}. {spread}{bracket}{searched}{best}{only}"


def learning_curves(comparison: Comparison) -> Section | None:
    """Robust and clean accuracy, loss and target entropy by epoch."""
    title, groups, color = "Learning curves", comparison.groups, comparison.color
    robust = first_with(groups, ("test_robust", "val_robust"))
    clean = first_with(groups, ("test_clean", "val_clean"))
    drawn = figures(
        *_accuracy_plots(comparison, "Robust accuracy", [robust, "train_robust"]),
        *_accuracy_plots(comparison, "Clean accuracy", [clean, "train_clean"]),
        epoch_plot("Training loss", groups, color, [Series("loss", "")], ""),
        epoch_plot("Target entropy", groups, color, [Series("target_entropy", "")], "nats"),
    )
    if all(OUTSIDE in run.config for run in comparison.runs):
        return None
    if not drawn:
        return Section(title, [Paragraph("No epoch has been finished yet.")])
    notes = []
    if any(len(group.runs) > 1 for group in groups):
        notes.append("Lines are means over runs, bands reach from the lowest to the highest run.")
    if robust is None:
        notes.append("No robust accuracy on held-out images was recorded during training.")
    elif robust == "val_robust":
        notes.append("The test set was not monitored: the curves are of the validation images.")
    else:
        notes.append("Test images were monitored only; no checkpoint was selected on them.")
    if first_with(groups, ("train_robust",)):
        notes.append("Training accuracy is counted on the images of the training steps, as attacked there.")
    return Section(title, [*drawn, Paragraph(" ".join(notes)), *_hints(comparison)])


_HINTS = {
    "guessing": "stood at the accuracy of guessing in epoch {first}: the learning rate may start too high.",
    "stuck": "still stood at the accuracy of guessing in epoch {first}: probably for good.",
    "uniform": "trained towards nearly uniform labels in {count} of {epochs} epochs, first in epoch {first}: "
    "little is left for them to teach.",
    "catastrophic_overfitting": "withstood one attack step and not several (catastrophic overfitting) after "
    "{count} of {epochs} epochs, first after epoch {first}.",
}
"""The sentence for epochs that training has marked, by name of the mark."""


def _hints(comparison: Comparison) -> list[Block]:
    """A line for each mark that training has set in a run."""
    lines: list[Block] = []
    for run in comparison.runs:
        for name, sentence in _HINTS.items():
            marked = [row["epoch"] for row in run.metrics if _is_marked(row, name)]
            if marked:
                text = sentence.format(first=marked[0], count=len(marked), epochs=len(run.metrics))
                lines.append(Paragraph(f"Note: {run.name}, seed {run.seed}, {text}"))
    return lines


def _is_marked(row: Mapping[str, Any], name: str) -> bool:
    hints = row.get("hints")
    return row.get(name) is True or (isinstance(hints, list) and name in hints)


def _accuracy_plots(comparison: Comparison, title: str, columns: Sequence[str | None]) -> list[Plot | None]:
    groups, color = comparison.groups, comparison.color
    series = [Series(column, _COUNTED_ON[column]) for column in columns if column]
    if len(groups) <= _MOST_TOGETHER:
        return [epoch_plot(title, groups, color, series, "%")]
    return [
        epoch_plot(f"{title} on {one.label}", groups, color, [Series(one.column, "")], "%") for one in series
    ]


def eps_curves(comparison: Comparison) -> Section | None:
    """Robust accuracy against eps."""
    groups, color = comparison.groups, comparison.color
    if len(groups) <= _MOST_TOGETHER:
        plots = [eps_plot("Robust accuracy of the best and the last checkpoint", groups, color)]
    else:
        plots = [
            eps_plot(f"Robust accuracy of the {which} checkpoint", groups, color, [which])
            for which in CHECKPOINTS
        ]
    drawn = figures(*plots)
    if not drawn:
        return None
    evaluations = [evaluation for run in comparison.runs for evaluation in run.evaluations.values()]
    rows = [row for one in evaluations for row in one.get("eps_curve") or []]
    sizes = " or ".join(f"{n:,}" for n in sorted({row["n"] for row in rows if is_number(row.get("n"))}))
    note = (
        f"PGD-20 on the first {sizes} test images. " if sizes else "PGD-20. "
    ) + "Bands: the evaluation's interval for one run, lowest to highest run for several."
    return Section("Robust accuracy against ε", [*drawn, Paragraph(note)])


def accuracy_by_class(comparison: Comparison) -> Section | None:
    """Accuracy by class, of the best checkpoint where there is one."""
    groups, color = comparison.groups, comparison.color
    which = next((w for w in CHECKPOINTS if any(class_means(group, w) for group in groups)), None)
    if which is None:
        return None
    means = {group.label: class_means(group, which) for group in groups}
    means = {recipe: by_class for recipe, by_class in means.items() if by_class}
    plot = class_plot(f"Clean and robust accuracy of the {which} checkpoint", groups, color, which)
    names = list(dict.fromkeys(name for by_class in means.values() for name in by_class))
    table = Table(
        f"Accuracy by class, {which} checkpoint",
        ["clean, %", "robust, %"] * len(means),
        [[name, *(text for one in means.values() for text in _class_texts(one, name))] for name in names],
        groups=[Cell("class", rows=2), *(comparison.name_cell(recipe, columns=2) for recipe in means)],
    )
    return Section("Accuracy by class", [*figures(plot), Folded("The same as a table", [table])])


def _class_texts(means: dict[str, tuple[float, float]], name: str) -> list[str]:
    return [f"{100 * value:.1f}" for value in means[name]] if name in means else [ABSENT, ABSENT]


def example_images(comparison: Comparison) -> Section | None:
    """Images, magnified perturbations and adversarial images, with what the network made of them."""
    shown = [
        (group.label, run)
        for group in comparison.groups
        for run in [next((run for run in group.runs if run.examples), None)]
        if run
    ]
    if not shown:
        return None
    each = max(2, min(6, _MOST_EXAMPLES // len(shown)))
    blocks = [
        block
        for recipe, run in shown
        for block in (Heading(recipe, comparison.color[recipe]), *_example_blocks(run, each))
    ]
    return Section("Example images", blocks)


def _example_blocks(run: RunRecord, most: int) -> list[Block]:
    assert run.examples is not None
    images = run.examples
    largest = float(np.abs(images.adversarial - images.image).max(initial=0.0))
    factor = max(1, round(0.5 / largest)) if largest else 1
    note = (
        f"Seed {run.seed}, checkpoint {images.checkpoint}. The perturbation is magnified {factor} times "
        f"around gray; its largest change of a pixel is {largest:.4f} on the scale from 0 to 1."
    )
    shown = [_example(images, i, factor) for i in range(min(most, len(images.label)))]
    return [Paragraph(note), Examples(shown)]


def _example(images: ExampleImages, i: int, factor: int) -> Example:
    truth = _class_name(images, images.label[i])
    delta = 0.5 + factor * (images.adversarial[i] - images.image[i])
    alt = f"perturbation, magnified {factor} times"
    change = Picture(delta, alt, ["perturbation", LINE_BREAK, f"× {factor}"])
    clean = _predicted(
        images, i, "clean", images.image[i], images.clean_prediction[i], images.clean_confidence[i]
    )
    adversarial = _predicted(
        images,
        i,
        "adversarial",
        images.adversarial[i],
        images.adversarial_prediction[i],
        images.adversarial_confidence[i],
    )
    return Example("true class", truth, [clean, change, adversarial])


def _predicted(
    images: ExampleImages, i: int, name: str, image: Any, prediction: Any, confidence: Any
) -> Picture:
    """One image with the class that was predicted for it."""
    correct = prediction == images.label[i]
    caption: list[str | Text] = [
        name,
        LINE_BREAK,
        Text(_class_name(images, prediction), "bold"),
        f" {100 * float(confidence):.0f}%",
        Text("✓ correct", "correct") if correct else Text("✗ wrong", "wrong"),
    ]
    return Picture(image, f"{name} image of class {_class_name(images, images.label[i])}", caption)


def _class_name(images: ExampleImages, index: Any) -> str:
    i = int(index)
    return images.classes[i] if 0 <= i < len(images.classes) else str(i)


def run_details(comparison: Comparison) -> Section:
    """Every evaluation with its cost, and where the runs come from."""
    return Section("Details", [*_evaluations(comparison), _provenance(comparison)])


def _evaluations(comparison: Comparison) -> list[Block]:
    """Every count of every evaluation, with what the attack cost."""
    head = ["recipe", "seed", "checkpoint", "epoch", "attack", "still correct", "accuracy, %", "interval, %"]
    head += ["forward passes", "backward passes", "seconds"]
    body = [
        [group.label, str(run.seed), which, str(evaluation.get("epoch", ABSENT)), *texts]
        for group in comparison.groups
        for run in group.runs
        for which, evaluation in run.evaluations.items()
        for texts in _attack_texts(evaluation)
    ]
    title = "Every evaluation and its cost"
    return [Folded(title, [Table(title, head, body)])] if body else []


def _attack_texts(evaluation: dict[str, Any]) -> list[list[str]]:
    results = {"clean": evaluation["clean"], **evaluation["attacks"]}
    if evaluation["attacks"] and evaluation.get("worst"):
        results["worst"] = evaluation["worst"]
    return [
        [
            "none (clean)" if name == "clean" else attack_label(name),
            f"{number_text(result.get('count'))} of {number_text(result.get('n'))}",
            f"{100 * result['rate']:.2f}",
            _interval_text(result),
            *(number_text(result.get(cost)) for cost in ("forwards", "backwards", "seconds")),
        ]
        for name, result in results.items()
    ]


def _interval_text(result: dict[str, Any]) -> str:
    low, high = result.get("low"), result.get("high")
    return f"{100 * low:.2f} to {100 * high:.2f}" if is_number(low) and is_number(high) else ABSENT


def _provenance(comparison: Comparison) -> Block:
    """Runs, versions, commits, seeds, and every resolved configuration."""
    runs = [(group.label, run) for group in comparison.groups for run in group.runs]
    names = ("softdefend", "commit", "torch", "python", "device", "platform", "started")
    body = [
        [
            recipe,
            run.folder.name,
            str(run.seed),
            str(run.metrics[-1]["epoch"] if run.metrics else 0),
            _seconds_text(run),
            *(str(run.environment.get(name, ABSENT)) for name in names),
        ]
        for recipe, run in runs
    ]
    configurations = [
        Folded(
            f"{recipe}, seed {run.seed} ({run.folder.name})",
            [Code(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))],
        )
        for recipe, run in runs
    ]
    head = ["recipe", "run", "seed", "epochs", "seconds per epoch", *names]
    blocks: list[Block] = [Table("Runs", head, body), Heading("Configuration"), *configurations]
    return Folded("Runs, versions and full configuration", blocks)


def _seconds_text(run: RunRecord) -> str:
    seconds = [row["seconds"] for row in run.timing if is_number(row.get("seconds"))]
    return f"{sum(seconds) / len(seconds):.1f}" if seconds else ABSENT
