"""Weight rules: the mean is taken when it is said to be, and AWP passes everything on."""

from __future__ import annotations

import torch
from torch import nn

from softdefend.weights import AWP, SWA, WeightRule
from tiny import about


def averages(rule: SWA, epochs: int) -> list[int]:
    """Epochs after which there is one average more."""
    net, made, before = nn.Linear(3, 2), [], 0
    rule.setup(about(net, epochs=epochs))
    for epoch in range(epochs):
        rule.end_epoch(epoch, lambda: iter(()))
        if int(rule.averaged.n_averaged) > before:
            made.append(epoch)
        before = int(rule.averaged.n_averaged)
    return made


def test_epochs_are_averaged_from_the_first_on_and_the_last_at_least():
    assert averages(SWA(1.0), 6) == [5]
    assert averages(SWA(0.5, every=2), 6) == [3, 5]  # counted from the start, not from epoch 0


def test_a_warmup_whose_product_rounds_up_ends_at_the_same_epoch():
    assert 0.55 * 100 > 55
    rule = AWP(warmup=0.55)
    rule.setup(about(nn.Linear(3, 4), epochs=100))
    assert [rule.phase(epoch) for epoch in (54, 55)] == ["plain", "perturbed"]


def test_the_average_inside_is_told_the_position():
    class Noted(WeightRule):
        positions: list[float] = []  # noqa: RUF012

        def advance(self, epoch: float) -> None:
            self.positions.append(epoch)

    rule = AWP(average=Noted())
    rule.setup(about(nn.Linear(3, 4)))
    rule.advance(0.5)
    assert rule.average.positions == [0.5]


def test_weights_that_the_loss_does_not_know_stay_where_they_are():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "aside": nn.Linear(3, 2)})
    before = net["aside"].weight.detach().clone()
    rule = AWP()
    rule.setup(about(net))
    with rule.perturbed(net["used"](torch.ones(4, 3)).square().sum()):
        assert torch.equal(net["aside"].weight, before)
    assert torch.equal(net["aside"].weight, before)
