"""On a linear two-class network the best perturbation is known in closed form; every attack must reach it."""

import pytest
import torch
from torch import nn

from softdefend.attacks import FGSM, PGD, cross_entropy, kl_from, margin
from softdefend.attacks.names import parse_attack
from softdefend.errors import SettingError
from softdefend.rng import stream
from softdefend.threat import Budget, ThreatModel

SHAPE = (6, 1, 3, 3)


def linear(seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(2, 9, generator=stream(seed, "w")))
    return net


def optimum(
    net: nn.Sequential, image: torch.Tensor, label: torch.Tensor, norm: str, eps: float
) -> torch.Tensor:
    """The largest margin loss over the ball (the box does not bind): margin + eps * dual norm of slope."""
    slope = net[1].weight.detach()
    direction = slope[1 - label] - slope[label]
    dual = direction.abs().sum(1) if norm == "linf" else direction.norm(dim=1)
    return margin(net(image).detach(), label) + eps * dual


@pytest.fixture
def case():
    image = 0.4 + 0.2 * torch.rand(SHAPE, generator=stream(1, "x"))
    return linear(), image, torch.tensor([0, 1, 0, 1, 1, 0])


ATTACKS = [
    PGD(steps=60, step_size=Budget(0.01)),
    PGD(steps=60, step_size=Budget(0.01), loss="margin", start="none"),
    PGD(steps=60, step_size=Budget(0.01), restarts=2, keep="best"),
    PGD(steps=60, step_size=Budget(0.01), start="gaussian"),
    PGD(steps=60, step_size=Budget(0.01), start="uniform-unclipped"),
    FGSM(),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a.name}-{getattr(a, 'start', '')}")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_reaches_the_closed_form_optimum(case, attack, norm):
    net, image, label = case
    threat = ThreatModel(norm, Budget(0.1))
    adversarial = attack(net, image, label, threat, generator=stream(0, "a"))
    reached = margin(net(adversarial).detach(), label)
    torch.testing.assert_close(reached, optimum(net, image, label, norm, 0.1), atol=2e-3, rtol=0)


def test_kl_attack_moves_predictions_as_far_as_any_corner(case):
    """In l-inf the divergence of a two-class linear network is largest at one of two opposite corners."""
    net, image, label = case
    threat = ThreatModel("linf", Budget(0.1))
    adversarial = PGD(steps=60, step_size=Budget(0.01), loss="kl", restarts=8)(
        net, image, label, threat, generator=stream(0, "a")
    )
    far = kl_from(net(image))
    slope = net[1].weight.detach()
    corner = 0.1 * (slope[1] - slope[0]).sign().view(1, 1, 3, 3)
    best = torch.maximum(far(net(image + corner)), far(net(image - corner)))
    torch.testing.assert_close(far(net(adversarial)), best, atol=2e-3, rtol=0)


def test_a_given_loss_replaces_the_attacks_own(case):
    """Climbing minus the cross-entropy must end at the least harmful corner."""
    net, image, label = case
    threat = ThreatModel("linf", Budget(0.1))
    adversarial = PGD(steps=60, step_size=Budget(0.01), start="none")(
        net, image, label, threat, loss=lambda logits: -cross_entropy(logits, label)
    )
    slope = net[1].weight.detach()
    dual = (slope[1 - label] - slope[label]).abs().sum(1)
    reached = margin(net(adversarial).detach(), label)
    torch.testing.assert_close(reached, margin(net(image).detach(), label) - 0.1 * dual, atol=2e-3, rtol=0)


def test_soft_targets_that_are_one_hot_attack_as_labels_do(case):
    net, image, label = case
    threat, attack = ThreatModel("linf", Budget(0.1)), PGD(steps=5)
    soft = nn.functional.one_hot(label, 2).float()
    with_label = attack(net, image, label, threat, generator=stream(0, "a"))
    assert torch.allclose(with_label, attack(net, image, soft, threat, generator=stream(0, "a")))


def test_parameters_get_no_gradient_and_modes_stay(case):
    net, image, label = case
    net.train()
    PGD(steps=3)(net, image, label, ThreatModel(), generator=stream(0, "a"))
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_sample_does_not_feel_its_batch(case):
    net, image, label = case
    attack = PGD(steps=7, start="none")
    threat = ThreatModel("l2", Budget(0.3))
    whole = attack(net, image, label, threat)
    alone = torch.cat([attack(net, image[i : i + 1], label[i : i + 1], threat) for i in range(len(image))])
    torch.testing.assert_close(whole, alone)


def test_best_and_restarts_never_end_lower():
    """On a rugged network, the best iterate is no worse than the last, and restarts help."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 5)).requires_grad_(False)
    net[1].weight.mul_(20)
    image = torch.rand(64, 1, 3, 3, generator=stream(5, "x"))
    label = torch.randint(0, 5, (64,), generator=stream(5, "y"))
    threat = ThreatModel("linf", Budget(0.2))

    def loss(**kwargs):
        attack = PGD(steps=8, step_size=Budget(0.15), **kwargs)
        return cross_entropy(net(attack(net, image, label, threat, generator=stream(0, "a"))), label)

    assert (loss(keep="best") >= loss(keep="last") - 1e-6).all()
    assert (loss(keep="best", restarts=4) >= loss(keep="best") - 1e-6).all()
    assert loss(keep="best", restarts=4).mean() > loss(keep="last").mean()


@pytest.mark.parametrize(
    "name", ["fgsm", "fgsm-margin", "pgd-20", "pgd-50x10", "pgd-20-margin", "pgd-7x2-kl"]
)
def test_names_round_trip(name):
    assert parse_attack(name).name == name


@pytest.mark.parametrize("name", ["pgd", "pgd--3", "pgd-20x", "autoattack-9000", "PGD-20", "pgd-20x0"])
def test_other_names_are_refused(name):
    with pytest.raises(SettingError, match=r"attacks|attack\.restarts"):
        parse_attack(name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"restarts": 0},
        {"step_size": "0"},
        {"start": "somewhere"},
        {"loss": "mse"},
        {"keep": "first"},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=f"attack.{next(iter(wrong))}"):
        PGD(**wrong)
