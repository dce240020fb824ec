"""A caller's loss is the goal itself: no attack stops, or prefers an image, because the network is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from softdefend.attacks import PGD, Transfer, cross_entropy
from softdefend.attacks.names import ATTACKS, parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel

CLASSES = 4
NAMES = {
    "fgsm": 1.0,
    "pgd-40": 1.0,
    "pgd-20x3": 1.0,
    "cw-linf": 1.0,
    "apgd-ce": 1.0,
    "apgd-dlr": 1.0,
    "apgd-t-20": 1.0,
    "square-2000": 0.9,
}
"""Names, and the share of the most that a linear function can rise which each attack has to reach."""


def linear() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(49, CLASSES)).eval().requires_grad_(False)
    net[1].weight.copy_(torch.randn(CLASSES, 49, generator=stream(0, "weight")))
    weight = net[1].weight.view(CLASSES, 7, 7)
    weight[:, -1] = weight[:, :, -1] = 0  # no window of Square lands there
    net[1].bias.zero_()
    return net


IMAGE = 0.4 + 0.2 * torch.rand(24, 1, 7, 7, generator=stream(0, "image"))
"""Away from the borders of the box."""
LABEL, TARGET = torch.arange(24) % CLASSES, (torch.arange(24) + 1) % CLASSES
"""Any labels: most images are wrong from the start."""


def gap(logits: Tensor) -> Tensor:
    """The target's logit less the label's, [b]."""
    rows = torch.arange(len(logits))
    return logits[rows, TARGET] - logits[rows, LABEL]


@pytest.mark.parametrize("name", NAMES)
def test_a_linear_loss_rises_as_far_as_the_ball_allows_on_wrong_images_too(name):
    net, eps = linear(), 0.1
    made = parse_attack(name)(net, IMAGE, LABEL, ThreatModel("linf", "0.1"), loss=gap)
    weight = net[1].weight
    most = eps * (weight[TARGET] - weight[LABEL]).abs().sum(1)
    risen = gap(net(made)) - gap(net(IMAGE))
    assert bool((risen >= (NAMES[name] - 1e-4) * most).all())
    assert int((net(IMAGE).argmax(1) != LABEL).sum()) > 12


def test_every_attack_that_takes_a_loss_is_among_them():
    named = {parse_attack(name).__class__ for name in NAMES}
    assert {made for _, made in ATTACKS.items() if not made.minimizes_distance} - named == {Transfer}


@pytest.mark.parametrize("eps", ["60/255", "90/255"])
@pytest.mark.parametrize("name", ["pgd-50", "apgd-ce", "square-3000"])
def test_a_target_is_reached_by_all_where_one_reaches_it(name, eps):
    net, threat = linear(), ThreatModel("linf", eps)
    label = net(IMAGE).argmax(1)
    target = (label + 1) % CLASSES
    made = parse_attack(name)(
        net,
        IMAGE,
        label,
        threat,
        loss=lambda logits: -cross_entropy(logits, target),
        generator=stream(0, "a"),
    )
    assert bool((net(made).argmax(1) == target).all())


def test_of_several_restarts_the_largest_loss_is_kept_though_another_is_wrong():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(49, 32), nn.Tanh(), nn.Linear(32, 6))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    net.requires_grad_(False)
    image = torch.rand(300, 1, 7, 7)
    label = net(image).argmax(1)
    attack, threat = PGD(steps=3, step_size="0.02"), ThreatModel("linf", "0.08")

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, label)

    draws = torch.Generator().manual_seed(1)
    alone = torch.stack(
        [loss(net(attack(net, image, label, threat, loss=loss, generator=draws))) for _ in range(4)]
    )
    several = replace(attack, restarts=4)
    kept = several(net, image, label, threat, loss=loss, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(net(kept)), alone.amax(0))
    wrong_first = several(net, image, label, threat, generator=torch.Generator().manual_seed(1))
    assert bool((loss(net(wrong_first)) < alone.amax(0) - 1e-4).any())


def test_of_several_surrogates_the_largest_loss_on_the_attacked_network_is_kept():
    net, surrogates = linear(), [linear() for _ in range(3)]
    for number, surrogate in enumerate(surrogates):
        surrogate[1].weight.add_(torch.randn(CLASSES, 49, generator=stream(number, "other")))
    threat, inner = ThreatModel("linf", "0.1"), PGD(steps=3, start="none")
    alone = [gap(net(Transfer(s, inner)(net, IMAGE, LABEL, threat, loss=gap))) for s in surrogates]
    made = Transfer(tuple(surrogates), inner)(net, IMAGE, LABEL, threat, loss=gap)
    torch.testing.assert_close(gap(net(made)), torch.stack(alone).amax(0))


@pytest.mark.parametrize("name", ["fgsm", "pgd-2", "apgd-ce-2", "apgd-t-2", "cw-linf", "square-2"])
def test_a_loss_that_is_none_is_one_line(name):
    attack = parse_attack(name)
    for loss, said in (
        (lambda logits: gap(logits).mean(), "a function, which returned float32 of shape []"),
        (lambda logits: gap(logits)[:5], "a function, which returned float32 of shape [5]"),
        (lambda logits: logits.argmax(1), "a function, which returned int64 of shape [24]"),
        (lambda logits: 3.0, "a function, which returned a float"),
        ("ce", "a str"),
    ):
        with pytest.raises(SettingError) as caught:
            attack(linear(), IMAGE, LABEL, ThreatModel("linf", "0.1"), loss=loss)
        assert caught.value.setting == "attack.loss"
        assert caught.value.given == said
