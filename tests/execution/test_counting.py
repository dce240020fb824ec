"""What an oracle counts, cuts and confirms, against a network that keeps a list."""

from __future__ import annotations

import pytest
import torch

from softdefend.execution.counting import Oracle, block


class Listed:
    def __init__(self, sign: float = 1.0) -> None:
        self.sign, self.sizes = sign, []

    def __call__(self, image):
        self.sizes.append(len(image))
        value = self.sign * image.flatten(1).sum(1)
        return torch.stack([value, -value], dim=1)


IMAGE = torch.tensor([-2.0, -1.0, 1.0, 2.0, 3.0]).view(5, 1, 1, 1)


def test_forwards_and_gradients_belong_to_images():
    oracle = Oracle(Listed(), 5)
    some = oracle.at(torch.tensor([4, 1]))
    for _ in range(3):
        some(IMAGE[[4, 1]])
    some(IMAGE[[4, 1]].requires_grad_(True))
    some.more_gradients(2)
    oracle.at()(IMAGE)
    oracle.add_counts(torch.tensor([0, 0, 0, 0, 7]), torch.tensor([1, 0, 0, 0, 0]))
    forwards, gradients, loose = oracle.counts()
    assert forwards.tolist() == [1, 5, 1, 1, 12]
    assert gradients.tolist() == [1, 3, 0, 0, 3]
    assert loose == (0, 0)
    oracle.at()(IMAGE[:2])  # of whom, nobody knows
    assert oracle.counts()[2] == (2, 0)
    assert torch.equal(oracle.counts()[0], forwards)


def test_what_needs_no_gradient_is_cut_to_what_fits():
    net = Listed()
    logits = Oracle(net, 5, most=2).at()(IMAGE)
    assert net.sizes == [2, 2, 1]
    assert torch.equal(logits, Listed()(IMAGE))
    assert [part.tolist() for part in Oracle(net, 5, most=2).parts(5, IMAGE.device)] == [[0, 1], [2, 3], [4]]
    assert [part.tolist() for part in Oracle(net, 5).parts(3, IMAGE.device)] == [[0, 1, 2]]


def test_clean_logits_are_computed_at_most_once():
    net, known = Listed(), torch.zeros(5, 2)
    oracle = Oracle(net, 5)
    assert torch.equal(oracle.clean(IMAGE), oracle.clean(IMAGE))
    assert net.sizes == [5]
    assert Oracle(net, 5, clean=known).clean(IMAGE) is known
    assert net.sizes == [5]


def test_only_claims_in_doubt_are_looked_at_again():
    label, rows, claimed = (
        torch.zeros(5).long(),
        torch.arange(5),
        torch.tensor([True, False, True, False, True]),
    )
    exact = Listed()
    sure = Oracle(exact, 5)
    assert torch.equal(sure.confirmed(claimed, IMAGE, label, rows), claimed)
    assert exact.sizes == []
    doubted = Oracle(Listed(-1.0), 5, exact=exact)
    # Wrong in full precision are the negative images, 0 and 1; of them only 0 was claimed.
    assert doubted.confirmed(claimed, IMAGE, label, rows).tolist() == [True, False, False, False, False]
    assert exact.sizes == [3]
    assert doubted.counts()[0].tolist() == [1, 0, 1, 0, 1]
    nothing = torch.zeros(5, dtype=torch.bool)
    assert torch.equal(doubted.confirmed(nothing, IMAGE, label, rows), nothing)
    assert exact.sizes == [3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_at_least_float32(dtype):
    logits = Oracle(lambda x: x.flatten(1).to(dtype), 5).at()(IMAGE)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("most", [10, 50])
def test_between_packings_lie_at_most_a_quarter_of_the_steps_done(most):
    done = packings = 0
    while done < 5000:
        step = block(done, most)
        assert step == 1 or step <= done / 4
        assert step <= most
        done, packings = done + step, packings + 1
    assert packings < 5000 / most + 30
