"""Signs in an epoch's row that a run goes wrong quietly, and settings that may help."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

FIRST_STEPS = 1000
"""Steps after which a network that learns is better than guessing: PGD-AT of a ResNet-18 on CIFAR-10 reaches
25% within them."""
STUCK_STEPS = 5000
"""Steps after which a network that still guesses is expected to go on guessing. Of the runs in
benchmarks/results that guessed after FIRST_STEPS, those that learned did so by step 4,212; one never did."""
NEAR_GUESSING = 0.03
"""Accuracy above that of guessing that still counts as guessing; 0.3 / k where that is less."""
UNIFORM = 0.9
"""Share of ln k above which the mean entropy of the labels counts as uniform. SGLR on PGD-AT ends at 0.70 on
CIFAR-10 after 200 epochs; runs that passed 0.9 were seen to reach 1."""


def hints(
    row: Mapping[str, Any], steps_per_epoch: int, k: int, *, soft: bool = False
) -> Iterator[tuple[str, str]]:
    """Names of the signs that an epoch shows, each with a text of one line.

    Args:
        row: of ``metrics.jsonl``: ``epoch``, ``step``, ``train_robust`` in [0, 1], ``target_entropy`` [nats].
        steps_per_epoch: of training.
        k: number of classes; one class gives no sign.
        soft: whether nearly uniform labels are as they should be and no sign.
    """
    if k < 2:
        return
    robust, limit = row["train_robust"], 1 / k + min(NEAR_GUESSING, 0.3 / k)
    for name, after, outlook in (
        ("guessing", FIRST_STEPS, "it may rise yet"),
        ("stuck", STUCK_STEPS, "it is not likely to rise any more"),
    ):
        just_passed = row["step"] - steps_per_epoch < after <= row["step"]
        if just_passed and robust is not None and robust < limit:
            yield (
                name,
                f"after {row['step']} steps robust accuracy on training images is {100 * robust:.1f}%, that "
                f"of guessing; {outlook}; a warm-up (optim.schedule.warmup) or a lower optim.lr may help",
            )
    entropy = row["target_entropy"]
    if not soft and entropy is not None and entropy > UNIFORM * math.log(k):
        yield (
            "uniform",
            f"the labels of epoch {row['epoch']} are nearly uniform: mean entropy {entropy:.2f} of at most "
            f"{math.log(k):.2f}; a label rule that keeps a share of the given label (SGLR: label.r below 1) "
            "may help",
        )
