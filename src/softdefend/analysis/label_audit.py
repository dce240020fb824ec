"""Label audit: which training labels does the memory distrust, and is it right?

A label memory holds, for every training image, what the network has said of it over time. Where that is not
the given label, the label may be wrong.
"""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor

from softdefend.analysis.subjects import Subject, logits_of
from softdefend.core.errors import SettingError

Flags = NDArray[np.bool_]
Scores = NDArray[np.float64]


def self_confidence(belief: Tensor, given: Tensor) -> Tensor:
    """The believed probability of the given label, [n] in [0, 1]; low means suspicious.

    Args:
        belief: [n, k], rows summing to one.
        given: [n] int64.
    """
    return belief.double().gather(1, given[:, None]).squeeze(1)


def margin(belief: Tensor, given: Tensor) -> Tensor:
    """:func:`self_confidence` minus the largest other probability, [n] in [-1, 1]: negative where another
    class is believed."""
    others = belief.double().scatter(1, given[:, None], -torch.inf)
    return self_confidence(belief, given) - others.amax(dim=1)


def log_odds(belief: Tensor, given: Tensor) -> Tensor:
    """Logarithm of the given label's probability over the largest other one, [n]: the margin, spread out
    where one class has nearly all. Probabilities below 1e-12 count as that."""
    row = belief.double().clamp_min(1e-12).log()
    others = row.scatter(1, given[:, None], -torch.inf)
    return row.gather(1, given[:, None]).squeeze(1) - others.amax(dim=1)


def balanced_margin(belief: Tensor, given: Tensor) -> Tensor:
    """:func:`margin` after taking from each class's probabilities the mean :func:`self_confidence` of the
    samples that carry its label, [n]: that a class is always believed hesitantly is then no sign of an error.

    The adjustment is that of confident learning (Northcutt et al., arXiv 1911.00068), and the ranking that of
    cleanlab's class-adjusted normalized margin. From a class without samples the mean of the others is taken:
    with nothing taken it would stand above all of them.
    """
    k = belief.shape[1]
    count = torch.bincount(given, minlength=k)
    total = torch.zeros(k, dtype=torch.float64).index_add_(0, given, self_confidence(belief, given))
    threshold = total / count.clamp_min(1)
    threshold[count == 0] = threshold[count > 0].mean()
    return margin(belief.double() - threshold, given)


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "self-confidence": self_confidence,
    "margin": margin,
    "log-odds": log_odds,
    "balanced-margin": balanced_margin,
}
DEFAULT_SCORE = "balanced-margin"
SOURCES = {"memory": "label memory", "prediction": "network's predictions"}
"""Whose rows are ranked, and what the page calls them."""


def ranking(score: Tensor) -> Tensor:
    """Positions from the most to the least suspicious, [n] int64; the earlier sample first on a tie."""
    return score.argsort(stable=True)


def detection(score: Scores, wrong: Flags, at: Sequence[int]) -> dict[str, Any]:
    """How well low scores find wrong labels, by scikit-learn.

    Args:
        score: [n], low means suspicious.
        wrong: [n], the truth.
        at: numbers of samples looked at, for precision at k.

    Returns:
        AUROC, average precision, precision among the first k for each k of ``at`` not above n, and for k
        equal to the number of wrong labels; None where all labels are right, or all wrong.
    """
    found: dict[str, Any] = {"auroc": None, "average_precision": None, "precision_at": {}}
    if not wrong.any() or wrong.all():
        return found
    found["auroc"] = float(roc_auc_score(wrong, -score))
    found["average_precision"] = float(average_precision_score(wrong, -score))
    order = np.argsort(score, kind="stable")
    for k in sorted({*at, int(wrong.sum())}):
        if 0 < k <= len(score):
            found["precision_at"][str(k)] = float(wrong[order[:k]].mean())
    return found


def curve(score: Scores, wrong: Flags, points: int = 101) -> dict[str, list[float]] | None:
    """Precision at evenly spaced recalls, for a figure; None where there is nothing to find.

    Between the thresholds the higher precision to the right is taken, the usual envelope.
    """
    if not wrong.any() or wrong.all():
        return None
    # The last point of scikit-learn's, precision one at recall zero, is of no ranking.
    precision, recall = (values[:-1] for values in precision_recall_curve(wrong, -score)[:2])
    at = np.linspace(0, 1, points)
    best = [float(precision[recall >= r - 1e-12].max()) for r in at]
    return {"recall": at.tolist(), "precision": best}


def found_set(flagged: Flags, wrong: Flags) -> dict[str, Any]:
    """Size, precision, recall and F1 of a set of samples called wrong; None where it is undefined."""
    hits, size, total = int((flagged & wrong).sum()), int(flagged.sum()), int(wrong.sum())
    return {
        "size": size,
        "precision": hits / size if size else None,
        "recall": hits / total if total else None,
        "f1": 2 * hits / (size + total) if size + total else None,
    }


@dataclass(frozen=True)
class Ranked:
    """One way to rank samples and to call some of them wrong.

    Attributes:
        name: of the method and what it looks at.
        score: [n], low means suspicious.
        flagged: [n], the samples it calls wrong.
    """

    name: str
    score: Scores
    flagged: Flags


def ours(belief: Tensor, given: Tensor, source: str) -> list[Ranked]:
    """The scores of :data:`SCORES` on rows [n, k]; called wrong is what has another largest entry."""
    flagged = (belief.argmax(dim=1) != given).numpy()
    return [
        Ranked(f"{name} ({source})", function(belief, given).numpy(), flagged)
        for name, function in SCORES.items()
    ]


def confident_learning(belief: Tensor, given: Tensor, source: str) -> list[Ranked]:
    """Confident learning (Northcutt et al., JAIR 2021, arXiv 1911.00068) by cleanlab on the same rows.

    Its label-quality score, normalized margin with class-adjusted probabilities and self-confidence with
    class-adjusted ones, and the issue set of ``find_label_issues`` (prune by noise rate, its default). The
    method asks for predictions on samples that were not trained on; a memory is not that.

    Raises:
        SettingError: cleanlab is not installed.
    """
    try:
        ranks = importlib.import_module("cleanlab.rank")
        filters = importlib.import_module("cleanlab.filter")
    except ImportError as error:
        raise SettingError(
            "--baseline",
            "cleanlab is not installed",
            "pip install 'softdefend[analysis]', or --baseline false",
        ) from error
    y, p = given.numpy(), belief.double().numpy()
    p = p / p.sum(axis=1, keepdims=True)
    flagged = np.asarray(filters.find_label_issues(y, p, n_jobs=1), dtype=bool)
    rows = []
    for method in ("self_confidence", "normalized_margin"):
        adjusted = _every_class(y, p.shape[1])
        score = ranks.get_label_quality_scores(y, p, method=method, adjust_pred_probs=adjusted)
        words = method.replace("_", " ") + (", adjusted" if adjusted else "")
        rows.append(Ranked(f"cleanlab {words} ({source})", np.asarray(score, np.float64), flagged))
    return rows


def _every_class(label: NDArray[np.int64], k: int) -> bool:
    """Class thresholds are means over the samples of a class: they need one."""
    return bool(len(np.unique(label)) == k)


def table(ranked: Sequence[Ranked], wrong: Flags, at: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each way to rank, where the truth is known."""
    return [
        {"name": one.name, **detection(one.score, wrong, at), "called_wrong": found_set(one.flagged, wrong)}
        for one in ranked
    ]


COLUMNS = (
    "rank",
    "index",
    "source_position",
    "given",
    "believed",
    "confidence",
    "given_probability",
    "score",
)


def rows_of(
    belief: Tensor,
    given: Tensor,
    score: Tensor,
    positions: Tensor,
    classes: Sequence[str],
    truth: Tensor | None,
) -> list[dict[str, Any]]:
    """One row for each training sample, from the most to the least suspicious.

    Args:
        belief: [n, k].
        given: [n].
        score: [n], low means suspicious.
        positions: [n], of the images in the data source.
        classes: k names.
        truth: [n], where the clean labels are known: adds the columns ``true`` and ``wrong``.

    Returns:
        ``index`` is the row in the run's training set, ``believed`` the class with the largest probability,
        ``confidence`` that probability, ``given_probability`` the given label's.
    """
    believed = belief.argmax(dim=1)
    confidence, own = belief.amax(dim=1), self_confidence(belief, given)
    rows = []
    for rank, i in enumerate(ranking(score).tolist(), start=1):
        row: dict[str, Any] = {
            "rank": rank,
            "index": i,
            "source_position": int(positions[i]),
            "given": classes[int(given[i])],
            "believed": classes[int(believed[i])],
            "confidence": round(float(confidence[i]), 6),
            "given_probability": round(float(own[i]), 6),
            "score": round(float(score[i]), 6),
        }
        if truth is not None:
            row |= {"true": classes[int(truth[i])], "wrong": int(given[i] != truth[i])}
        rows.append(row)
    return rows


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of :func:`rows_of` as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class Audit:
    """What was found.

    Attributes:
        subject: the network and the memory.
        score: name of the score that ranks.
        source: of the rows that are ranked, one of :data:`SOURCES`.
        rows: of :func:`rows_of`.
        comparison: of :func:`table`, empty where the truth is not known.
        curves: precision-recall curves by name, likewise.
        wrong: number of wrong labels, or None where the truth is not known.
        flagged: number of samples for which another class is believed.
    """

    subject: Subject
    score: str
    source: str
    rows: list[dict[str, Any]]
    comparison: list[dict[str, Any]]
    curves: dict[str, dict[str, list[float]]]
    wrong: int | None
    flagged: int


def audit(
    subject: Subject,
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
    train = subject.run.bundle.train
    given, truth = train.labels, train.clean_labels
    memory = require_memory(subject) if source == "memory" else subject.memory
    believed = {} if memory is None else {"memory": memory}
    if source == "prediction" or truth is not None:
        believed["prediction"] = predictions(subject, batch_size)
    ranks = believed[source]
    values = SCORES[score](ranks, given)
    rows = rows_of(ranks, given, values, positions, subject.run.bundle.classes, truth)
    comparison: list[dict[str, Any]] = []
    curves: dict[str, dict[str, list[float]]] = {}
    if truth is not None:
        wrong = (given != truth).numpy()
        ranked: list[Ranked] = []
        for name, belief in believed.items():
            ranked += ours(belief, given, name)
            if baseline:
                ranked += confident_learning(belief, given, name)
        comparison = table(ranked, wrong, at)
        found = ((one.name, curve(one.score, wrong)) for one in ranked)
        curves = {name: line for name, line in found if line is not None}
    return Audit(
        subject,
        score,
        source,
        rows,
        comparison,
        curves,
        None if truth is None else int((given != truth).sum()),
        int((ranks.argmax(dim=1) != given).sum()),
    )


def require_memory(subject: Subject) -> Tensor:
    """The memory of a subject.

    Raises:
        SettingError: the run keeps none, none lies beside these weights, or it still is the given labels.
    """
    if subject.memory is None:
        recipe = subject.run.experiment.recipe
        rules = f"{type(recipe.label).__name__} and {type(recipe.objective).__name__}"
        raise SettingError(
            "run",
            f"{subject.run.folder}, whose newest checkpoint holds no label memory ({rules})",
            "a run of a rule with a memory, such as SGLR, with its checkpoints; or --source prediction",
        )
    if bool((self_confidence(subject.memory, subject.run.bundle.train.labels) == 1).all()):
        raise SettingError(
            "run",
            f"{subject.run.folder}, whose label memory still is the given labels",
            "a run whose refinement has begun; or --source prediction",
        )
    return subject.memory


def predictions(subject: Subject, batch_size: int) -> Tensor:
    """Probabilities [n, k] of the network on the clean training images, on the CPU."""
    data = subject.run.train
    parts = torch.split(torch.arange(data.n, device=data.labels.device), batch_size)
    logits = [logits_of(subject.net, data.take(part).image, batch_size) for part in parts]
    return torch.cat(logits).double().softmax(dim=1).cpu()
