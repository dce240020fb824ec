"""ReBAT against the authors' loss and their loop of averages, in double precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.labels import Predictions, ReBAT
from softdefend.objectives import PGDAT, TRADES
from softdefend.weights import EMA
from tiny import K, about, batch_of, tiny_net

IMAGE = torch.rand(8, 1, 6, 6, generator=stream(0, "x"), dtype=torch.float64)
LABEL = torch.arange(8) % K


def moved(average: nn.Module, live: nn.Module, decay: float) -> None:
    """Weights and statistics, layer by layer; counts are copied."""
    with torch.no_grad():
        for ours, now in zip(average.state_dict().values(), live.state_dict().values(), strict=True):
            ours.copy_(decay * ours + (1 - decay) * now if ours.is_floating_point() else now)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_steps_are_those_of_a_loop_with_the_divergence(beta):
    """Ten epochs of one step each, the pull from the sixth on, on images that are attacked already."""
    net = tiny_net().double().eval()
    other, average = copy.deepcopy(net), copy.deepcopy(net)
    rule, goal = ReBAT(beta, decay=0.8, start=0.5), PGDAT()
    rule.setup(about(net))
    rule._forward = rule.teacher
    for epoch in range(10):
        rule.advance(float(epoch))
        batch = batch_of(IMAGE, LABEL)
        seen = goal.predict(net, IMAGE, IMAGE)
        belief = rule.supervise(batch, IMAGE, Predictions(seen.adversarial.detach()), rule.phase(epoch))
        terms = [(term.coefficient, term.target.double()) for term in belief.terms]
        loss = F.cross_entropy(seen.adversarial, belief.target.double())
        if terms:
            loss = sum(weight * F.cross_entropy(seen.adversarial, target) for weight, target in terms)
        logits = other(IMAGE)
        expected = F.cross_entropy(logits, LABEL)
        if epoch >= 5:
            with torch.no_grad():
                pulled = average(IMAGE).softmax(1)
            expected = expected + beta * F.kl_div(logits.log_softmax(1), pulled, reduction="batchmean")
        for one, total in ((net, loss), (other, expected)):
            gradients = torch.autograd.grad(total, list(one.parameters()))
            with torch.no_grad():
                for weight, gradient in zip(one.parameters(), gradients, strict=True):
                    weight -= 0.5 * gradient
                one[1].running_mean += 0.1 * (epoch + 1)
        rule.after_step()
        moved(average, other, 0.8 if epoch >= 5 else 0.0)
        for ours, theirs in ((net, other), (rule.teacher, average)):
            for name, value in ours.state_dict().items():
                torch.testing.assert_close(value, theirs.state_dict()[name], msg=name)


def test_before_the_start_it_is_the_given_label_and_its_average_the_network(make_trainer):
    """A run of three epochs that begins to pull in the third; its average is the weight rule's."""
    rule = ReBAT(beta=1.0, decay=0.9, start=2 / 3)
    weight = EMA(decay=0.9, start=2 / 3, warmup=False, bn="average")
    trainer = make_trainer(rule, PGDAT(), weight)
    phases, equal = [], []

    def look(row):
        phases.append(row["phase"])
        live, average = trainer.net.state_dict(), rule.teacher.state_dict()
        equal.append(all(torch.equal(live[name], value) for name, value in average.items()))

    trainer.fit(on_epoch=look)
    assert phases == ["hard", "hard", "pulled"]
    assert equal == [True, True, False]
    for name, value in weight.prediction.state_dict().items():
        torch.testing.assert_close(value, rule.teacher.state_dict()[name], msg=name)


def test_the_pull_takes_part_in_every_objectives_label_loss():
    """With TRADES it stands beside the clean cross-entropy."""
    net = tiny_net().eval()
    rule = ReBAT(beta=3.0, start=0.0)
    rule.setup(about(net))
    adversarial, batch = IMAGE.float() + 0.01, batch_of(IMAGE.float(), LABEL)
    belief = rule.supervise(batch, adversarial, Predictions(torch.zeros(8, K)), rule.phase(0))
    with torch.no_grad():
        pulled = rule.teacher(adversarial).softmax(1)
    clean = torch.randn(8, K, generator=stream(0, "z"))
    total = TRADES(0.0).outer_loss(Predictions(clean, clean), batch, belief)
    expected = F.cross_entropy(clean, LABEL) + 3 * F.cross_entropy(clean, pulled)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(belief.target, (torch.eye(K)[LABEL] + 3 * pulled) / 4)


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("decay", 1.0), ("start", 1.0)])
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(SettingError, match=rf"label\.{name}"):
        ReBAT(**{name: value})
