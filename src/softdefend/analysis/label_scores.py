"""Scores that rank training labels from the most to the least suspicious, and how well they find wrong ones.

A label memory holds, for every training image, what the network has predicted for it over time. Where that is
not the given label, the label may be wrong.
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
    if not wrong.any() or wrong.all():
        return {"auroc": None, "average_precision": None, "precision_at": {}}
    order = np.argsort(score, kind="stable")
    counts = (k for k in sorted({*at, int(wrong.sum())}) if 0 < k <= len(score))
    return {
        "auroc": float(roc_auc_score(wrong, -score)),
        "average_precision": float(average_precision_score(wrong, -score)),
        "precision_at": {str(k): float(wrong[order[:k]].mean()) for k in counts},
    }


def precision_recall(score: Scores, wrong: Flags, points: int = 101) -> dict[str, list[float]] | None:
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


def flagged_quality(flagged: Flags, wrong: Flags) -> dict[str, Any]:
    """Size, precision, recall and F1 of a set of samples called wrong; None where it is undefined."""
    hits, size, total = int((flagged & wrong).sum()), int(flagged.sum()), int(wrong.sum())
    return {
        "size": size,
        "precision": hits / size if size else None,
        "recall": hits / total if total else None,
        "f1": 2 * hits / (size + total) if size + total else None,
    }


@dataclass(frozen=True)
class Ranking:
    """One way to rank samples and to call some of them wrong.

    Attributes:
        name: of the method and what it looks at.
        score: [n], low means suspicious.
        flagged: [n], the samples it calls wrong.
    """

    name: str
    score: Scores
    flagged: Flags


def own_rankings(belief: Tensor, given: Tensor, source: str) -> list[Ranking]:
    """The scores of :data:`SCORES` on rows [n, k]; called wrong is what has another largest entry."""
    flagged = (belief.argmax(dim=1) != given).numpy()
    return [
        Ranking(f"{name} ({source})", function(belief, given).numpy(), flagged)
        for name, function in SCORES.items()
    ]


def confident_learning(belief: Tensor, given: Tensor, source: str) -> list[Ranking]:
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
        adjusted = _has_every_class(y, p.shape[1])
        score = ranks.get_label_quality_scores(y, p, method=method, adjust_pred_probs=adjusted)
        words = method.replace("_", " ") + (", adjusted" if adjusted else "")
        rows.append(Ranking(f"cleanlab {words} ({source})", np.asarray(score, np.float64), flagged))
    return rows


def _has_every_class(label: NDArray[np.int64], k: int) -> bool:
    """Whether each class has a sample. Class thresholds are means over the samples of a class."""
    return bool(len(np.unique(label)) == k)


def detection_table(rankings: Sequence[Ranking], wrong: Flags, at: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each way to rank, where the truth is known."""
    return [
        {
            "name": one.name,
            **detection(one.score, wrong, at),
            "called_wrong": flagged_quality(one.flagged, wrong),
        }
        for one in rankings
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


def audit_rows(
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
    """Rows of :func:`audit_rows` as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
