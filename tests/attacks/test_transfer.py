"""Transfer attacks: made on one network, judged on another."""

import pytest
import torch
from minimal_tools import images, rugged
from torch import nn

from softdefend.attacks import FMN, PGD, Attack, Transfer, cross_entropy, margin
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel

THREAT = ThreatModel("linf", Budget("0.05"))
INNER = PGD(steps=5, loss="margin")


def surrogate(seed=1):
    """Another network of the same shape, with BatchNorm and dropout, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5)
        )
    return net.double()


@pytest.fixture
def case():
    net, image = rugged((1, 6, 6)), images(20, (1, 6, 6))
    return net, image, net(image).argmax(1)


def test_returns_what_the_inner_attack_makes_of_the_surrogate(case):
    _, image, label = case
    other = surrogate()

    def judge(x):
        assert not x.requires_grad  # asked for logits only
        return case[0](x)

    got = Transfer(other, INNER)(judge, image, label, THREAT, generator=stream(0, "a"))
    other.eval()
    expected = INNER(other, image, label, THREAT, generator=stream(0, "a"))
    assert torch.equal(got, expected)
    assert not torch.equal(got, image)


def test_the_surrogate_is_put_back_module_by_module(case):
    net, image, label = case
    other = surrogate().train()
    other[2].eval()
    other[5].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    seen = []

    class Looks(Attack):
        name = "looks"

        def run(self, net, image, label, threat, context):
            seen.append(
                (any(m.training for m in other.modules()), any(p.requires_grad for p in other.parameters()))
            )
            net(image)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        Transfer(other, Looks())(net, image, label, THREAT)
    assert seen == [(False, False)]
    Transfer(other, INNER)(net, image, label, THREAT)
    assert [m.training for m in other.modules()] == [True, True, True, False, True, True, True]
    assert [p.requires_grad for p in other.parameters()] == [True, True, True, True, False, True]
    assert all(p.grad is None for p in other.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_of_several_surrogates_each_image_gets_the_worst(case):
    net, image, label = case
    nets = tuple(surrogate(seed) for seed in (1, 2, 3))
    inner = PGD(steps=5, loss="margin", start="none")
    alone = torch.stack([margin(net(Transfer(one, inner)(net, image, label, THREAT)), label) for one in nets])
    together = Transfer(nets, inner)(net, image, label, THREAT)
    torch.testing.assert_close(margin(net(together), label), alone.amax(0))
    assert len(set(alone.argmax(0).tolist())) == 3
    assert (THREAT.distance(image, together) <= 0.05 + 1e-12).all()


def test_on_the_network_itself_it_is_the_inner_attack(case):
    net, image, label = case
    for attack in (INNER, FMN(steps=20)):
        made = Transfer(net, attack)(net, image, label, THREAT, generator=stream(0, "a"))
        assert torch.equal(made, attack(net, image, label, THREAT, generator=stream(0, "a")))


def test_a_given_loss_is_what_the_surrogate_is_attacked_with(case):
    net, image, label = case
    other, inner = surrogate(), PGD(steps=5, start="none")
    best = Transfer(other, inner)(
        net, image, label, THREAT, loss=lambda logits: -cross_entropy(logits, label)
    )
    other.eval()
    assert (cross_entropy(other(best), label) <= cross_entropy(other(image), label)).all()


def test_soft_targets_name_the_class(case):
    net, image, label = case
    soft = 0.9 * nn.functional.one_hot(label, 5).double() + 0.02
    made = Transfer(net, FMN(steps=10))(net, image, soft, THREAT)
    assert torch.equal(made, Transfer(net, FMN(steps=10))(net, image, label, THREAT))


def test_the_name_tells_the_inner_attack_and_the_source():
    net = surrogate()
    assert Transfer(net, PGD(steps=20)).name == "transfer-pgd-20"
    assert Transfer((net, net), FMN(), source="vgg").name == "transfer-fmn-vgg"


@pytest.mark.parametrize("wrong", [(), "resnet18", ("resnet18",)])
def test_what_is_no_network_is_refused(wrong):
    with pytest.raises(SettingError, match=r"attack\.surrogate"):
        Transfer(wrong, INNER)


def test_a_surrogate_with_other_classes_is_refused(case):
    net, image, label = case
    other = rugged((1, 6, 6), k=7)
    with pytest.raises(
        SettingError, match=r"attack\.surrogate: got a network with 7 classes; accepted: the 5"
    ):
        Transfer(other, INNER)(net, image, label, THREAT)
