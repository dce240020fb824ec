"""McNemar's test and the paired standard error, against enumeration and resampling."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from softdefend.core.errors import SettingError
from softdefend.evaluation.table import AttackColumns, Table
from softdefend.experiments.paired import compare, difference, verdicts


def flags(text: str) -> np.ndarray:
    return np.array([letter == "1" for letter in text])


def table(seed: int, n: int = 37) -> Table:
    draws = np.random.default_rng(seed)
    label = np.arange(n) % 3
    columns = AttackColumns(label, np.zeros(n, np.float32), draws.random(n) < 0.4)
    return Table(
        np.arange(n)[::-1].copy(), label, np.where(draws.random(n) < 0.7, label, 5), {"pgd-20": columns}
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [("1100110", "1011001"), ("1111000", "0000000"), ("0000011", "0111111"), ("10", "01")],
)
def test_p_is_the_share_of_equally_likely_splits_that_are_as_uneven(first, second):
    """Every image on which the two disagree falls to either side like a coin."""
    found = difference(flags(first), flags(second))
    pairs = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
    won = sum(pair == ("0", "1") for pair in pairs)
    assert (found.won, found.lost) == (won, len(pairs) - won)
    uneven = abs(2 * won - len(pairs))
    sides = list(itertools.product((0, 1), repeat=len(pairs)))
    as_uneven = sum(abs(2 * sum(one) - len(pairs)) >= uneven for one in sides)
    assert found.p == pytest.approx(as_uneven / len(sides))
    assert found.value == pytest.approx((second.count("1") - first.count("1")) / len(first))


def test_the_error_is_that_of_differences_over_images():
    draws = np.random.default_rng(0)
    first = draws.random(400) < 0.5
    second = np.where(draws.random(400) < 0.8, first, draws.random(400) < 0.6)
    found = difference(first, second)
    assert found.error == pytest.approx(np.std(second.astype(float) - first) / math.sqrt(400))
    means = []
    for _ in range(3000):
        rows = draws.integers(400, size=400)
        means.append((second[rows].astype(float) - first[rows]).mean())
    assert found.error == pytest.approx(np.std(means), rel=0.06)
    alone = math.sqrt(sum(share * (1 - share) / 400 for share in (first.mean(), second.mean())))
    assert found.error < alone  # equal verdicts carry no noise


def test_equal_networks_do_not_differ():
    found = difference(flags("1101"), flags("1101"))
    assert (found.value, found.error, found.p) == (0.0, 0.0, 1.0)


def test_rows_keep_the_verdicts_of_every_image():
    one, other = table(0), table(1)
    for measure, mine, theirs in (
        ("clean", one.right, other.right),
        ("pgd-20", one.attacks["pgd-20"].robust, other.attacks["pgd-20"].robust),
    ):
        assert compare(verdicts(one), verdicts(other), measure) == difference(mine, theirs)


def test_verdicts_on_other_images_are_not_compared():
    one, other = table(0), table(1)
    moved = Table(other.index + 1, other.label, other.clean_prediction, other.attacks)
    assert compare(verdicts(one), verdicts(moved), "clean") is None
    assert compare(verdicts(one), verdicts(table(1, n=36)), "clean") is None
    assert compare(verdicts(one), verdicts(other), "square") is None
    assert compare({}, verdicts(other), "clean") is None
    with pytest.raises(SettingError, match=r"^verdicts: got 2 and 3"):
        difference(flags("11"), flags("111"))
