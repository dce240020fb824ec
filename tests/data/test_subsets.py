from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softdefend.core.errors import SettingError
from softdefend.data.subsets import describe_subset, subset, subset_order


@given(st.lists(st.integers(0, 12).map(lambda x: x * x), min_size=1, max_size=80), st.integers(0, 9))
def test_in_every_beginning_each_class_is_less_than_one_image_away_from_its_share(
    labels: list[int], seed: int
) -> None:
    order = subset_order(torch.tensor(labels), seed=seed).tolist()
    assert sorted(order) == list(range(len(labels)))
    for n in range(len(labels) + 1):
        of = [labels[i] for i in order[:n]]
        for label in set(labels):
            share = Fraction(n * labels.count(label), len(labels))
            assert abs(of.count(label) - share) < 1


@pytest.mark.parametrize(("large", "classes"), [(1000, 100), (5, 300), (997, 3)])
def test_one_large_class_does_not_hide_many_small_ones(large: int, classes: int) -> None:
    labels = torch.cat([torch.zeros(large, dtype=torch.int64), torch.arange(1, classes + 1).repeat(10)])
    one_hot = torch.nn.functional.one_hot(labels[subset_order(labels)]).cumsum(0)
    share = torch.arange(1, len(labels) + 1)[:, None] * labels.bincount().double() / len(labels)
    assert float((one_hot - share).abs().max()) < 1


def test_smaller_parts_lie_in_larger_ones_and_follow_labels_and_seed_alone() -> None:
    labels = torch.arange(10).repeat_interleave(40)
    small, large = subset(labels, 100), subset(labels, 200)
    assert torch.equal(small, large[:100])
    assert torch.bincount(labels[small]).tolist() == [10] * 10
    assert torch.equal(subset(labels + 7, 100), small)
    assert not torch.equal(subset(labels, 100, seed=1).sort().values, small.sort().values)


def test_every_image_and_every_class_is_as_likely_to_be_taken() -> None:
    labels = torch.arange(6).repeat_interleave(5)
    hits = torch.zeros(30)
    for seed in range(600):
        hits[subset(labels, 3, seed=seed)] += 1
    # 600 draws of 3 in 30: 60 each, give or take 7.3; fewer images than classes must not mean the first ones.
    assert (hits - 60).abs().max() < 30
    assert (hits.view(6, 5).sum(1) - 300).abs().max() < 50


def test_all_images_are_in_the_order_of_the_data() -> None:
    labels = torch.arange(3).repeat_interleave(4)
    for size in (None, 12, 500):
        assert subset(labels, size).tolist() == list(range(12))
    assert subset(labels, 5, "first").tolist() == list(range(5))
    assert subset(torch.zeros(0, dtype=torch.int64), 5).tolist() == []


def test_how_many_classes_a_part_holds_is_said() -> None:
    labels = torch.arange(4).repeat_interleave(50)
    said = {how: describe_subset(labels, subset(labels, 60, how), how) for how in ("first", "stratified")}
    assert said == {
        "first": "the first 60 of 200 images, which are of 2 of the 4 classes",
        "stratified": "a stratified 60 of 200 images, which are of 4 of the 4 classes",
    }
    assert describe_subset(labels, subset(labels, None)) == "all 200 images, of 4 classes"


def test_another_order_is_refused() -> None:
    with pytest.raises(SettingError, match="subset: got last; accepted: stratified or first"):
        subset_order(torch.arange(3), "last")  # type: ignore[arg-type]


def test_the_order_is_that_of_recorded_runs() -> None:
    """Records of evaluations name images by it, so it may not change."""
    order = subset_order(torch.arange(3).repeat_interleave(4)).tolist()
    assert order == [10, 6, 3, 9, 7, 2, 8, 4, 0, 11, 5, 1]
