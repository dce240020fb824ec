from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import update_bn

from softdefend import PGDAT, SGLR, Hard, OptimSettings
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.weights import AWP, EMA, SWA, Plain
from softdefend.weights.averaging import reestimate
from tiny import about

IMAGES = torch.randn(24, 2, 5, 5, generator=stream(0, "img"))


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(3, 4, 2),
        nn.BatchNorm2d(4),
    )


def passes(size: int = 8):
    return lambda: iter(torch.split(IMAGES, size))


def no_images():
    raise AssertionError("a pass over the images that nothing needs")


@pytest.mark.parametrize(
    ("start", "every", "averaged"),
    [(0.0, 1, (0, 1, 2, 3, 4, 5)), (0.5, 1, (3, 4, 5)), (0.3, 2, (2, 4)), (1.0, 1, (5,))],
)
def test_the_average_is_numpys_mean_of_the_epochs_last_weights(start, every, averaged):
    net = nn.Linear(3, 2)
    rule = SWA(start, every)
    rule.setup(about(net, epochs=6))
    snapshots: list[np.ndarray] = []
    for epoch in range(6):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=stream(epoch, "w")))
        rule.after_step()
        rule.end_epoch(epoch, no_images)
        if epoch in averaged:
            snapshots.append(net.weight.detach().double().numpy().copy())
        if snapshots:
            np.testing.assert_allclose(rule.prediction.weight.detach(), np.mean(snapshots, 0), atol=1e-6)
        else:
            assert rule.prediction is net


def test_epoch_55_of_200_is_the_reference_start():
    rule = SWA()
    rule.setup(about(network(), epochs=200))
    assert rule.first_epoch == 55


def test_statistics_are_those_of_one_pass_computed_by_hand():
    """Equal batches: the mean of all activations, and the mean of the batches' unbiased variances; the second
    layer's inputs are normalized by each batch's own statistics."""
    net = network()
    net(5 + 3 * IMAGES)  # other statistics to forget
    reestimate(net, passes(8))
    first, second = net[1], net[5]
    means: list[list[np.ndarray]] = [[], []]
    variances: list[list[np.ndarray]] = [[], []]
    for batch in torch.split(IMAGES, 8):
        before = net[0](batch).detach().numpy().astype(np.float64)
        flat = before.transpose(1, 0, 2, 3).reshape(3, -1)
        means[0].append(flat.mean(1))
        variances[0].append(flat.var(1, ddof=1))
        normal = (before - flat.mean(1)[:, None, None]) / np.sqrt(flat.var(1) + first.eps)[:, None, None]
        after = net[4](torch.tensor(np.maximum(normal, 0), dtype=torch.float32)).detach().double().numpy()
        flat = after.transpose(1, 0, 2, 3).reshape(4, -1)
        means[1].append(flat.mean(1))
        variances[1].append(flat.var(1, ddof=1))
    for layer, mean, variance in zip((first, second), means, variances, strict=True):
        np.testing.assert_allclose(layer.running_mean, np.mean(mean, 0), atol=1e-6)
        np.testing.assert_allclose(layer.running_var, np.mean(variance, 0), rtol=1e-5)
        assert int(layer.num_batches_tracked) == 3


@pytest.mark.parametrize("size", [8, 7])
def test_statistics_are_torchs_where_nothing_else_differs(size):
    """Without dropout, also where the last batch is smaller."""
    ours, theirs = network(), network()
    reestimate(ours, passes(size))
    update_bn(passes(size)(), theirs)
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


def test_measuring_draws_nothing_keeps_no_graph_and_leaves_momentum_and_mode():
    net, plain = network(dropout=0.5), network()
    net[1].track_running_stats = False  # as a step leaves it that looks without counting
    state = torch.get_rng_state()
    seen = []
    net.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    reestimate(net, passes())
    reestimate(plain, passes())
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [False] * 3
    assert [net[i].momentum for i in (1, 5)] == [0.1, 0.1]
    assert not any(module.training for module in net.modules())
    for mine, other in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, other)


def test_copy_takes_the_plain_networks_statistics_without_a_pass():
    net, rule = network(), SWA(0.0, bn="copy")
    rule.setup(about(net))
    net(IMAGES)
    rule.end_epoch(0, no_images)
    for mine, other in zip(rule.prediction.buffers(), net.buffers(), strict=True):
        assert torch.equal(mine, other)
    assert rule.prediction is not net


def test_only_the_average_is_measured_anew():
    net, rule = network(), SWA(0.0)
    rule.setup(about(net))
    net(IMAGES)
    before = copy.deepcopy(net)
    rule.end_epoch(0, passes())
    assert all(torch.equal(*pair) for pair in zip(net.buffers(), before.buffers(), strict=True))
    assert not torch.equal(rule.prediction[1].running_mean, net[1].running_mean)


def test_a_run_predicts_with_the_mean_of_its_epochs_and_with_statistics_of_all_its_images(make_trainer):
    trainer = make_trainer(
        SGLR(), PGDAT(), SWA(start=0.4), optim=OptimSettings(epochs=5, batch_size=16, lr=0.1)
    )
    ends, count = [], []

    def keep(row):
        ends.append([p.detach().double().numpy().copy() for p in trainer.net.parameters()])
        count.append(int(trainer.recipe.weight.averaged.n_averaged))

    trainer.fit(on_epoch=keep)
    assert count == [0, 0, 1, 2, 3]
    means = [np.mean(values, axis=0) for values in zip(*ends[2:], strict=True)]
    for ours, mean in zip(trainer.recipe.weight.prediction.parameters(), means, strict=True):
        np.testing.assert_allclose(ours.detach(), mean, atol=1e-6)
    net = copy.deepcopy(trainer.recipe.weight.prediction)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    update_bn(iter(torch.split(trainer.train_data.take(torch.arange(48)).image, 16)), net)
    for ours, theirs in zip(trainer.recipe.weight.prediction.buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


class KeptInEval(nn.BatchNorm2d):
    """Frozen by its own ``train``, as detection networks have it."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def freeze(layer: nn.Module) -> nn.Module:
    """In eval mode and without trainable parameters; statistics that no image has."""
    layer.running_mean.fill_(0.25)
    layer.running_var.fill_(2.0)
    return layer.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, KeptInEval])
@pytest.mark.parametrize("weight", [SWA(start=0.4), Plain(), AWP(average=SWA(start=0.4)), EMA()])
def test_frozen_batch_normalization_is_the_same_at_the_end_of_a_run(make_trainer, make_net, kind, weight):
    """In training too: the layers behind it learn with the statistics that the last file has."""
    net = make_net()
    net.insert(1, freeze(kind(8)))  # in front of the network's own, which is not frozen
    before = {name: value.clone() for name, value in net[1].state_dict().items()}
    optim = OptimSettings(epochs=3, batch_size=16, lr=0.1)
    trainer = make_trainer(Hard(), PGDAT(), weight, net=net, optim=optim)
    modes = []
    net[1].register_forward_hook(lambda layer, *_: modes.append(layer.training))
    trainer.fit()
    assert not any(modes)
    for file in ("best", "last"):
        saved = load_file(trainer.folder.path / f"{file}.safetensors")
        for name, value in before.items():
            assert torch.equal(saved[f"1.{name}"], value), (file, name)
        assert not torch.equal(saved["2.running_mean"], make_net()[1].running_mean)


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, KeptInEval])
def test_a_frozen_layer_is_not_measured_anew(kind, root):
    net, plain = network(), network()
    net[1] = freeze(kind(3))
    net.training = root
    reestimate(net, passes())
    reestimate(plain, passes())
    assert torch.equal(net[1].running_mean, torch.full((3,), 0.25))
    assert torch.equal(net[1].running_var, torch.full((3,), 2.0))
    assert int(net[5].num_batches_tracked) == 3
    assert not torch.equal(net[5].running_mean, plain[5].running_mean)  # of what the frozen layer gives


def test_a_layer_without_trainable_parameters_that_is_in_train_mode_is_not_frozen(make_trainer, make_net):
    net = make_net()
    net[1].requires_grad_(False)
    trainer = make_trainer(Hard(), PGDAT(), SWA(start=0.0), net=net)
    trainer.fit()
    assert int(net[1].num_batches_tracked) == 9
    assert int(trainer.recipe.weight.prediction[1].num_batches_tracked) == 3  # one pass of three batches


def test_a_network_in_eval_mode_that_learns_is_not_frozen(make_trainer, make_net):
    net = make_net().eval()
    trainer = make_trainer(Hard(), PGDAT(), net=net)
    trainer.fit()
    assert int(net[1].num_batches_tracked) == 9


def test_state_survives_with_its_statistics_and_count():
    net = network()
    first, second = SWA(0.0), SWA(0.0)
    for rule in (first, second):
        rule.setup(about(net))
    for epoch in range(2):
        with torch.no_grad():
            net[0].weight.add_(1.0)
        first.end_epoch(epoch, passes())
    second.load_state_dict(first.state_dict())
    for rule in (first, second):
        rule.end_epoch(2, passes())
    pairs = zip(first.prediction.state_dict().items(), second.prediction.state_dict().values(), strict=True)
    for (name, ours), theirs in pairs:
        assert torch.equal(ours, theirs), name


def test_validation_before_the_first_average_is_of_the_plain_network(make_trainer):
    rows = {}
    for name, rule in (("plain", None), ("swa", SWA(start=1.0))):
        trainer = make_trainer(Hard(), PGDAT(), rule, folder=name)
        rows[name] = []
        trainer.fit(on_epoch=rows[name].append)
    assert rows["plain"][:2] == rows["swa"][:2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": -0.1}, "weight.start: got -0.1; accepted: a number in [0, 1]"),
        ({"every": 0}, "weight.every: got 0; accepted: a whole number >= 1"),
        ({"bn": "none"}, "weight.bn: got 'none'; accepted: reestimate or copy"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(SettingError) as caught:
        SWA(**wrong)
    assert str(caught.value) == message
