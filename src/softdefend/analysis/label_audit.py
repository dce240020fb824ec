"""Label audit: which training labels does the memory, or the network, distrust, and is it right?"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdefend.analysis.figures import Curve, line_plot
from softdefend.analysis.label_scores import (
    DEFAULT_SCORE,
    SCORES,
    SOURCES,
    Ranking,
    as_csv,
    audit_rows,
    confident_learning,
    detection_table,
    own_rankings,
    precision_recall,
    self_confidence,
)
from softdefend.analysis.probe import predict_training_images
from softdefend.analysis.results import finite, number
from softdefend.analysis.runs import (
    AnalyzedNetwork,
    find_weights,
    open_network,
    open_runs,
    source_positions,
)
from softdefend.core.errors import SettingError
from softdefend.core.files import keep_earlier, write_atomic
from softdefend.report.content import (
    LINE_BREAK,
    Gallery,
    Paragraph,
    Picture,
    Section,
    Table,
    Text,
    figures,
)
from softdefend.report.render import render_page

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Audit:
    """The result of a label audit.

    Attributes:
        network: the network and the memory.
        score: name of the score that ranks.
        source: of the rows that are ranked, one of :data:`SOURCES`.
        rows: of :func:`audit_rows`.
        comparison: of :func:`detection_table`, empty where the truth is not known.
        curves: precision-recall curves by name, likewise.
        wrong: number of wrong labels, or None where the truth is not known.
        flagged: number of samples for which another class is believed.
    """

    network: AnalyzedNetwork
    score: str
    source: str
    rows: list[dict[str, Any]]
    comparison: list[dict[str, Any]]
    curves: dict[str, dict[str, list[float]]]
    wrong: int | None
    flagged: int


def audit_run(
    folder: str,
    *,
    score: str = DEFAULT_SCORE,
    source: str = "memory",
    baseline: bool | None = None,
    at: Sequence[int] = (100, 1000),
    batch_size: int = 500,
    device: torch.device | None = None,
) -> Audit:
    """Audit the labels of a run with the newest weights and memory it has saved.

    Args:
        folder: of the run.
        score: what ranks, one of :data:`SCORES`.
        source: whose rows are ranked: ``memory``, or ``prediction`` of the network on the clean images.
        baseline: compare with cleanlab; None: where it is installed.
        at: numbers of samples for precision at k.
        batch_size: images in a batch.
        device: of the network; the CPU when not given.

    Raises:
        SettingError: no such run, or a value that cannot be used; asked for a memory, a run without one, or
            whose memory still is the given labels.
    """
    if score not in SCORES:
        raise SettingError("--score", repr(score), ", ".join(SCORES))
    if source not in SOURCES:
        raise SettingError("--source", repr(source), " or ".join(SOURCES))
    for name, value in (("--at", min(at, default=1)), ("--batch_size", batch_size)):
        if value < 1:
            raise SettingError(name, value, "a whole number >= 1")
    (run,) = open_runs([folder], device or torch.device("cpu"))
    weights = find_weights(run.folder, ["last"])
    if not weights:
        raise SettingError("run", f"{folder} without saved weights", "a run with a finished epoch")
    network = open_network(run, weights[0])
    return audit_network(
        network,
        source_positions(run),
        score=score,
        source=source,
        baseline=cleanlab_is_installed() if baseline is None else baseline,
        at=at,
        batch_size=batch_size,
    )


def cleanlab_is_installed() -> bool:
    """Whether cleanlab is installed."""
    return find_spec("cleanlab") is not None


def audit_network(
    network: AnalyzedNetwork,
    positions: Tensor,
    *,
    score: str,
    source: str,
    baseline: bool,
    at: Sequence[int],
    batch_size: int,
) -> Audit:
    """Rank the training samples of a run, and compare where the truth is known.

    The comparison holds every score, of the memory (where there is one) and of the network's predictions on
    the clean training images at these weights, and confident learning on both.

    Raises:
        SettingError: asked for a memory, none, or one that still is the labels; cleanlab asked for and
            absent.
    """
    train = network.run.bundle.train
    given, truth = train.labels, train.clean_labels
    memory = require_memory(network) if source == "memory" else network.memory
    beliefs = {} if memory is None else {"memory": memory}
    if source == "prediction" or truth is not None:
        beliefs["prediction"] = predict_training_images(network.net, network.run.train, batch_size)
    belief = beliefs[source]
    values = SCORES[score](belief, given)
    rows = audit_rows(belief, given, values, positions, network.run.bundle.classes, truth)
    rankings: list[Ranking] = []
    wrong = None if truth is None else (given != truth).numpy()
    for name, rows_of_source in beliefs.items() if wrong is not None else ():
        rankings += own_rankings(rows_of_source, given, name)
        if baseline:
            rankings += confident_learning(rows_of_source, given, name)
    curves = {one.name: precision_recall(one.score, wrong) for one in rankings} if wrong is not None else {}
    return Audit(
        network=network,
        score=score,
        source=source,
        rows=rows,
        comparison=[] if wrong is None else detection_table(rankings, wrong, at),
        curves={name: curve for name, curve in curves.items() if curve is not None},
        wrong=None if wrong is None else int(wrong.sum()),
        flagged=int((belief.argmax(dim=1) != given).sum()),
    )


def require_memory(network: AnalyzedNetwork) -> Tensor:
    """The label memory that was saved with a network.

    Raises:
        SettingError: the run keeps none, none lies beside these weights, or it still is the given labels.
    """
    if network.memory is None:
        recipe = network.run.experiment.recipe
        rules = f"{type(recipe.label).__name__} and {type(recipe.objective).__name__}"
        raise SettingError(
            "run",
            f"{network.run.folder}, whose newest checkpoint holds no label memory ({rules})",
            "a run of a rule with a memory, such as SGLR, with its checkpoints; or --source prediction",
        )
    if bool((self_confidence(network.memory, network.run.bundle.train.labels) == 1).all()):
        raise SettingError(
            "run",
            f"{network.run.folder}, whose label memory still is the given labels",
            "a run whose refinement has begun; or --source prediction",
        )
    return network.memory


def write_audit(audit: Audit, output: Path, top: int = 120) -> None:
    """Write ``labels.csv``, ``audit.json`` and ``audit.html``. What they replace is kept in ``earlier/``.

    Args:
        output: folder of the three files.
        top: number of images on the page.

    Raises:
        SettingError: a folder that cannot be written.
    """
    content = {
        "run": str(audit.network.run.folder),
        "weights": audit.network.weights.name,
        "epoch": audit.network.epoch,
        "score": audit.score,
        "source": audit.source,
        "samples": len(audit.rows),
        "wrong": audit.wrong,
        "other_class_believed": audit.flagged,
        "comparison": audit.comparison,
        "curves": audit.curves,
    }
    page = render_page("Label audit", audit.network.run.name, _sections(audit, top))
    files = {
        output / "labels.csv": as_csv(audit.rows).encode(),
        output / "audit.json": json.dumps(finite(content), indent=1, allow_nan=False).encode(),
    }
    if any(path.is_file() and path.read_bytes() != written for path, written in files.items()):
        kept = keep_earlier(*files, output / "audit.html")
        _log.info(f"what stood in {output} is kept in {kept}")
    for path, written in (*files.items(), (output / "audit.html", page)):
        write_atomic(path, written)


def _sections(audit: Audit, top: int) -> list[Section]:
    """The sections of the page: what was found, how well, and the ``top`` first images."""
    n, weights = len(audit.rows), audit.network.weights.name
    share = f"{audit.wrong:,} are wrong ({100 * audit.wrong / n:.1f}%)" if audit.wrong is not None else ""
    summary = (
        f"{n:,} training images, ranked by {audit.score} of the {SOURCES[audit.source]} at {weights}. "
        f"For {audit.flagged:,} of them another class than the given one is believed."
    )
    if share:
        summary += f" Of all labels {share}."
    sections = [Section("What was found", [Paragraph(summary, style="summary")])]
    if audit.comparison:
        sections.append(_detection_section(audit))
    note = "From the most suspicious on: the given label, what is believed, and how strongly."
    pictures = [_picture(audit, row) for row in audit.rows[:top]]
    return [*sections, Section("Most suspicious labels", [Paragraph(note), Gallery(pictures)])]


_CURVE_COLORS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00")


def _detection_section(audit: Audit) -> Section:
    at = sorted({int(k) for line in audit.comparison for k in line["precision_at"]})
    head = ["ranking", "AUROC", "average precision", *(f"precision at {k:,}" for k in at)]
    head += ["called wrong", "precision", "recall", "F1"]
    rows = [
        [
            line["name"],
            number(line["auroc"], 4),
            number(line["average_precision"], 4),
            *(number(line["precision_at"].get(str(k))) for k in at),
            f"{line['called_wrong']['size']:,}",
            *(number(line["called_wrong"][name]) for name in ("precision", "recall", "f1")),
        ]
        for line in audit.comparison
    ]
    names = [f"{audit.score} (memory)", f"{audit.score} (prediction)"]
    names += [name for name in audit.curves if name.startswith("cleanlab self")]
    curves = [
        Curve(name, "", curve["recall"], curve["precision"])
        for name in names
        if (curve := audit.curves.get(name))
    ]
    color = dict(zip([curve.run for curve in curves], _CURVE_COLORS, strict=False))
    plot = line_plot("Precision and recall", curves, color, xlabel="recall", ylabel="precision")
    note = (
        "Low scores are to find wrong labels; the truth is the clean labels. Called wrong: another class "
        "believed, or cleanlab's issue set. In brackets the probabilities that a ranking looks at."
    )
    return Section("How well", [*figures(plot), Table("Detection", head, rows), Paragraph(note)])


def _picture(audit: Audit, row: Mapping[str, Any]) -> Picture:
    image = audit.network.run.bundle.train.images[row["index"]]
    pixels = image.float().div(255) if not image.is_floating_point() else image
    believed = f"{row['believed']} {100 * row['confidence']:.0f}%"
    caption: list[str | Text] = [
        f"{row['rank']}. given ",
        Text(row["given"], "bold"),
        LINE_BREAK,
        "believed ",
        Text(believed, "bold"),
    ]
    if "true" in row:
        caption.append(Text("wrong label", "correct") if row["wrong"] else Text("label is right", "wrong"))
    caption.append(Text(f" image {row['source_position']}", "small"))
    alt = f"Training image {row['source_position']}: given {row['given']}, believed {believed}"
    return Picture(np.asarray(pixels.numpy(), dtype=np.float32), alt, caption)
