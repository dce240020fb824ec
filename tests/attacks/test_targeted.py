"""Attacks with classes to reach: success is the target, nothing less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from softdefend.attacks import PGD, Attack, MinimalAttack, Square, Transfer, cross_entropy, margin
from softdefend.attacks.names import ATTACKS, parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.goals import fooled, to_reach
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel

K, N = 4, 24
NAMES = (
    *("fgsm", "pgd-40", "pgd-20x3-margin", "cw-linf", "apgd-ce", "apgd-dlr", "apgd-t", "square-3000"),
    *("fab", "fab-t", "fmn", "deepfool", "cw-l2-6x200", "sigma-zero-300"),
)
CASES = [
    (name, norm) for name in NAMES for norm in parse_attack(name).norms if name != "fgsm" or norm != "l1"
]
BY_NAME = ("pgd-2", "apgd-ce-6", "apgd-t-6", "square-5", "fmn-3", "fab-t-3", "deepfool", "hop-skip-jump-20")
EPS = {"linf": 0.3, "l2": 1.6, "l1": 9, "l0": 14}


def linear() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(49, K)).eval().requires_grad_(False)
    net[1].weight.copy_(torch.randn(K, 49, generator=stream(0, "weight")))
    weight = net[1].weight.view(K, 7, 7)
    weight[:, -1] = weight[:, :, -1] = 0  # no window of Square lands there
    net[1].bias.zero_()
    return net


NET = linear()
IMAGE = 0.4 + 0.2 * torch.rand(N, 1, 7, 7, generator=stream(0, "image"))
LABEL = NET(IMAGE).argmax(1)
TARGET = (LABEL + 1 + torch.arange(N) % (K - 1)) % K


def test_every_attack_of_ours_is_among_them():
    ours = {kind for _, kind in ATTACKS.items() if kind.__module__.startswith("softdefend.")}
    assert ours - {type(parse_attack(name)) for name in (*NAMES, "hop-skip-jump", "surfree")} == {Transfer}


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_the_target_is_reached_where_the_ball_is_large(name, norm):
    """A single step and few changed values may pass by it; what is not reached is not another class."""
    threat = ThreatModel(norm, EPS[norm])
    attack = parse_attack(name)
    made = attack(NET, IMAGE, LABEL, threat, target=TARGET, generator=stream(0, "a"))
    reached = NET(made).argmax(1) == TARGET
    assert reached.float().mean() >= (0.6 if name == "fgsm" else 1)
    assert (threat.distance(IMAGE, made) <= EPS[norm] * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("name", "norm"), [case for case in CASES if hasattr(parse_attack(case[0]), "minimal")]
)
def test_distances_are_to_the_target_not_to_the_nearest_class(name, norm):
    attack = parse_attack(name)
    closest, distance = attack.minimal(NET, IMAGE, LABEL, norm, target=TARGET)
    assert (NET(closest).argmax(1) == TARGET).all()
    _, anywhere = attack.minimal(NET, IMAGE, LABEL, norm)
    assert (distance >= anywhere * 0.8).all()
    assert (distance > anywhere * 1.05).any()
    _, nothing = attack.minimal(NET, IMAGE, LABEL, norm, target=LABEL)
    assert not nothing.any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fab-t", "fmn", "deepfool"])
def test_with_two_classes_the_target_is_the_closed_form(name, norm):
    """Off the box the distance to a hyperplane is its gap over the dual norm of its slope, whatever way it is
    asked for."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(49, 2)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(2, 49, generator=stream(1, "weight")))
    label = net(IMAGE).argmax(1)
    slope = net[1].weight[1] - net[1].weight[0]
    exact = (net(IMAGE)[:, 1] - net(IMAGE)[:, 0]).abs() / slope.norm(p=1 if norm == "linf" else 2)
    _, distance = parse_attack(name).minimal(net, IMAGE, label, norm, target=1 - label)
    assert (distance > exact * (1 - 1e-4)).all()
    assert (distance < 1.03 * (exact + 1e-4)).all()  # DeepFool's overshoot and nudge


@pytest.mark.parametrize(
    ("name", "norm"), [("hop-skip-jump", "linf"), ("hop-skip-jump", "l2"), ("surfree", "l2")]
)
def test_decisions_start_at_an_image_of_the_batch_that_has_the_target(name, norm):
    net, image = linear(), torch.rand(N, 1, 7, 7, generator=stream(2, "image"))
    net[1].bias.copy_(-0.5 * net[1].weight.sum(1))
    label = net(image).argmax(1)
    target = (label + 1) % K
    assert torch.isin(target, label).all()
    attack = parse_attack(f"{name}-1500")
    closest, distance = attack.minimal(net, image, label, norm, target=target, generator=stream(0, "a"))
    assert (net(closest).argmax(1) == target).all()
    _, exact = parse_attack("fab-t").minimal(net, image, label, norm, target=target)
    assert (distance > exact * 0.8).all()  # FAB itself is not exact
    assert (distance / exact).median() < 1.3


def test_square_goes_on_past_other_wrong_classes():
    """Every image is wrong from the start, and none shows its target."""
    wrong = (LABEL + 1) % K
    target = (LABEL + 2) % K
    attack, threat = Square(queries=3000), ThreatModel("linf", 0.3)
    made = attack(NET, IMAGE, wrong, threat, target=target, generator=stream(0, "a"))
    assert (NET(made).argmax(1) == target).all()


def test_pgd_climbs_what_a_caller_would_give_it():
    threat, attack = ThreatModel("l2", 0.2), PGD(steps=7)
    asked = attack(NET, IMAGE, LABEL, threat, target=TARGET, generator=stream(0, "a"))
    given = attack(
        NET, IMAGE, LABEL, threat, loss=lambda z: -cross_entropy(z, TARGET), generator=stream(0, "a")
    )
    assert torch.equal(asked, given)


@given(seed=st.integers(0, 1000), k=st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_losses_of_a_goal_are_the_negatives_of_those_of_its_class(seed, k):
    logits = torch.randn(9, k, generator=stream(seed, "z"))
    classes = torch.randint(k, (9,), generator=stream(seed, "c"))
    for loss in (cross_entropy, margin):
        torch.testing.assert_close(loss(logits, to_reach(classes)), -loss(logits, classes))
    assert torch.equal(margin(logits, to_reach(classes)) > 0, fooled(logits, to_reach(classes)))
    assert torch.equal(fooled(logits, to_reach(classes)), ~fooled(logits, classes))


def test_a_transfer_aims_at_the_target_on_both_networks():
    other = linear()
    other[1].weight.add_(0.3 * torch.randn(other[1].weight.shape, generator=stream(3, "n")))
    attack = Transfer((other, NET), PGD(steps=20, loss="margin"))
    made = attack(NET, IMAGE, LABEL, ThreatModel("linf", 0.3), target=TARGET, generator=stream(0, "a"))
    assert (NET(made).argmax(1) == TARGET).all()


class Own(Attack):
    """An attack that knows labels alone."""

    name = "own"

    def run(self, net, image, label, threat, context):
        return image


@pytest.mark.parametrize(
    ("attack", "target", "word"),
    [
        (PGD(), TARGET[:3], "int64 [3]"),
        (PGD(), TARGET.float(), "float32"),
        (PGD(), -TARGET - 1, "from 0"),
        (PGD(), TARGET.tolist(), "a list"),
        *((parse_attack(name), TARGET + 1, "from 0 to 3") for name in BY_NAME),
        (PGD(loss="kl"), TARGET, "ce or margin"),
        (Own(), TARGET, "own has no targeted form"),
        (Transfer(NET, Own()), TARGET, "own has no targeted form"),
    ],
)
def test_targets_that_do_not_fit_are_refused(attack, target, word):
    with pytest.raises(SettingError) as error:
        attack(NET, IMAGE, LABEL, ThreatModel(), target=target)
    assert word in str(error.value)


@pytest.mark.parametrize("name", ["fmn", "fab-t", "hop-skip-jump-20"])
def test_a_search_for_the_closest_image_refuses_what_is_no_class(name):
    with pytest.raises(SettingError, match=r"^attack\.target: got 4; accepted: .* from 0 to 3"):
        parse_attack(name).minimal(NET, IMAGE, LABEL, "linf", target=torch.full((N,), 4))


def test_a_target_beside_a_loss_is_refused():
    with pytest.raises(SettingError, match=r"attack\.target: got a target and a loss"):
        PGD()(NET, IMAGE, LABEL, ThreatModel(), target=TARGET, loss=lambda z: margin(z, LABEL))


def test_an_image_feels_no_other_in_a_targeted_search():
    for name in ("fab-t", "fmn", "deepfool"):
        attack = parse_attack(name)
        assert isinstance(attack, MinimalAttack)
        order = torch.randperm(N, generator=stream(5, "o"))
        _, whole = attack.minimal(NET, IMAGE, LABEL, "l2", target=TARGET)
        _, mixed = attack.minimal(NET, IMAGE[order], LABEL[order], "l2", target=TARGET[order])
        torch.testing.assert_close(mixed, whole[order])
