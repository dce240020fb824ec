"""The sections of a report about how a network fails: attack by attack, class by class, image by image.

Each shows, of every recipe, the first run that has what it is about, at the best checkpoint where there is
one. Each returns None where no run has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softdefend.evaluation.table import Table as PredictionTable
from softdefend.evaluation.table import after_each
from softdefend.evaluation.union import KeptEvaluation, of_same_images, rate_in_union
from softdefend.report.comparison import Comparison
from softdefend.report.content import (
    Block,
    Cell,
    Folded,
    Gallery,
    Heading,
    Paragraph,
    Picture,
    Section,
    Table,
    Text,
    figures,
)
from softdefend.report.curves import Line
from softdefend.report.details import Details, GalleryImages, is_number
from softdefend.report.figures import (
    MOST_CLASSES,
    confusion_plot,
    distance_plot,
    norm_label,
    share_plot,
    steps_plot,
)
from softdefend.report.runs import CHECKPOINTS, RunRecord
from softdefend.report.tables import ABSENT, attack_label, number_text

_MOST_PAIRS = 20
_MOST_PICTURES = 48
_MOST_LINES = 4


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint that stands for its recipe."""

    recipe: str
    run: RunRecord
    which: str
    details: Details

    @property
    def evaluation(self) -> dict[str, Any]:
        return self.run.evaluations[self.which]

    @property
    def title(self) -> str:
        """The recipe, and the checkpoint of a network that was trained here."""
        return f"{self.recipe}, {self.which} checkpoint" if self.run.metrics else self.recipe

    def heading(self, comparison: Comparison) -> Heading:
        """A heading that names the run."""
        seed = f", seed {self.run.seed}" if self.run.metrics else ""
        return Heading(self.title + seed, comparison.color[self.recipe])

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a number where a file gives none."""
        table, gallery, examples = self.details.table, self.details.gallery, self.run.examples
        named = gallery.classes if gallery else examples.classes if examples else ()
        most = 0
        if table is not None and len(table.label):
            most = 1 + max(int(table.label.max()), int(table.worst_prediction.max()))
        return (*named, *(str(i) for i in range(len(named), most)))


def _checkpoints(comparison: Comparison, has: Callable[[Details], Any]) -> list[_Checkpoint]:
    """One checkpoint of each recipe that has something."""
    chosen = []
    for group in comparison.groups:
        candidates = (
            _Checkpoint(group.label, run, which, run.details[which])
            for run in group.runs
            for which in CHECKPOINTS
            if which in run.details and has(run.details[which])
        )
        chosen += [checkpoint for checkpoint in [next(candidates, None)] if checkpoint]
    return chosen


def accuracy_after_each_attack(comparison: Comparison) -> Section | None:
    """What is left after each attack, one upon the other; for evaluations with two attacks or more."""
    plots = []
    for one in _checkpoints(comparison, lambda details: details.table and details.table.attacks):
        steps = after_each(one.evaluation, one.details.table)
        if len(steps) > 2:
            named = [(name if name == "clean" else attack_label(name), count) for name, count, _ in steps]
            n = int(one.evaluation["n"])
            plots.append(steps_plot(one.title, named, n, comparison.color[one.recipe]))
    if not plots:
        return None
    note = "Images that are still right after each attack and all before it; hatched: what this attack took."
    return Section("Accuracy after each attack", [*figures(*plots), Paragraph(note)])


def queries_to_success(comparison: Comparison) -> Section | None:
    """Success against queries, of attacks that take no gradients."""
    plots = []
    for one in _checkpoints(comparison, lambda details: details.table and details.table.attacks):
        assert one.details.table is not None
        lines = {
            attack_label(name): line
            for name, row in one.evaluation["attacks"].items()
            if row.get("backwards") == 0 and (line := success_by_queries(one.details.table, name)) is not None
        }
        if lines:
            drawn = dict(list(lines.items())[:_MOST_LINES])
            plots.append(
                share_plot(
                    one.title,
                    drawn,
                    comparison.color[one.recipe],
                    xlabel="forwards of an image",
                    ylabel="images fooled (%)",
                )
            )
    if not plots:
        return None
    note = (
        "Attacks without gradients. Of the images that are right without an attack, those that are fooled "
        "within so many forwards."
    )
    return Section("Success against queries", [*figures(*plots), Paragraph(note)])


def success_by_queries(table: PredictionTable, attack: str) -> Line | None:
    """The share of the images right without an attack that it fools within a number of forwards, in percent;
    None where forwards are not known, or no image is right."""
    columns, right = table.attacks.get(attack), table.right
    if columns is None or columns.forwards is None or columns.fooled or not right.any():
        return None
    asked = columns.forwards[right]
    needed = np.sort(asked[~columns.robust[right]])
    at, counts = np.unique(needed, return_counts=True)
    share = 100 * np.cumsum(counts) / right.sum()
    x, y = [0, *at.tolist()], [0.0, *share.tolist()]
    if (last := int(asked.max())) > x[-1]:
        x, y = [*x, last], [*y, y[-1]]
    return Line(tuple(x), tuple(y), tuple(y), tuple(y))


def several_threats(comparison: Comparison) -> Section | None:
    """Accuracy under each threat that a checkpoint was evaluated under, and under all of them together."""
    checkpoints = [
        _Checkpoint(group.label, run, which, run.details[which])
        for group in comparison.groups
        for which in CHECKPOINTS
        for run in [one for one in group.runs if which in one.details and one.details[which].threats][:1]
    ]
    if not checkpoints:
        return None
    titles = list(dict.fromkeys(one.title for each in checkpoints for one in each.details.threats))
    body = [
        [
            comparison.name_cell(one.recipe),
            one.which,
            number_text(one.evaluation["n"]),
            f"{100 * one.evaluation['clean']['rate']:.2f}",
            *_threat_cells(one.details.threats, titles),
        ]
        for one in checkpoints
    ]
    head = ["recipe", "checkpoint", "images", "clean", *titles, "union"]
    worst_cases = _worst_cases([kept for one in checkpoints for kept in one.details.threats])
    note = (
        f"{worst_cases} Union: right under every threat of its row, image by image; a dash where those were "
        "not of the same images."
    )
    table = Table("Accuracy under several threats, %", head, body)
    return Section("Several threats", [table, Paragraph(note)])


def _worst_cases(kept: Sequence[KeptEvaluation]) -> str:
    """Which attacks the figures are of, by threat where they differ."""
    attacks: dict[str, dict[str, None]] = {}
    for one in kept:
        names = ", ".join(attack_label(name) for name in one.result["attacks"]) or "no attack"
        attacks.setdefault(one.title, {})[names] = None
    if len(all_ := {names for each in attacks.values() for names in each}) == 1:
        return f"In the worst case of {all_.pop()}."
    different = "; ".join(f"{title}: {' or '.join(each)}" for title, each in attacks.items())
    return f"In the worst case of other attacks in each threat ({different})."


def _threat_cells(kept: Sequence[KeptEvaluation], titles: Sequence[str]) -> list[Cell | str]:
    same = of_same_images(kept)
    cells = {one.title: _rate_cell(one.result["worst"], with_count=not same) for one in kept}
    if same:
        cells["union"] = _rate_cell(asdict(rate_in_union(kept)))
    return [cells.get(title, ABSENT) for title in (*titles, "union")]


def _rate_cell(rate: dict[str, Any], *, with_count: bool = False) -> Cell:
    count = f", {number_text(rate['n'])} images" if with_count else ""
    interval = f"[{100 * rate['low']:.2f}, {100 * rate['high']:.2f}]"
    return Cell(f"{100 * rate['rate']:.2f}", small=interval + count)


def confusions(comparison: Comparison) -> Section | None:
    """The confusion matrix in the worst case; of many classes the most frequent confusions."""
    checkpoints = _checkpoints(comparison, lambda details: details.table and details.table.attacks)
    if not checkpoints:
        return None
    plots = []
    tables: list[Block] = []
    for one in checkpoints:
        assert one.details.table is not None
        classes = one.classes
        counts = confusion_counts(one.details.table, len(classes))
        if len(classes) <= MOST_CLASSES:
            plots.append(confusion_plot(one.title, counts, classes, comparison.color[one.recipe]))
        tables += [one.heading(comparison), _pairs_table(one.recipe, counts, classes)]
    note = (
        "In the worst case: the wrong class of the clean image, else what the first attack that succeeded "
        "made of it. Shares are of each true class."
    )
    folded = Folded("The most frequent confusions", tables)
    return Section("What is taken for what under attack", [*figures(*plots), Paragraph(note), folded])


def confusion_counts(table: PredictionTable, k: int) -> NDArray[np.int64]:
    """Images by label (row) and prediction in the worst case (column), [k, k]."""
    counts = np.zeros((k, k), np.int64)
    np.add.at(counts, (table.label, table.worst_prediction), 1)
    return counts


def _pairs_table(recipe: str, counts: NDArray[np.int64], classes: tuple[str, ...]) -> Table:
    wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))
    share = wrong / counts.sum(1, keepdims=True).clip(1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [divmod(int(place), len(wrong)) for place in order]
    body = [
        [classes[i], classes[j], number_text(int(wrong[i, j])), f"{100 * share[i, j]:.1f}"]
        for i, j in pairs
        if wrong[i, j]
    ]
    head = ["true class", "taken for", "images", "of the class, %"]
    return Table(f"Most frequent confusions of {recipe}", head, body)


def masking_audits(comparison: Comparison) -> Section | None:
    """The findings of the audit for gradient masking: what is suspicious openly, all checks folded away."""
    blocks: list[Block] = []
    for one in _checkpoints(comparison, lambda details: details.audit):
        audit = one.details.audit or {}
        findings = audit["findings"]
        suspicious = [finding for finding in findings if finding.get("verdict") == "suspicious"]
        blocks += [one.heading(comparison), Paragraph(str(audit.get("summary", "")), style="")]
        if suspicious:
            blocks.append(_findings_table(f"What the audit of {one.recipe} found", suspicious))
        every = _findings_table(f"Audit of {one.recipe}", findings)
        blocks.append(Folded(f"All {len(findings)} checks", [every]))
    return Section("Can the gradient be trusted?", blocks) if blocks else None


def _findings_table(caption: str, findings: Sequence[dict[str, Any]]) -> Table:
    head = ["check", "verdict", "figure", "suspicious if", "what it says", "source"]
    return Table(caption, head, [_finding(finding) for finding in findings])


def _finding(finding: dict[str, Any]) -> list[str | Cell]:
    figure, verdict = finding.get("figure"), str(finding.get("verdict", ABSENT))
    marked = {
        "fine": Cell("✓ fine", style="correct"),
        "suspicious": Cell("✗ suspicious", style="wrong"),
    }
    return [
        finding["check"],
        marked.get(verdict, verdict),
        f"{figure:.3g}" if is_number(figure) else ABSENT,
        str(finding.get("threshold", ABSENT)),
        Cell(str(finding.get("explanation", "")), prose=True),
        Cell(str(finding.get("reference", "")), prose=True),
    ]


def transfer_attacks(comparison: Comparison) -> Section | None:
    """Accuracy on images made on other networks."""
    body = [
        [
            one.recipe,
            name,
            f"{100 * rate['rate']:.2f}",
            f"{100 * one.evaluation['worst']['rate']:.2f}" if one.evaluation.get("worst") else ABSENT,
        ]
        for one in _checkpoints(comparison, lambda details: details.transfer)
        for name, rate in (one.details.transfer or {})["attacks"].items()
    ]
    if not body:
        return None
    head = ["recipe", "attack on another network", "accuracy, %", "its own attacks, %"]
    note = (
        "The surrogate's images, judged on the evaluated network. Where they do more harm than attacks on "
        "the network itself, those are too weak."
    )
    return Section("Transfer attacks", [Table("Transfer attacks", head, body), Paragraph(note)])


def attack_quality(comparison: Comparison) -> Section | None:
    """How near attacks come to the closest wrong image that is known: a curve and a row for each attack."""
    plots = []
    body: list[list[str | Cell]] = []
    for one in _checkpoints(comparison, lambda details: details.optimality):
        result = one.details.optimality or {}
        curves = {name: [100 * rate for rate in curve] for name, curve in result["curves"].items()}
        norm = norm_label(result.get("norm"))
        plots.append(distance_plot(one.title, result["grid"], curves, xlabel=f"ε of the attack, {norm}"))
        ranked = sorted(result["attacks"].items(), key=lambda item: -item[1]["optimality"])
        body += [
            [
                comparison.name_cell(one.recipe),
                attack_label(name),
                f"{row['optimality']:.3f}",
                *(
                    f"{value:.4g}" if is_number(value := row.get(key)) else ABSENT
                    for key in ("median_distance", "median_ratio")
                ),
                number_text(row["found"]),
                number_text(row["closest"]),
            ]
            for name, row in ranked
        ]
    if not plots:
        return None
    head = ["attack", "local optimality", "median distance", "over the best", "found", "closest of all"]
    note = (
        "Best known: for each image the closest wrong image of all these attacks. Local optimality "
        "(AttackBench, arXiv 2404.19460): 1 where no attack found a closer one, 0 for an attack that finds "
        "nothing. Attacks that do not look for the closest image were run at several ε."
    )
    table = Table("Closest wrong images", ["recipe", *head], body)
    return Section("How good are the attacks?", [*figures(*plots), table, Paragraph(note)])


def certificates(comparison: Comparison) -> Section | None:
    """Certified accuracy against the l2 radius, beside what an attack on the smoothed classifier leaves."""
    plots = []
    rows: list[list[str | Cell]] = []
    for one in _checkpoints(comparison, lambda details: details.certificate):
        certificate = one.details.certificate or {}
        curves = {"certified": certificate["curve"], "under attack": certificate["empirical"]}
        lines = {name: line for name, points in curves.items() if (line := by_radius(points))}
        color, ylabel = comparison.color[one.recipe], "accuracy (%)"
        plots.append(share_plot(one.title, lines, color, xlabel="l2 radius", ylabel=ylabel, unit="radius"))
        settings = certificate["settings"]
        rows.append(
            [
                comparison.name_cell(one.recipe),
                one.which,
                f"{settings['sigma']:g}",
                number_text(settings["samples"]),
                f"{certificate['average_radius']:.3f}",
                f"{certificate['abstained']} of {certificate['n']}",
            ]
        )
    if not plots:
        return None
    head = ["checkpoint", "sigma", "samples", "average radius", "abstained"]
    note = (
        "Of the smoothed classifier (arXiv 1902.02918). Certified: no change shorter than the radius "
        "changes the right answer; wrong with probability alpha at most, for each image. Under attack: "
        "PGD-20 on mean logits, an upper bound. The average radius counts wrong images as 0."
    )
    table = Table("Certificates", ["recipe", *head], rows)
    return Section("Certified accuracy", [*figures(*plots), table, Paragraph(note)])


def by_radius(points: Sequence[dict[str, Any]]) -> Line | None:
    """A curve of a certificate in percent; None for no points."""
    if not points:
        return None
    low, rate, high = (
        tuple(100 * point[name] if is_number(point.get(name)) else 100 * point["rate"] for point in points)
        for name in ("low", "rate", "high")
    )
    return Line(tuple(point["radius"] for point in points), rate, low, high)


def common_corruptions(comparison: Comparison) -> Section | None:
    """Accuracy by corruption and severity, shaded."""
    checkpoints = _checkpoints(comparison, lambda details: details.corruptions)
    if not checkpoints:
        return None
    means = ", ".join(
        f"{one.recipe} {100 * (one.details.corruptions or {})['mean']:.1f}%" for one in checkpoints
    )
    blocks = [block for one in checkpoints for block in _corruption_blocks(comparison, one)]
    note = (
        f"Mean over corruptions and severities: {means}. A plain mean of accuracies, after CIFAR-10-C "
        "(arXiv 1903.12261) and computed anew; not divided by AlexNet's errors, so no leaderboard's mCE. "
        "Darker cells lost more of the clean accuracy."
    )
    return Section("Accuracy under common corruptions", [*blocks, Paragraph(note)])


def _corruption_blocks(comparison: Comparison, checkpoint: _Checkpoint) -> list[Block]:
    content = checkpoint.details.corruptions or {}
    severities = max((len(line["severities"]) for line in content["corruptions"].values()), default=0)
    clean = (content.get("clean") or {}).get("rate")
    body = [
        [
            name.replace("_", " "),
            *(_shaded(rate["rate"], clean) for rate in line["severities"]),
            _shaded(line["mean"], clean),
        ]
        for name, line in content["corruptions"].items()
    ]
    head = ["corruption", *(f"severity {i + 1}" for i in range(severities)), "mean"]
    note = f"Clean: {100 * clean:.1f}% of {number_text(content.get('n'))} images." if is_number(clean) else ""
    table = Table(f"Accuracy of {checkpoint.recipe} under corruptions, %", head, body)
    return [checkpoint.heading(comparison), Paragraph(note), table]


def _shaded(rate: float, clean: Any) -> Cell:
    """A cell that is the darker the larger the share of the clean accuracy is that was lost."""
    lost = 1 - rate / clean if is_number(clean) and clean else 0.0
    return Cell(f"{100 * rate:.1f}", shade=round(80 * min(max(lost, 0), 1)))


def galleries(comparison: Comparison) -> Section | None:
    """The images that are lost first and those that withstand most."""
    checkpoints = _checkpoints(comparison, lambda details: details.gallery and len(details.gallery.label))
    if not checkpoints:
        return None
    each = max(2, min(8, _MOST_PICTURES // (2 * len(checkpoints))))
    blocks = [block for one in checkpoints for block in _gallery_blocks(comparison, one, each)]
    note = (
        "Of the images that are right without an attack: hard ones fall to the most attacks, at the shortest "
        "distance, with the smallest margin before; easy ones are the other end of the same order."
    )
    return Section("Hardest and easiest images", [*blocks, Paragraph(note)])


def _gallery_blocks(comparison: Comparison, checkpoint: _Checkpoint, each: int) -> list[Block]:
    assert checkpoint.details.gallery is not None
    images = checkpoint.details.gallery
    hard = [i for i in range(len(images.label)) if images.hard[i]][:each]
    easy = [i for i in reversed(range(len(images.label))) if not images.hard[i]][:each]
    return [
        checkpoint.heading(comparison),
        Paragraph("Hardest"),
        Gallery([_gallery_picture(images, i) for i in hard]),
        Paragraph("Easiest"),
        Gallery([_gallery_picture(images, i) for i in easy]),
    ]


def _gallery_picture(images: GalleryImages, i: int) -> Picture:
    truth, predicted = (_class_name(images, int(one[i])) for one in (images.label, images.prediction))
    robust = int(images.label[i]) == int(images.prediction[i])
    survived = f"withstands {int(images.survived[i])} of {images.attacks}"
    alt = f"test image {int(images.index[i])} of class {truth}, which "
    if robust:
        return Picture(
            images.image[i], f"{alt}stays", [Text(truth, "bold"), Text("✓ stays", "correct"), survived]
        )
    outcome = Text(f"✗ becomes {predicted}", "wrong")
    survived += f" at {images.distance[i]:.3g}"
    return Picture(images.image[i], f"{alt}becomes {predicted}", [Text(truth, "bold"), outcome, survived])


def _class_name(images: GalleryImages, i: int) -> str:
    return images.classes[i] if 0 <= i < len(images.classes) else str(i)
