"""Objectives: exact zeros, order of forwards, rounded starts."""

from __future__ import annotations

import copy

import pytest
import torch

from softdefend.attacks import PGD
from softdefend.core.rng import stream
from softdefend.core.rule import RunInfo
from softdefend.labels import Hard
from softdefend.objectives import MART, TE, TRADES
from softdefend.objectives.mlcat import scale_up
from tiny import tiny_net


def test_a_loss_of_exactly_zero_stays_a_number():
    loss = torch.tensor([0.0, 0.5, 3.0], requires_grad=True)
    scaled = scale_up(loss, 1.5)
    assert scaled.isfinite().all()
    scaled.sum().backward()
    assert loss.grad.isfinite().all()


@pytest.mark.parametrize("objective", [TRADES(), MART()])
def test_the_adversarial_images_move_statistics_last_as_in_the_authors_codes(objective):
    net = tiny_net()
    image, adversarial = torch.rand(2, 8, 1, 6, 6, generator=stream(0, "images"))
    expected = copy.deepcopy(net)
    objective.predict(net, image, adversarial)
    expected(image)
    expected(adversarial)
    torch.testing.assert_close(net[1].running_mean, expected[1].running_mean, atol=1e-7, rtol=0)


def test_a_ramp_start_whose_product_rounds_up_begins_at_the_same_epoch():
    assert 0.55 * 100 > 55
    goal = TE(ramp_start=0.55, ramp_end=0.75)
    goal.setup(RunInfo(torch.arange(4), 4, epochs=100))
    assert [goal.phase(epoch) for epoch in (53, 54)] == ["base", "ensemble"]
    goal.advance(54)
    assert goal.active
    goal.advance(53.5)  # a function of the position alone
    assert not goal.active


def test_a_start_that_is_named_is_kept_in_training_also_by_trades_and_mart(make_trainer):
    for number, objective in enumerate((TRADES(), MART(), TE())):
        trainer = make_trainer(Hard(), objective, folder=str(number), attack=PGD(steps=3, start="none"))
        assert trainer.step.attack.start == "none"
