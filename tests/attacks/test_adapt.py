"""Networks with another backward pass, and averages over random numbers, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from softdefend.attacks import CWL2, FGSM, FMN, PGD, Transfer, adapt, value_and_gradient
from softdefend.attacks.names import parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import Resident, split
from softdefend.evaluation import Evaluator

IMAGE = torch.rand(6, 1, 4, 4, generator=stream(0, "image"))
LABEL = torch.tensor([0, 1, 2, 0, 1, 2])


class Rounded(nn.Module):
    """Pixels on four levels; in place if asked."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(3).round_().div_(3) if self.in_place and not x.requires_grad else (3 * x).round() / 3


def linear() -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(3, 16, generator=stream(0, "weight")))
    net[1].bias.zero_()
    return net.eval()


def rounded(in_place: bool = False) -> nn.Sequential:
    return nn.Sequential(Rounded(in_place), nn.Tanh(), linear()).eval()


def first(logits: Tensor) -> Tensor:
    return logits[:, 0]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_replaced_layer_answers_in_the_same_bits_with_the_gradient_of_its_stand_in(in_place):
    net = rounded()
    adapted = adapt(rounded(in_place), backward={"0": lambda x: 2 * x})
    assert torch.equal(adapted(IMAGE), net(IMAGE))
    value, grad = value_and_gradient(adapted, first, IMAGE)
    assert torch.equal(value, net(IMAGE)[:, 0])
    assert not value_and_gradient(net, first, IMAGE)[1].any()
    at = torch.tanh((3 * IMAGE).round() / 3)
    wanted = 2 * (1 - at**2) * net[2][1].weight[0].view(1, 1, 4, 4)
    torch.testing.assert_close(grad, wanted)


def test_a_whole_network_has_the_gradient_of_its_stand_in():
    net, other = rounded(), linear()
    adapted = adapt(net, backward=other)
    assert torch.equal(adapted(IMAGE), net(IMAGE))
    torch.testing.assert_close(
        value_and_gradient(adapted, first, IMAGE)[1], value_and_gradient(other, first, IMAGE)[1]
    )


def test_a_layer_that_stands_twice_in_a_network_is_replaced_in_both_places():
    layer = Rounded()
    net = nn.Sequential(layer, nn.Tanh(), layer, linear())
    grad = value_and_gradient(adapt(net, backward={"2": "identity"}), first, IMAGE)[1]
    at = (3 * IMAGE).round() / 3
    wanted = (1 - torch.tanh(at) ** 2) * net[3][1].weight[0].view(1, 1, 4, 4)
    torch.testing.assert_close(grad, wanted)


def test_the_network_is_left_alone_and_its_parameters_are_shared():
    net = rounded()
    before = net(IMAGE)
    adapted = adapt(net, backward={"0": "identity"})
    assert not value_and_gradient(net, first, IMAGE)[1].any()
    assert {id(p) for p in adapted.parameters()} == {id(p) for p in net.parameters()}
    net[2][1].bias.add_(1)
    torch.testing.assert_close(adapted(IMAGE), before + 1)


def test_a_quantized_linear_network_falls_where_the_linear_one_does():
    net = nn.Sequential(Rounded(), linear()).eval()
    label, threat = net(IMAGE).argmax(1), ThreatModel("linf", Budget("0.3"))
    data = Resident(split(IMAGE, label), torch.device("cpu"))
    attack = PGD(steps=20, start="none", loss="margin")
    direct, adaptive = attack, Transfer(adapt(net, backward={"0": "identity"}), attack, "bpda")
    result = Evaluator(net, data, threat)([direct, adaptive])
    assert result.robust(direct.name).rate == 1
    assert result.robust(adaptive.name).rate < 0.5


class InTurn(nn.Module):
    """Logits from weights that change from call to call, as those of a network that draws random numbers."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights, self.calls = weights, 0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weights[self.calls % len(self.weights)]
        self.calls += 1
        return x.flatten(1) @ weight.T


def test_logits_and_gradients_are_averaged_over_the_networks_draws():
    weights = torch.randn(4, 3, 16, generator=stream(0, "turns"))
    net = InTurn(weights)
    adapted = adapt(net, eot=4)
    value, grad = value_and_gradient(adapted, first, IMAGE)
    mean = weights.mean(0)
    torch.testing.assert_close(value, (IMAGE.flatten(1) @ mean.T)[:, 0])
    torch.testing.assert_close(grad, mean[0].view(1, 1, 4, 4).expand(6, 1, 4, 4))


def test_the_users_randomness_is_drawn_for_every_forward():
    seen: list[Tensor] = []

    def shifted(image: Tensor) -> Tensor:
        seen.append(image)
        return image + len(seen)

    net = linear()
    made = adapt(net, eot=3, transform=shifted)(IMAGE)
    assert len(seen) == 3
    torch.testing.assert_close(made, net(IMAGE + 2))


@pytest.mark.parametrize("attack", [PGD(steps=1, step_size=Budget("0.1"), start="none", eot=3), FGSM(eot=3)])
def test_an_attack_with_eot_climbs_the_mean_of_the_gradients(attack):
    weights = torch.randn(3, 3, 16, generator=stream(1, "turns"))
    threat = ThreatModel("linf", Budget("0.1"))
    inside = 0.3 + 0.4 * IMAGE
    made = attack(InTurn(weights), inside, LABEL, threat, loss=first)
    torch.testing.assert_close(made, inside + 0.1 * weights.mean(0)[0].sign().view(1, 1, 4, 4))


@pytest.mark.parametrize("name", ["fmn-20", "deepfool", "fab-t-10", "cw-l2", "square-50", "apgd-t-5"])
def test_every_attack_takes_an_adapted_network(name):
    net = nn.Sequential(Rounded(), linear()).eval()
    label = net(IMAGE).argmax(1)
    threat = ThreatModel("l2", Budget("2"))
    adapted = adapt(net, backward={"0": "identity"}, eot=2)
    attack = CWL2(rounds=3, steps=60, lr=0.05, first_c=1.0) if name == "cw-l2" else parse_attack(name)
    made = attack(adapted, IMAGE, label, threat, generator=stream(0, "attack"))
    assert float(threat.distance(IMAGE, made).max()) <= 2 + 1e-5
    assert int((net(made).argmax(1) != label).sum()) >= 3


def test_a_minimal_attack_sees_through_the_rounding():
    net = nn.Sequential(Rounded(), linear()).eval()
    label = net(IMAGE).argmax(1)
    assert FMN().minimal(net, IMAGE, label, "linf")[1].isinf().all()
    found, distance = FMN().minimal(adapt(net, backward={"0": "identity"}), IMAGE, label, "linf")
    fell = distance.isfinite()
    assert int(fell.sum()) >= 5
    assert (net(found)[fell].argmax(1) != label[fell]).all()


@pytest.mark.parametrize(
    ("make", "setting", "given", "accepted"),
    [
        (lambda: adapt(linear(), backward={"2": "identity"}), "backward", "'2'", "0, 1"),
        (lambda: adapt(linear(), backward={"0": "identiti"}), "backward['0']", "'identiti'", "identity"),
        (lambda: adapt(linear(), backward=3), "backward", "3", "function"),
        (lambda: adapt(linear(), eot=0), "eot", "0", ">= 1"),
        (lambda: adapt(linear(), transform=3), "transform", "int", "function"),
        (lambda: adapt(lambda x: x), "net", "function", "Module"),
        (lambda: PGD(eot=0), "attack.eot", "0", ">= 1"),
    ],
    ids=["layer", "word", "number", "eot", "transform", "net", "attack"],
)
def test_bad_input_is_one_line(make, setting, given, accepted):
    with pytest.raises(SettingError) as caught:
        make()
    assert caught.value.setting == setting
    assert given in str(caught.value.given)
    assert accepted in str(caught.value.accepted)


def test_a_stand_in_of_another_shape_is_refused():
    adapted = adapt(rounded(), backward={"0": lambda x: x.flatten(1)})
    with pytest.raises(SettingError, match=r"backward\['0'\]: got .*\[6, 16\].*\[6, 1, 4, 4\]"):
        value_and_gradient(adapted, first, IMAGE)


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("adapted", "said"),
    [
        (
            lambda: adapt(linear(), transform=lambda x: x[:4]),
            "transform: got a function that returns float32 of shape [4,",
        ),
        (lambda: adapt(linear(), transform=lambda x: None), "transform: got a function that returns a None"),
        (lambda: adapt(linear(), backward=lambda x: x[:4, 0, 0, :3]), "backward['net']: got a function that"),
        (lambda: adapt(linear(), backward=lambda x: 3), "backward['net']: got a function that returns a int"),
        (
            lambda: adapt(nn.Sequential(Two()), backward={"0": "identity"}),
            "backward['0']: got a layer that returns a tuple",
        ),
    ],
    ids=["rows", "nothing", "rows of a network", "number", "layer"],
)
def test_a_function_of_the_users_that_does_not_fit_is_one_line(adapted, said):
    with pytest.raises(SettingError) as caught:
        value_and_gradient(adapted(), first, IMAGE)
    assert str(caught.value).startswith(said)
