"""The pages of an analysis and of a label audit: self-contained HTML from plain results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import groupby
from typing import Any

import numpy as np

from softdefend.analysis.figures import Curve, dot_plot, line_plot, surface_plot
from softdefend.analysis.label_audit import SOURCES, Audit
from softdefend.report import RunRecord
from softdefend.report.blocks import figures, paragraph, picture, titled
from softdefend.report.figures import Plot, Series, colors, epoch_plot
from softdefend.report.markup import Html, details, join, row, scrolling_table, tag
from softdefend.report.runs import Group
from softdefend.report.tables import ABSENT


@dataclass(frozen=True)
class Found:
    """The result of one part for one network.

    Attributes:
        run: its name.
        weights: ``best``, ``last`` or a checkpoint.
        epoch: of these weights, or None.
        result: plain values.
    """

    run: str
    weights: str
    epoch: int | None
    result: Mapping[str, Any]

    @property
    def at(self) -> str:
        """The weights in words."""
        return self.short if self.epoch is None or self.kept else f"{self.weights} (epoch {self.epoch})"

    @property
    def short(self) -> str:
        """The weights in a word: best, last, or a checkpoint's epoch."""
        return f"epoch {self.epoch}" if self.kept and self.epoch is not None else self.weights

    @property
    def kept(self) -> bool:
        """Whether they are those of a checkpoint."""
        return self.weights not in ("best", "last")


@dataclass(frozen=True)
class Analysis:
    """All results: overfitting by run, the other parts by part.

    Attributes:
        records: the runs, by name.
        overfitting: by run name; empty where the part was not asked for.
        parts: by part, in the order asked for.
    """

    records: Mapping[str, RunRecord]
    overfitting: Mapping[str, Mapping[str, Any]]
    parts: Mapping[str, Sequence[Found]]

    def groups(self) -> list[Group]:
        """Each run as a group of its own, in the report's terms."""
        return [Group(name, (record,)) for name, record in self.records.items()]


def write(title: str, about: str, *sections: Html) -> bytes:
    """A whole page."""
    style = Html((files("softdefend.report") / "templates" / "page.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title}: {about}"),
        tag("style", style),
    )
    header = tag("header", tag("h1", title), tag("p", about, class_="about"))
    body = tag("body", header, tag("main", *sections))
    text = "<!DOCTYPE html>\n" + tag("html", join("\n", head, "\n", body, "\n"), lang="en")
    return text.encode()


def analysis_page(analysis: Analysis) -> bytes:
    """The page of ``softdefend analyze``."""
    color = colors(analysis.groups())
    makers = {
        "gradients": _gradients,
        "labels": _labels,
        "information": _information,
        "geometry": _geometry,
    }
    sections = [_overfitting(analysis, color)] if analysis.overfitting else []
    sections += [makers[part](found, color) for part, found in analysis.parts.items() if found]
    return write("Analysis", " · ".join(analysis.records), *sections)


def number(value: Any, digits: int = 3) -> str:
    """A number as text, a dash for None."""
    if value is None:
        return ABSENT
    return f"{value:.{digits}f}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share as per cent, a dash for None."""
    return number(None if value is None else 100 * value, 1)


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", t) for t in rest)) for first, *rest in rows]
    return scrolling_table(caption, row("th", *head), body)


def _folded(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A long table, behind its figures."""
    return details(f"{caption}: all numbers", _table(caption, head, rows))


def _drawn(*plots: Plot | None) -> Html:
    return figures([plot for plot in plots if plot])


def _overfitting(analysis: Analysis, color: Mapping[str, str]) -> Html:
    groups, results = [], analysis.overfitting
    for name, record in analysis.records.items():
        gaps = zip(record.metrics, results[name]["gap_robust"], strict=True)
        groups.append(Group(name, (replace(record, metrics=[{**m, "gap": gap} for m, gap in gaps]),)))
    held_out = {"test": "test images", "val": "validation images"}
    kinds = list(dict.fromkeys(result["held_out"] for result in results.values()))
    side = kinds[0] if len(kinds) == 1 else "val"
    plots = [
        epoch_plot(
            f"{title} accuracy",
            groups,
            color,
            [Series(f"{side}_{kind}", held_out[side]), Series(f"train_{kind}", "training images")],
            "%",
        )
        for kind, title in (("robust", "Robust"), ("clean", "Clean"))
    ]
    gap = epoch_plot("Robust generalisation gap", groups, color, [Series("gap", "")], "%")
    rows = []
    for name, result in results.items():
        best, last, lost = (result[key] or {} for key in ("best", "last", "difference"))
        rows.append(
            [
                name,
                str(best.get("epoch", ABSENT)),
                *(percent(one.get("val_robust")) for one in (best, last, lost)),
                *(percent(one.get("test_robust")) for one in (best, last, lost)),
                *(percent(one.get("gap_robust")) for one in (best, last)),
                held_out[result["held_out"]],
            ]
        )
    head = ["run", "best epoch", *(f"{side} robust, {at}" for side in ("val", "test") for at in _TRIPLE)]
    head += ["robust gap, best", "robust gap, last", "gap to"]
    note = (
        "Accuracy in per cent. Best: the epoch of highest robust validation accuracy. Difference: best minus "
        "last. Gap: training accuracy minus that on the images named. Accuracies on training and validation "
        "images are against the labels as given."
    )
    return titled(
        "Robust overfitting", _drawn(*plots, gap), _table("Best and last epoch", head, rows), paragraph(note)
    )


_TRIPLE = ("best", "last", "difference")


def _final(found: Sequence[Found]) -> Iterator[Found]:
    """Of each run the weights measured last: best, then last, then checkpoints are asked for in order, and
    one line for each run is what a figure can hold."""
    for _, group in groupby(found, key=lambda one: one.run):
        members = list(group)
        yield next((one for one in members if one.weights == "last"), members[-1])


_LONG = 12
"""Rows from which on a table is folded."""
_FEW = 3
"""Epochs from which on a course over training is drawn."""


def _knowledge(one: Found) -> int:
    return {"best": 0, "last": 1}.get(one.weights, 2)


def _course(
    found: Sequence[Found],
    color: Mapping[str, str],
    title: str,
    ylabel: str,
    kinds: Mapping[str, Callable[[Mapping[str, Any]], float | None]],
) -> Plot | None:
    """Values by epoch, where a run's checkpoints were measured; None where they are too few.

    Args:
        kinds: what is drawn of a result, by its name in the legend; None leaves a point out.
    """
    curves = []
    for run in dict.fromkeys(one.run for one in found):
        # Of one epoch a checkpoint knows most, and the best weights come without a memory.
        known = sorted((one for one in found if one.run == run), key=_knowledge)
        by_epoch = {one.epoch: one.result for one in known if one.epoch is not None}
        for kind, value in kinds.items():
            points = [(epoch, y) for epoch in sorted(by_epoch) if (y := value(by_epoch[epoch])) is not None]
            if len(points) >= _FEW:
                curves.append(Curve(run, kind, *map(list, zip(*points, strict=True))))
    return line_plot(title, curves, color, xlabel="epoch", ylabel=ylabel, markers=True)


def _norms_by_epoch(found: Sequence[Found], color: Mapping[str, str]) -> list[Plot | None]:
    def norm(targets: str, key: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda result: result["last_layer"]["adversarial"].get(targets, {}).get(key)

    def fitted(result: Mapping[str, Any]) -> float | None:
        share = result["memorisation"].get("clean", {}).get("fitted")
        return None if share is None else 100 * share

    known = any(norm("given", "wrong_mean")(one.result) is not None for one in found)
    words = {"right_mean": "labels taken as right", "wrong_mean": "wrong labels"} if known else {"mean": ""}
    given = {name: norm("given", key) for key, name in words.items()}
    ylabel = "mean norm, last layer"
    return [
        _course(found, color, "Gradient norm towards the given labels by epoch", ylabel, given),
        _course(
            found,
            color,
            "Gradient norm towards the refined labels by epoch",
            ylabel,
            {name: norm("refined", key) for key, name in words.items()},
        ),
        _course(found, color, "Wrong labels fitted by epoch", "wrong labels repeated (%)", {"": fitted}),
    ]


def _gradients(found: Sequence[Found], color: Mapping[str, str]) -> Html:
    rows, dots = [], []
    for one in found:
        for layer, images in (("last layer", "last_layer"), ("whole network", "whole_network")):
            for kind, targets in one.result[images].items():
                for target, spread in targets.items():
                    rows.append(
                        [
                            one.run,
                            one.at,
                            layer,
                            kind,
                            target,
                            number(spread["mean"]),
                            *(number(spread.get(name)) for name in ("right_mean", "wrong_mean")),
                            *(percent(spread.get(name)) for name in ("fraction_wrong", "share_of_wrong")),
                        ]
                    )
                    share = spread.get("share_of_wrong")
                    if images == "last_layer" and kind == "adversarial" and share is not None:
                        dots.append((one.short, one.run, f"{target} labels", 100 * share))
    curves = []
    for one in _final(found):
        given = one.result["last_layer"]["adversarial"]["given"]
        kinds = (("right", "labels taken as right"), ("wrong", "wrong labels"))
        drawn = [(name, words) for name, words in kinds if given.get(f"{name}_quantiles")]
        if drawn:
            curves += [_distribution(one.run, words, given[f"{name}_quantiles"]) for name, words in drawn]
        else:
            curves.append(_distribution(one.run, "", given["quantiles"]))
    head = ["run", "weights", "of", "images", "labels", "mean norm", "right", "wrong"]
    head += ["% of samples wrong", "% of gradient from wrong"]
    judged = " and ".join(dict.fromkeys(one.result["judged_by"] for one in found))
    note = (
        f"Labels judged by: {judged}. Norms of the gradient of each sample's cross-entropy, in eval mode, "
        f"{found[0].result['probe']} training images. Refined labels are the label memory's."
    )
    return titled(
        "Gradient norms and memorisation",
        _drawn(
            line_plot(
                "Distribution of last-layer gradient norms",
                curves,
                color,
                xlabel="gradient norm, adversarial images",
                ylabel="samples below (%)",
                logarithmic=True,
            ),
            dot_plot("Gradient carried by wrong labels", dots, color, xlabel="share of the gradient (%)"),
            *_norms_by_epoch(found, color),
        ),
        _memorisation(found),
        paragraph(note),
        _folded("Gradient norms", head, rows),
    )


def _distribution(run: str, kind: str, quantiles: Sequence[float]) -> Curve:
    return Curve(run, kind, quantiles, [100 * i / (len(quantiles) - 1) for i in range(len(quantiles))])


def _memorisation(found: Sequence[Found]) -> Html:
    rows = [
        [
            one.run,
            one.at,
            kind,
            str(memory["wrong"]),
            percent(memory["fitted"]),
            percent(memory.get("recovered")),
        ]
        for one in found
        for kind, memory in one.result["memorisation"].items()
    ]
    if not rows:
        return paragraph(
            "Nothing is known of which labels are wrong: give --reference, or data with clean labels."
        )
    head = ["run", "weights", "images", "wrong labels", "% fitted", "% recovered"]
    note = "Fitted: the network repeats the wrong label. Recovered: it says the true class."
    table = _table if len(rows) <= _LONG else _folded
    return join(table("Wrong labels in the probe set", head, rows), paragraph(note))


_QUALITY = ("accuracy", "confidence", "entropy", "ece", "adaptive_ece", "brier", "nll")
_SHARES = ("accuracy", "confidence", "ece", "adaptive_ece")


def _labels(found: Sequence[Found], color: Mapping[str, str]) -> Html:
    rows, people = [], []
    for one in found:
        targets = one.result["targets"] or {}
        measured = {f"predictions, {kind} test": q for kind, q in one.result["predictions"].items()}
        measured |= {f"{name}, training": q for name, q in targets.items() if isinstance(q, dict)}
        for what, quality in measured.items():
            cells = [(percent if name in _SHARES else number)(quality[name]) for name in _QUALITY]
            rows.append([one.run, one.at, what, *cells])
        for what, distance in one.result["people"].items():
            cells = [number(distance[name]) for name in ("kl", "total_variation")]
            cells += [percent(distance["agreement"]), number(distance["entropy_rank_correlation"])]
            people.append([one.run, one.at, what, *cells])
    curves = [
        Curve(one.run, f"{kind} test images", *_bars(one.result["predictions"][kind]["reliability"]))
        for one in _final(found)
        for kind in ("clean", "adversarial")
    ]
    head = [
        "run",
        "weights",
        "what",
        "accuracy, %",
        "confidence, %",
        "entropy, nats",
        "ECE, %",
        "adaptive ECE, %",
    ]
    head += ["Brier", "NLL, nats"]
    note = f"Adversarial: {found[0].result['attack']} at the trained threat, against the true label."
    parts = [paragraph(note), _folded("Calibration", head, rows)]
    if people:
        head = ["run", "weights", "what", "KL(people ‖ ours), nats", "total variation", "top-1 agreement, %"]
        head += ["entropy rank correlation"]
        parts.append(_folded("Distance to human labels", head, people))
    reliability = line_plot(
        "Reliability",
        curves,
        color,
        xlabel="confidence",
        ylabel="accuracy",
        diagonal=True,
        markers=True,
    )
    return titled("Label quality", _drawn(reliability, *_quality_by_epoch(found, color)), *parts)


def _quality_by_epoch(found: Sequence[Found], color: Mapping[str, str]) -> list[Plot | None]:
    def of_targets(key: str, factor: float) -> Callable[[Mapping[str, Any]], float | None]:
        def value(result: Mapping[str, Any]) -> float | None:
            quality = (result["targets"] or {}).get("targets")
            return factor * quality[key] if isinstance(quality, Mapping) else None

        return value

    def of_predictions(kind: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda result: 100 * float(result["predictions"][kind]["ece"])

    return [
        _course(found, color, "Entropy of the targets by epoch", "nats", {"": of_targets("entropy", 1)}),
        _course(found, color, "ECE of the targets by epoch", "%", {"": of_targets("ece", 100)}),
        _course(
            found,
            color,
            "ECE of the predictions by epoch",
            "%",
            {f"{kind} test images": of_predictions(kind) for kind in ("clean", "adversarial")},
        ),
    ]


def _bars(bars: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [bar["confidence"] for bar in bars], [bar["accuracy"] for bar in bars]


_ESTIMATES = {
    "label_bound": "I(T; Y), classifier bound",
    "label_neighbors": "I(T; Y), neighbors",
    "input_bound": "I(X; T), InfoNCE bound",
    "input_neighbors": "I(X; T), neighbors",
}


def _information(found: Sequence[Found], color: Mapping[str, str]) -> Html:
    rows, stored, dots, errors = [], [], [], {}
    for one in found:
        for kind, weights in one.result["weights"].items():
            at = (f"{one.short}, {kind}", one.run, "empirical Fisher")
            stored.append((*at, weights["empirical"]))
            if weights["empirical_error"] is not None:
                errors[at] = weights["empirical_error"]
            stored.append((*at[:2], "model Fisher", weights["model"]))
        for images, values in one.result["representation"].items():
            cells = [number(values[name]) for name in ("label_entropy", *_ESTIMATES)]
            rows.append([one.run, one.at, images, *cells])
    for one in _final(found):
        for images, values in one.result["representation"].items():
            for name, words in _ESTIMATES.items():
                if images.endswith("adversarial") and values[name] is not None:
                    dots.append((words, one.run, images, values[name]))
    head = ["run", "weights", "images", "H(Y)", *_ESTIMATES.values()]
    note = (
        "All in nats. T is what enters the last linear layer. The classifier and InfoNCE bounds are lower "
        "bounds; the neighbor-based estimates err towards zero, and far so for I(X; T), which is unbounded "
        "for a deterministic network. Compare runs, do not read single values. Y is the label as given on "
        "training images, and the true one on test images."
    )
    weights = dot_plot(
        "Information in the weights", stored, color, xlabel="n/2 (w − w₀)ᵀ F (w − w₀), nats", errors=errors
    )
    return titled(
        "Information",
        _drawn(
            weights,
            dot_plot("Mutual information, adversarial images", dots, color, xlabel="nats"),
            *_information_by_epoch(found, color),
        ),
        paragraph(note),
        _folded("Mutual information", head, rows),
    )


def _information_by_epoch(found: Sequence[Found], color: Mapping[str, str]) -> list[Plot | None]:
    def stored(kind: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda result: result["weights"].get(kind, {}).get("empirical")

    images = next(name for name in found[0].result["representation"] if name.endswith("adversarial"))

    def estimate(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda result: result["representation"].get(images, {}).get(name)

    def plot(symbol: str, which: Sequence[str]) -> Plot | None:
        kinds = {_ESTIMATES[name].partition(", ")[2]: estimate(name) for name in which}
        return _course(found, color, f"{symbol} by epoch, {images}", "nats", kinds)

    # Training was on adversarial images; their Fisher matrix need not rank runs as that of clean ones does.
    kinds = {f"{kind} training images": stored(kind) for kind in found[0].result["weights"]}
    return [
        _course(found, color, "Information in the weights by epoch", "nats, empirical Fisher", kinds),
        plot("I(T; Y)", ("label_bound", "label_neighbors")),
        plot("I(X; T)", ("input_bound", "input_neighbors")),
    ]


def _geometry(found: Sequence[Found], color: Mapping[str, str]) -> Html:
    rows, slices, surfaces, final = [], [], [], list(_final(found))
    for one in found:
        result = one.result
        top = result["eigenvalue"] or {}
        rows.append(
            [
                one.run,
                one.at,
                *(number(result["loss"][kind]) for kind in ("clean", "adversarial")),
                number(top.get("value"), 2),
                number(top.get("residual")),
                number(result["input_gradient"]["l1"]["mean"], 2),
                number(result["input_gradient"]["l2"]["mean"]),
                number(result["linearity_gap"]["mean"]),
            ]
        )
        ends = not one.kept or one in final  # more of a run's networks would be a tangle
        if ends and (grid := result["surface"]) is not None:
            middle = len(grid["axis"]) // 2
            slices.append(Curve(one.run, one.short, grid["axis"], [line[middle] for line in grid["loss"]]))
    for one in final:
        if (grid := one.result["surface"]) is not None:
            title = f"Loss surface, {one.run}, {one.at}"
            surfaces.append(surface_plot(title, grid["axis"], grid["loss"], color[one.run]))
    head = ["run", "weights", "clean loss", "adversarial loss", "largest eigenvalue", "its residual"]
    head += ["input gradient, ℓ₁", "input gradient, ℓ₂", "linearity gap"]
    note = (
        f"{found[0].result['probe']} training images with their given labels. The eigenvalue is of the "
        "Hessian of the adversarial loss in the weights; its residual is |Hv − λv| / |λ|. Input gradients "
        "and linearity gap are means over clean images. Surfaces: adversarial images fixed, directions "
        "filter-normalized."
    )
    line = line_plot(
        "Loss along the first direction",
        slices,
        color,
        xlabel="distance in filter norms",
        ylabel="adversarial loss",
    )
    top = _course(
        found,
        color,
        "Largest Hessian eigenvalue by epoch",
        "eigenvalue",
        {"": lambda result: (result["eigenvalue"] or {}).get("value")},
    )
    plots = _drawn(line, top, *surfaces)
    return titled("Geometry", plots, _table("Geometry", head, rows), paragraph(note))


def audit_page(audit: Audit, top: int) -> bytes:
    """The page of ``softdefend labels audit``: what was found, how well, and the ``top`` first images."""
    run = audit.subject.run
    n, weights = len(audit.rows), audit.subject.weights.name
    known = (
        ""
        if audit.wrong is None
        else f" Of all labels {audit.wrong:,} are wrong ({100 * audit.wrong / n:.1f}%)."
    )
    summary = (
        f"{n:,} training images, ranked by {audit.score} of the {SOURCES[audit.source]} at {weights}. "
        f"For {audit.flagged:,} of them another class than the given one is believed.{known}"
    )
    sections = [titled("What was found", tag("p", summary, class_="summary"))]
    if audit.comparison:
        sections.append(_comparison(audit))
    shown = [_suspect(audit, line) for line in audit.rows[:top]]
    note = "From the most suspicious on: the given label, what is believed, and how strongly."
    sections.append(titled("Most suspicious labels", paragraph(note), tag("div", *shown, class_="gallery")))
    return write("Label audit", run.name, *sections)


def _comparison(audit: Audit) -> Html:
    at = sorted({int(k) for line in audit.comparison for k in line["precision_at"]})
    head = ["ranking", "AUROC", "average precision", *(f"precision at {k:,}" for k in at)]
    head += ["called wrong", "precision", "recall", "F1"]
    rows = []
    for line in audit.comparison:
        called = line["called_wrong"]
        rows.append(
            [
                line["name"],
                number(line["auroc"], 4),
                number(line["average_precision"], 4),
                *(number(line["precision_at"].get(str(k))) for k in at),
                f"{called['size']:,}",
                *(number(called[name]) for name in ("precision", "recall", "f1")),
            ]
        )
    names = [f"{audit.score} (memory)", f"{audit.score} (prediction)"]
    names += [name for name in audit.curves if name.startswith("cleanlab self")]
    lines = [Curve(n, "", c["recall"], c["precision"]) for n in names if (c := audit.curves.get(n))]
    color = dict(
        zip([line.run for line in lines], ("#0072b2", "#56b4e9", "#d55e00", "#e69f00"), strict=False)
    )
    plot = line_plot("Precision and recall", lines, color, xlabel="recall", ylabel="precision")
    note = (
        "Low scores are to find wrong labels; the truth is the clean labels. Called wrong: another class "
        "believed, or cleanlab's issue set. In brackets the probabilities that a ranking looks at."
    )
    return titled("How well", _drawn(plot), _table("Detection", head, rows), paragraph(note))


def _suspect(audit: Audit, line: Mapping[str, Any]) -> Html:
    image = audit.subject.run.bundle.train.images[line["index"]]
    pixels = image.float().div(255) if not image.is_floating_point() else image
    believed = f"{line['believed']} {100 * line['confidence']:.0f}%"
    words = [
        join(f"{line['rank']}. given "),
        tag("b", line["given"]),
        tag("br"),
        join("believed "),
        tag("b", believed),
    ]
    if "true" in line:
        verdict = ("wrong label", "correct") if line["wrong"] else ("label is right", "wrong")
        words.append(tag("span", verdict[0], class_=verdict[1]))
    words.append(tag("small", f" image {line['source_position']}"))
    alt = f"Training image {line['source_position']}: given {line['given']}, believed {believed}"
    return picture(np.asarray(pixels.numpy(), dtype=np.float32), alt, *words)
