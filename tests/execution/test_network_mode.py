import pytest
import torch
from torch import nn

from softdefend.execution.network_mode import frozen, kernel_search, set_mode, tf32


def make() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5))


IMAGE = torch.arange(32.0).view(2, 1, 4, 4) / 32


@pytest.mark.parametrize(
    ("mode", "updates", "uses_batch"), [("train", True, True), ("batch", False, True), ("eval", False, False)]
)
def test_each_mode_uses_and_moves_the_statistics_it_says(mode, updates, uses_batch):
    net = make()
    set_mode(net, mode)
    hidden = net[1](net[0](IMAGE))
    mean = hidden.mean(dim=(0, 2, 3))
    assert torch.allclose(mean, torch.zeros(3), atol=1e-5) == uses_batch
    assert (net[1].running_mean.abs().sum() > 0) == updates
    assert int(net[1].num_batches_tracked) == int(updates)


def test_batch_mode_does_not_stick():
    net = make()
    set_mode(net, "batch")
    set_mode(net, "train")
    net(IMAGE)
    assert int(net[1].num_batches_tracked) == 1


@pytest.mark.parametrize("training", [True, False])
def test_an_attack_leaves_mode_and_frozen_parameters_as_they_were(training):
    net = make().train(training)
    net[0].bias.requires_grad_(False)

    def fail_inside():
        with frozen(net, "eval"):
            assert not any(p.requires_grad for p in net.parameters())
            assert not net.training
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert net.training is training
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True]


def test_tf32_is_put_back():
    before = torch.backends.cudnn.allow_tf32
    with tf32(not before):
        assert torch.backends.cudnn.allow_tf32 is not before
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("allowed", [True, False])
def test_kernels_are_tried_again_only_where_they_were(monkeypatch, before, allowed):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    with kernel_search(allowed):
        assert torch.backends.cudnn.benchmark is allowed
    assert torch.backends.cudnn.benchmark is before
