from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.analysis.gradient_norms import (
    last_layer,
    last_layer_norms,
    memorisation,
    spread,
    whole_network_norms,
)
from softdefend.core.errors import SettingError


def network(bias: bool = True) -> nn.Module:
    """With batch normalization whose running statistics are not those of any batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 8),
            nn.ReLU(),
            nn.Linear(8, 3, bias=bias),
        )
        for _ in range(3):
            net(torch.rand(16, 1, 4, 4))
    return net.eval()


@pytest.fixture
def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(7, 1, 4, 4, generator=generator)
    return image, torch.rand(7, 3, generator=generator).softmax(dim=1)


def naive(net: nn.Module, parameters: list[nn.Parameter], image: Tensor, target: Tensor) -> Tensor:
    """One backward pass for each sample."""
    norms = []
    for x, t in zip(image, target, strict=True):
        loss = -(t * F.log_softmax(net(x[None]), dim=1)[0]).sum()
        norms.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).norm())
    return torch.stack(norms)


@pytest.mark.parametrize("bias", [True, False])
def test_the_closed_form_is_the_gradient_of_the_last_layer(samples, bias):
    net, (image, target) = network(bias), samples
    norms = last_layer_norms(last_layer(net, image, batch_size=3), target)
    torch.testing.assert_close(norms, naive(net, list(net[-1].parameters()), image, target))


@pytest.mark.parametrize("chunk", [2, 16])
def test_the_whole_networks_norm_is_that_of_one_backward_pass_each(samples, chunk):
    net, (image, target) = network(), samples
    norms = whole_network_norms(net, image, target, chunk)
    torch.testing.assert_close(norms, naive(net, list(net.parameters()), image, target))


def test_frozen_parameters_have_the_same_norms(samples):
    net, (image, target) = network(), samples
    before = whole_network_norms(net, image, target)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(whole_network_norms(net, image, target), before)


def test_networks_that_do_not_end_in_a_linear_layer_are_refused(samples):
    image, _ = samples
    with pytest.raises(SettingError, match="without a linear layer"):
        last_layer(nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), image, 4)
    with pytest.raises(SettingError, match="does not give the logits"):
        last_layer(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Softplus()), image, 4)


def test_the_share_of_wrong_samples_is_their_part_of_the_sum():
    found = spread(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([False, True, False, True]))
    assert found["share_of_wrong"] == pytest.approx(0.6)
    assert found["fraction_wrong"] == 0.5
    assert (found["right_mean"], found["wrong_mean"]) == (2.0, 3.0)
    assert (found["wrong_quantiles"][0], found["wrong_quantiles"][-1]) == (2.0, 4.0)


def test_nothing_is_said_of_wrong_samples_where_there_are_none_or_nothing_is_known():
    norms = torch.tensor([1.0, 3.0])
    assert "share_of_wrong" not in spread(norms, None)
    found = spread(norms, torch.zeros(2, dtype=torch.bool))
    assert (found["share_of_wrong"], found["wrong_mean"], found["wrong_quantiles"]) == (0.0, None, None)


def test_fitted_and_recovered_are_shares_of_the_wrong_samples():
    given, truth = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 0, 1])
    said = torch.tensor([0, 1, 0, 2])
    found = memorisation(said, given, given != truth, truth)
    assert found == {"wrong": 3, "fitted": pytest.approx(1 / 3), "recovered": pytest.approx(1 / 3)}
    assert memorisation(said, given, torch.zeros(4, dtype=torch.bool), None) == {"wrong": 0, "fitted": None}
