from __future__ import annotations

import math

import torch
from torch import nn

from softdefend.models.layers import conv, global_average, init_kaiming, init_weights


def test_convolutions_start_with_the_fan_out_variance() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(conv(32, 128), nn.BatchNorm2d(128), nn.Linear(128, 10))
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[2].bias)
    bn_weight, linear_weight = net[1].weight.clone(), net[2].weight.clone()
    init_weights(net)
    # 36,864 draws: the standard deviation is known to 0.4%, the mean to 0.5% of it
    assert math.isclose(net[0].weight.std().item(), math.sqrt(2 / (9 * 128)), rel_tol=0.02)
    assert abs(net[0].weight.mean().item()) < 0.03 * math.sqrt(2 / (9 * 128))
    assert not net[2].bias.any()
    torch.testing.assert_close(net[1].weight, bn_weight)
    torch.testing.assert_close(net[2].weight, linear_weight)


def test_redrawn_convolutions_leave_the_rest_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(conv(32, 128), nn.BatchNorm2d(128), nn.Linear(128, 10))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    init_kaiming(net)
    assert [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])] == [
        "0.weight"
    ]


def test_convolution_keeps_the_size_and_has_no_bias() -> None:
    image = torch.rand(1, 2, 9, 6)
    assert conv(2, 4)(image).shape == (1, 4, 9, 6)
    assert conv(2, 4, kernel=1)(image).shape == (1, 4, 9, 6)
    assert conv(2, 4, stride=2)(image).shape == (1, 4, 5, 3)
    assert conv(2, 4).bias is None


def test_global_average_is_the_mean_of_each_channel() -> None:
    features = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    expected = [[sum(channel.flatten().tolist()) / 20 for channel in sample] for sample in features]
    torch.testing.assert_close(global_average(features), torch.tensor(expected))
