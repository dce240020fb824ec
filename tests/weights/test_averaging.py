import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from softdefend.core.errors import SettingError
from softdefend.weights import EMA, Plain
from tiny import about


def test_average_follows_the_warmed_up_recursion_in_plain_python():
    """First update copies; then w <- d w + (1 - d) v with d = min(decay, (1 + t) / (10 + t))."""
    net = nn.Linear(2, 1, bias=False)
    rule = EMA(decay=0.6)
    rule.setup(about(net))
    expected = None
    for t, value in enumerate([1.0, 3.0, -2.0, 5.0, 0.5, 4.0]):
        nn.init.constant_(net.weight, value)
        rule.after_step()
        decay = min(0.6, (1 + t) / (10 + t))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        np.testing.assert_allclose(rule.prediction.weight.detach(), expected, rtol=1e-6)
    assert net.weight.unique().item() == 4.0


@pytest.mark.parametrize("bn", ["copy", "average"])
def test_without_a_warmup_it_is_torchs_own_average(bn):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    net[2].weight = nn.Parameter(net[2].weight.detach().T)  # not contiguous
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=bn == "average")
    rule = EMA(decay=0.9, warmup=False, bn=bn)
    rule.setup(about(net))
    for _ in range(4):
        net(torch.randn(8, 3))
        with torch.no_grad():
            for weight in net.parameters():
                weight += torch.randn_like(weight)
        rule.after_step()
        theirs.update_parameters(net)
    ours = rule.prediction.state_dict()
    assert ours.pop("1.num_batches_tracked") == 4
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs.module.state_dict()[name])


def test_batch_statistics_are_the_live_networks():
    net = nn.Sequential(nn.BatchNorm1d(3))
    rule = EMA()
    rule.setup(about(net))
    for seed in range(3):
        torch.manual_seed(seed)
        net(torch.randn(8, 3))
        rule.after_step()
        assert torch.equal(rule.prediction[0].running_mean, net[0].running_mean)
    assert rule.prediction[0].running_mean.data_ptr() != net[0].running_mean.data_ptr()


class Counting(nn.Module):
    """Gives a buffer's name to a new tensor, and has a mask that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]), persistent=False)

    def forward(self) -> None:
        self.seen = self.seen + 1


@pytest.mark.parametrize(("bn", "after_two"), [("copy", 2.0), ("average", 1.5)])
def test_buffers_are_followed_to_other_tensors_and_masks_stay_what_they_are(bn, after_two):
    net, rule = Counting(), EMA(decay=0.5, warmup=False, bn=bn)
    rule.setup(about(net))
    for _ in range(2):
        net()
        rule.after_step()
    assert rule.prediction.seen == after_two
    assert rule.prediction.mask.tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_impossible_decay_is_refused(decay):
    with pytest.raises(SettingError, match=r"weight\.decay"):
        EMA(decay)


def test_the_plain_rule_predicts_with_the_trained_network_itself():
    net, rule = nn.Linear(2, 1), Plain()
    rule.setup(about(net))
    rule.after_step()
    assert rule.prediction is net
    assert rule.state_dict() == {}
