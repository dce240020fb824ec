"""The parts of a page about how a network fails: attack by attack, class by class, image by image.

Each shows, of every recipe, the first run that has what it is about, at the best checkpoint where there is
one. Each returns nothing where no run has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softdefend.evaluation.table import Table, after_each
from softdefend.report.blocks import Report, figures, number, paragraph, picture, swatched, titled
from softdefend.report.details import Details, Gallery, is_number
from softdefend.report.figures import MOST_CLASSES, confusion_plot, steps_plot
from softdefend.report.markup import Html, details, join, row, scrolling_table, tag
from softdefend.report.runs import CHECKPOINTS, RunRecord
from softdefend.report.tables import ABSENT, attack_label

_MOST_PAIRS = 20
_MOST_PICTURES = 48


@dataclass(frozen=True)
class _Shown:
    """A checkpoint that stands for its recipe."""

    recipe: str
    run: RunRecord
    which: str
    details: Details

    @property
    def evaluation(self) -> dict[str, Any]:
        return self.run.evaluations[self.which]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a number where a file gives none."""
        table, gallery, examples = self.details.table, self.details.gallery, self.run.examples
        named = gallery.classes if gallery else examples.classes if examples else ()
        most = 0
        if table is not None and len(table.label):
            most = 1 + max(int(table.label.max()), int(table.worst_prediction.max()))
        return (*named, *(str(i) for i in range(len(named), most)))


def _with(report: Report, has: Callable[[Details], Any]) -> list[_Shown]:
    """One checkpoint of each recipe that has something."""
    found = []
    for group in report.groups:
        candidates = (
            _Shown(group.label, run, which, run.details[which])
            for run in group.runs
            for which in CHECKPOINTS
            if which in run.details and has(run.details[which])
        )
        found += [shown for shown in [next(candidates, None)] if shown]
    return found


def _heading(report: Report, shown: _Shown) -> Html:
    where = f", {shown.which} checkpoint, seed {shown.run.seed}" if shown.run.metrics else ""
    return tag("h3", join(swatched(report, shown.recipe), where))


def after_each_attack(report: Report) -> Html:
    """What is left after each attack, one upon the other; for evaluations with two attacks or more."""
    plots = []
    for shown in _with(report, lambda one: one.table and one.table.attacks):
        steps = after_each(shown.evaluation, shown.details.table)
        if len(steps) > 2:
            named = [(name if name == "clean" else attack_label(name), count) for name, count, _ in steps]
            title = f"{shown.recipe}, {shown.which} checkpoint" if shown.run.metrics else shown.recipe
            n = int(shown.evaluation["n"])
            plots.append(steps_plot(title, named, n, report.color[shown.recipe]))
    if not plots:
        return Html("")
    note = "Images that are still right after each attack and all before it; hatched: what this attack took."
    return titled("Accuracy after each attack", figures(plots), paragraph(note))


def confusion(report: Report) -> Html:
    """The confusion matrix in the worst case; of many classes the most frequent confusions."""
    found = _with(report, lambda one: one.table and one.table.attacks)
    if not found:
        return Html("")
    plots, tables = [], []
    for shown in found:
        assert shown.details.table is not None
        classes = shown.classes
        counts = confusion_counts(shown.details.table, len(classes))
        if len(classes) <= MOST_CLASSES:
            title = f"{shown.recipe}, {shown.which} checkpoint" if shown.run.metrics else shown.recipe
            plots.append(confusion_plot(title, counts, classes, report.color[shown.recipe]))
        tables.append(join(_heading(report, shown), _pairs_table(shown.recipe, counts, classes)))
    note = (
        "In the worst case: the wrong class of the clean image, else what the first attack that succeeded "
        "made of it. Shares are of each true class."
    )
    return titled(
        "What is taken for what under attack",
        figures(plots),
        paragraph(note),
        details("The most frequent confusions", *tables),
    )


def confusion_counts(table: Table, k: int) -> NDArray[np.int64]:
    """Images by label (row) and prediction in the worst case (column), [k, k]."""
    counts = np.zeros((k, k), np.int64)
    np.add.at(counts, (table.label, table.worst_prediction), 1)
    return counts


def _pairs_table(recipe: str, counts: NDArray[np.int64], classes: tuple[str, ...]) -> Html:
    wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))
    share = wrong / counts.sum(1, keepdims=True).clip(1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [divmod(int(place), len(wrong)) for place in order]
    body = [
        row(
            "td",
            classes[i],
            classes[j],
            number(int(wrong[i, j])),
            f"{100 * share[i, j]:.1f}",
        )
        for i, j in pairs
        if wrong[i, j]
    ]
    head = row("th", "true class", "taken for", "images", "of the class, %")
    return scrolling_table(f"Most frequent confusions of {recipe}", head, body)


def audits(report: Report) -> Html:
    """The findings of the audit for gradient masking: what is suspicious openly, all checks folded away."""
    blocks = []
    for shown in _with(report, lambda one: one.audit):
        found = shown.details.audit or {}
        every = found["findings"]
        caught = [finding for finding in every if finding.get("verdict") == "suspicious"]
        parts = [_heading(report, shown), tag("p", str(found.get("summary", "")))]
        if caught:
            parts.append(_findings(f"What the audit of {shown.recipe} found", caught))
        parts.append(details(f"All {len(every)} checks", _findings(f"Audit of {shown.recipe}", every)))
        blocks.append(join(*parts))
    return titled("Can the gradient be trusted?", *blocks) if blocks else Html("")


def _findings(caption: str, findings: list[dict[str, Any]]) -> Html:
    head = row("th", "check", "verdict", "figure", "suspicious if", "what it says", "source")
    return scrolling_table(caption, head, [_finding(finding) for finding in findings])


def _finding(finding: dict[str, Any]) -> Html:
    figure, verdict = finding.get("figure"), str(finding.get("verdict", ABSENT))
    mark = {"fine": ("✓ fine", "correct"), "suspicious": ("✗ suspicious", "wrong")}.get(verdict)
    return tag(
        "tr",
        tag("th", finding["check"], scope="row"),
        tag("td", tag("span", mark[0], class_=mark[1]) if mark else verdict),
        tag("td", f"{figure:.3g}" if is_number(figure) else ABSENT),
        tag("td", str(finding.get("threshold", ABSENT))),
        tag("td", str(finding.get("explanation", "")), class_="words"),
        tag("td", str(finding.get("reference", "")), class_="words"),
    )


def transfers(report: Report) -> Html:
    """Accuracy on images made on other networks."""
    body = [
        row(
            "td",
            shown.recipe,
            name,
            f"{100 * rate['rate']:.2f}",
            f"{100 * shown.evaluation['worst']['rate']:.2f}" if shown.evaluation.get("worst") else ABSENT,
        )
        for shown in _with(report, lambda one: one.transfer)
        for name, rate in (shown.details.transfer or {})["attacks"].items()
    ]
    if not body:
        return Html("")
    head = row("th", "recipe", "attack on another network", "accuracy, %", "its own attacks, %")
    note = (
        "The surrogate's images, judged on the evaluated network. Where they do more harm than attacks on "
        "the network itself, those are too weak."
    )
    return titled("Transfer attacks", scrolling_table("Transfer attacks", head, body), paragraph(note))


def corruptions(report: Report) -> Html:
    """Accuracy by corruption and severity, shaded."""
    found = _with(report, lambda one: one.corruptions)
    if not found:
        return Html("")
    means = ", ".join(f"{s.recipe} {100 * (s.details.corruptions or {})['mean']:.1f}%" for s in found)
    blocks = [_corruption_block(report, shown) for shown in found]
    note = (
        f"Mean over corruptions and severities: {means}. A plain mean of accuracies, after CIFAR-10-C "
        "(arXiv 1903.12261) and computed anew; not divided by AlexNet's errors, so no leaderboard's mCE. "
        "Darker cells lost more of the clean accuracy."
    )
    return titled("Accuracy under common corruptions", *blocks, paragraph(note))


def _corruption_block(report: Report, shown: _Shown) -> Html:
    content = shown.details.corruptions or {}
    severities = max((len(line["severities"]) for line in content["corruptions"].values()), default=0)
    clean = (content.get("clean") or {}).get("rate")
    head = row("th", "corruption", *(f"severity {i + 1}" for i in range(severities)), "mean")
    body = [
        tag(
            "tr",
            tag("th", name.replace("_", " "), scope="row"),
            *(_shaded(rate["rate"], clean) for rate in line["severities"]),
            _shaded(line["mean"], clean),
        )
        for name, line in content["corruptions"].items()
    ]
    caption = f"Accuracy of {shown.recipe} under corruptions, %"
    words = f"Clean: {100 * clean:.1f}% of {number(content.get('n'))} images." if is_number(clean) else ""
    return join(_heading(report, shown), paragraph(words), scrolling_table(caption, head, body))


def _shaded(rate: float, clean: Any) -> Html:
    """A cell that is the darker the larger the share of the clean accuracy is that was lost."""
    lost = 1 - rate / clean if is_number(clean) and clean else 0.0
    return tag("td", f"{100 * rate:.1f}", class_="shade", style=f"--share:{round(80 * min(max(lost, 0), 1))}")


def galleries(report: Report) -> Html:
    """The images that are lost first and those that withstand most."""
    found = _with(report, lambda one: one.gallery and len(one.gallery.label))
    each = max(2, min(8, _MOST_PICTURES // max(1, 2 * len(found))))
    blocks = [_gallery_block(report, shown, each) for shown in found]
    if not blocks:
        return Html("")
    note = (
        "Of the images that are right without an attack: hard ones fall to the most attacks, at the shortest "
        "distance, with the smallest margin before; easy ones are the other end of the same order."
    )
    return titled("Hardest and easiest images", *blocks, paragraph(note))


def _gallery_block(report: Report, shown: _Shown, each: int) -> Html:
    assert shown.details.gallery is not None
    gallery = shown.details.gallery
    hard = [i for i in range(len(gallery.label)) if gallery.hard[i]][:each]
    easy = [i for i in reversed(range(len(gallery.label))) if not gallery.hard[i]][:each]
    return join(
        _heading(report, shown),
        paragraph("Hardest"),
        tag("div", *(_card(gallery, i) for i in hard), class_="gallery"),
        paragraph("Easiest"),
        tag("div", *(_card(gallery, i) for i in easy), class_="gallery"),
    )


def _card(gallery: Gallery, i: int) -> Html:
    truth, said = (_name(gallery, int(one[i])) for one in (gallery.label, gallery.prediction))
    kept = int(gallery.label[i]) == int(gallery.prediction[i])
    word, mark, kind = ("stays", "✓", "correct") if kept else ("becomes", "✗", "wrong")
    outcome = f"{mark} stays" if kept else f"{mark} becomes {said}"
    distance = "" if kept else f" at {gallery.distance[i]:.3g}"
    survived = f"withstands {int(gallery.survived[i])} of {gallery.attacks}{distance}"
    alt = f"test image {int(gallery.index[i])} of class {truth}, which {word} {'' if kept else said}".rstrip()
    return picture(gallery.image[i], alt, tag("b", truth), tag("span", outcome, class_=kind), survived)


def _name(gallery: Gallery, i: int) -> str:
    return gallery.classes[i] if 0 <= i < len(gallery.classes) else str(i)
