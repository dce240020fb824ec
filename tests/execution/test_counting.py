"""What the network under attack counts, splits and verifies, against one that keeps a list."""

from __future__ import annotations

import pytest
import torch

from softdefend.execution.context import AttackContext, steps_until_packing
from softdefend.execution.counting import CountingModel
from softdefend.execution.randomness import CallerRandomness


class Listed:
    def __init__(self, sign: float = 1.0) -> None:
        self.sign, self.sizes = sign, []

    def __call__(self, image):
        self.sizes.append(len(image))
        value = self.sign * image.flatten(1).sum(1)
        return torch.stack([value, -value], dim=1)


IMAGE = torch.tensor([-2.0, -1.0, 1.0, 2.0, 3.0]).view(5, 1, 1, 1)


def test_forwards_and_gradients_belong_to_images():
    model = CountingModel(Listed(), 5)
    some = model.for_rows(torch.tensor([4, 1]))
    for _ in range(3):
        some(IMAGE[[4, 1]])
    some(IMAGE[[4, 1]].requires_grad_(True))
    some.add_gradients(2)
    model(IMAGE)
    model.add_counts(torch.tensor([0, 0, 0, 0, 7]), torch.tensor([1, 0, 0, 0, 0]))
    forwards, gradients, unassigned = model.counts()
    assert forwards.tolist() == [1, 5, 1, 1, 12]
    assert gradients.tolist() == [1, 3, 0, 0, 3]
    assert unassigned == (0, 0)
    model(IMAGE[:2])  # of whom, nobody knows
    assert model.counts().unassigned == (2, 0)
    assert torch.equal(model.counts().forwards, forwards)


def test_the_counts_of_a_part_belong_to_its_images():
    """A part is a batch of its own, in full precision, for an attack that knows one batch only."""
    net, exact = Listed(), Listed()
    model = CountingModel(net, 5, exact=exact)
    part = model.part(torch.tensor([3, 0]))
    part(IMAGE[[3, 0]].requires_grad_(True))
    part.for_rows(torch.tensor([1]))(IMAGE[[0]])
    part(IMAGE[[3]])  # of whom, nobody knows
    part.add_unassigned_gradients(4)
    assert (net.sizes, exact.sizes) == ([], [2, 1, 1])
    forwards, gradients, unassigned = model.counts()
    assert (forwards.tolist(), gradients.tolist(), unassigned) == ([2, 0, 0, 1, 0], [1, 0, 0, 1, 0], (1, 4))


def test_what_needs_no_gradient_is_cut_to_what_fits():
    net = Listed()
    logits = CountingModel(net, 5, microbatch=2)(IMAGE)
    assert net.sizes == [2, 2, 1]
    assert torch.equal(logits, Listed()(IMAGE))
    for microbatch, count, wanted in ((2, 5, [[0, 1], [2, 3], [4]]), (None, 3, [[0, 1, 2]])):
        context = AttackContext(CountingModel(net, 5, microbatch=microbatch), CallerRandomness(None, 5))
        assert [part.tolist() for part in context.portions(torch.arange(count))] == wanted


def test_clean_logits_are_computed_at_most_once():
    net, known = Listed(), torch.zeros(5, 2)
    model = CountingModel(net, 5)
    assert torch.equal(model.clean_logits(IMAGE), model.clean_logits(IMAGE))
    assert net.sizes == [5]
    assert CountingModel(net, 5, clean_logits=known).clean_logits(IMAGE) is known
    assert net.sizes == [5]


def test_only_unverified_claims_are_looked_at_again():
    label, rows, claimed = (
        torch.zeros(5).long(),
        torch.arange(5),
        torch.tensor([True, False, True, False, True]),
    )
    exact = Listed()
    sure = CountingModel(exact, 5)
    assert torch.equal(sure.verified(claimed, IMAGE, label, rows), claimed)
    assert exact.sizes == []
    unverified = CountingModel(Listed(-1.0), 5, exact=exact)
    # Wrong in full precision are the negative images, 0 and 1; of them only 0 was claimed.
    assert unverified.verified(claimed, IMAGE, label, rows).tolist() == [True, False, False, False, False]
    assert exact.sizes == [3]
    assert unverified.counts()[0].tolist() == [1, 0, 1, 0, 1]
    nothing = torch.zeros(5, dtype=torch.bool)
    assert torch.equal(unverified.verified(nothing, IMAGE, label, rows), nothing)
    assert exact.sizes == [3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_at_least_float32(dtype):
    logits = CountingModel(lambda x: x.flatten(1).to(dtype), 5)(IMAGE)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("most", [10, 50])
def test_between_packings_lie_at_most_a_quarter_of_the_steps_done(most):
    done = packings = 0
    while done < 5000:
        step = steps_until_packing(done, most)
        assert step == 1 or step <= done / 4
        assert step <= most
        done, packings = done + step, packings + 1
    assert packings < 5000 / most + 30
