from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softdefend.data.holdout import complement, draw_by_class


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.data())
def test_a_draw_is_exact_sorted_and_within_one_of_each_class_share(
    labels: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(labels)))
    of = torch.tensor(labels)
    index = draw_by_class(of, count, generator(data.draw(st.integers(0, 9))))
    assert index.tolist() == sorted(set(index.tolist()))
    assert len(index) == count
    for label in set(labels):
        share = labels.count(label) * count / len(labels)
        assert abs(int((of[index] == label).sum()) - share) < 1


def test_every_member_of_a_class_is_as_likely() -> None:
    labels = torch.tensor([0, 1, 0, 0, 1, 0, 1, 0])
    hits = torch.zeros(8)
    for seed in range(2000):
        hits[draw_by_class(labels, 4, generator(seed))] += 1
    # Class 0: 2.5 of 5 by turns of rounding up or down, class 1: 1.5 of 3; all 1000 of 2000 if it were fair
    # between classes; within a class the spread is that of a coin, 22.
    for label in (0, 1):
        members = hits[labels == label]
        assert (members - members.mean()).abs().max() < 120


def test_a_draw_follows_its_generator() -> None:
    labels = torch.arange(10).repeat(20)
    assert torch.equal(draw_by_class(labels, 50, generator(1)), draw_by_class(labels, 50, generator(1)))
    assert not torch.equal(draw_by_class(labels, 50, generator(1)), draw_by_class(labels, 50, generator(2)))


@pytest.mark.parametrize(("classes", "size", "count"), [(30, 2, 12), (20, 3, 5), (6, 4, 14)])
def test_of_classes_of_one_size_each_is_as_likely_to_be_drawn(classes: int, size: int, count: int) -> None:
    labels = torch.arange(classes).repeat(size)
    draws = 2000
    hits = sum(
        torch.bincount(labels[draw_by_class(labels, count, generator(seed))], minlength=classes)
        for seed in range(draws)
    )
    # A class is rounded up or not, so its count is a coin's: four deviations of one.
    up = count / classes % 1
    assert (torch.as_tensor(hits) - draws * count / classes).abs().max() < 4 * (draws * up * (1 - up)) ** 0.5


def test_where_no_class_is_tied_the_lot_changes_nothing() -> None:
    labels = torch.arange(5).repeat_interleave(torch.tensor([11, 23, 31, 40, 7]))
    for seed in range(20):
        index = draw_by_class(labels, 30, generator(seed))
        # 30 of 112: shares 2.95, 6.16, 8.30, 10.71, 1.88.
        assert torch.bincount(labels[index]).tolist() == [3, 6, 8, 11, 2]


@pytest.mark.parametrize("index", [[], [0], [4, 1], [0, 1, 2, 3, 4]])
def test_complement(index: list[int]) -> None:
    rest = complement(torch.tensor(index, dtype=torch.int64), 5)
    assert rest.tolist() == sorted(set(range(5)) - set(index))
