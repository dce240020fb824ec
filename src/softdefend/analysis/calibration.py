"""Label quality: how sure, how right and how human are targets and predictions?

Everything is in float64, entropies and divergences in nats. Calibration compares the largest probability of
a row (its *confidence*) with how often that class is right.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

_SMALL = 1e-12
_BELOW_ONE = 1 - 2**-24
"""The largest number below one in float32."""


def expected_calibration_error(probability: Tensor, label: Tensor, bins: int) -> float:
    """ECE in [0, 1] over ``bins`` bins of equal width (Naeini et al., AAAI 2015; Guo et al., ICML 2017, arXiv
    1706.04599): the mean distance of confidence and accuracy in the bars of :func:`reliability`.

    Args:
        probability: [n, k].
        label: [n] int64.
    """
    bars = reliability(probability, label, bins)
    return sum(bar["count"] * abs(bar["confidence"] - bar["accuracy"]) for bar in bars) / len(label)


def adaptive_calibration_error(probability: Tensor, label: Tensor, bins: int) -> float:
    """The same over bins that hold equally many samples (Nguyen and O'Connor, EMNLP 2015, arXiv 1508.05154),
    in [0, 1]: no bin is empty, and none decides by a handful of samples.

    Sizes differ by one where n is no multiple of ``bins``; equal confidences count with the accuracy they
    have together, in whichever bin.
    """
    confidence, right = _confidence(probability, label)
    _, group = torch.unique(confidence, return_inverse=True)
    count = torch.bincount(group).double()
    right = (torch.bincount(group, right.double()) / count)[group].to(right)
    order = confidence.argsort(stable=True)
    parts = torch.tensor_split(order, min(bins, len(order)))
    gaps = [len(part) * abs(float(confidence[part].mean() - right[part].mean())) for part in parts]
    return sum(gaps) / len(order)


def brier(probability: Tensor, label: Tensor) -> float:
    """Mean squared distance between a row and its one-hot label, summed over classes, in [0, 2] (Brier,
    1950)."""
    one_hot = nn.functional.one_hot(label, probability.shape[1]).double()
    return float((probability.double() - one_hot).square().sum(dim=1).mean())


def negative_log_likelihood(probability: Tensor, label: Tensor) -> float:
    """Mean of -log p(label), in nats; probabilities below 1e-12 count as that."""
    chosen = probability.double().gather(1, label[:, None]).clamp_min(_SMALL)
    return float(-chosen.log().mean())


def reliability(probability: Tensor, label: Tensor, bins: int) -> list[dict[str, float | int]]:
    """The bars of a reliability diagram: for each bin of equal width that is not empty its edges, how many
    samples it holds, their mean confidence and accuracy."""
    confidence, right = _confidence(probability, label)
    # [0, 1/bins) and so on, the last one closed; float32, and nothing above one by rounding
    edges = torch.linspace(0, 1, bins + 1)
    number = torch.bucketize(confidence.float().clamp(0, _BELOW_ONE), edges, right=True) - 1
    rows: list[dict[str, float | int]] = []
    for b in sorted(set(number.tolist())):
        members = number == b
        rows.append(
            {
                "low": b / bins,
                "high": (b + 1) / bins,
                "count": int(members.sum()),
                "confidence": float(confidence[members].mean()),
                "accuracy": float(right[members].mean()),
            }
        )
    return rows


def _confidence(probability: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    confidence, prediction = probability.double().max(dim=1)
    return confidence, (prediction == label).double()


def quality(probability: Tensor, label: Tensor, bins: int) -> dict[str, Any]:
    """All of the above for rows [n, k] and labels [n]."""
    confidence, right = _confidence(probability, label)
    return {
        "n": len(label),
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
        "entropy": float(entropy(probability).mean()),
        "ece": expected_calibration_error(probability, label, bins),
        "adaptive_ece": adaptive_calibration_error(probability, label, bins),
        "brier": brier(probability, label),
        "nll": negative_log_likelihood(probability, label),
        "reliability": reliability(probability, label, bins),
    }


def entropy(probability: Tensor) -> Tensor:
    """Of each row, [n], in nats."""
    rows: Tensor = torch.special.entr(probability.double()).sum(dim=1)
    return rows


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row, [n], in nats; entries of q below 1e-12 count as that.

    For a one-hot q the floor decides: what p has elsewhere costs log 1e12 = 27.6 nats a unit. Compare soft
    rows with one-hot ones by their total variation.
    """
    p, q = p.double(), q.double().clamp_min(_SMALL)
    rows: Tensor = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(dim=1)
    return rows


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the absolute distance of each pair of rows, [n], in [0, 1]."""
    return 0.5 * (p.double() - q.double()).abs().sum(dim=1)


def compare_with_people(probability: Tensor, human: Tensor) -> dict[str, Any]:
    """How far rows [n, k] are from the distributions of human labels [n, k].

    Returns:
        Means of KL(human || row) and total variation; the share of rows whose largest entry is among the
        largest of the human one (ties count as agreement); the rank correlation of the two entropies
        (None where one is constant). The fewer people voted, the coarser ``human`` is: with three votes
        KL cannot reach zero for a row that is right.
    """
    rank = None
    ours, theirs = entropy(probability), entropy(human)
    if len(ours) > 2 and float(ours.std()) > _SMALL and float(theirs.std()) > _SMALL:
        rank = float(spearmanr(ours.numpy(), theirs.numpy()).statistic)
    top = human.gather(1, probability.argmax(dim=1, keepdim=True)).squeeze(1) == human.amax(dim=1)
    return {
        "n": len(human),
        "kl": float(divergence(human, probability).mean()),
        "total_variation": float(total_variation(human, probability).mean()),
        "agreement": float(top.double().mean()),
        "entropy_rank_correlation": rank,
    }
