"""Blocks whose activations are computed again: the same numbers, with less kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import softdefend
from softdefend import AWP, DAJAT, EMA, PGD, PGDAT, SGLR, Hard, OptimSettings
from softdefend.core.errors import SettingError
from softdefend.models import NetSettings, build
from softdefend.models.recompute import recompute_blocks
from softdefend.training import RuntimeSettings, ValidateSettings
from softdefend.training.optim import state_tensors
from tiny import K


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.Dropout(0.2),
        )

    def forward(self, x, scale=1.0):
        return x + scale * self.drop(F.relu(self.bn(self.conv(x))))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.blocks(x)


def deep_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stem, head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, K)
        return nn.Sequential(
            stem, nn.ModuleList([Stage(), Stage()])[0], Stage(), nn.AvgPool2d(6), nn.Flatten(), head
        )


def saved_bytes(net: nn.Module, image: torch.Tensor) -> int:
    """Bytes of distinct tensors that autograd keeps of a forward."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(image).sum()
    del loss
    return sum(kept.values())


def gradients(net: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    image = image.clone().requires_grad_(True)
    torch.manual_seed(5)
    loss = net(image).square().sum() + net(image).sum()  # two forwards, as TRADES makes them
    return list(torch.autograd.grad(loss, [image, *net.parameters()]))


@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_statistics_are_those_of_the_plain_network(training):
    plain, image = deep_net().train(training), torch.rand(4, 1, 6, 6)
    other = copy.deepcopy(plain)
    assert recompute_blocks(other) == 4
    for one, two in zip(gradients(plain, image), gradients(other, image), strict=True):
        assert torch.equal(one, two)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert saved_bytes(other, image) < 0.5 * saved_bytes(plain, image)


def test_copies_compute_with_their_own_weights():
    net = deep_net().eval()
    recompute_blocks(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    image = torch.rand(2, 1, 6, 6).requires_grad_(True)
    assert net(image).abs().sum() == 0
    torch.testing.assert_close(other(image), deep_net().eval()(image))


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("preact_resnet18", 8), ("wrn28_10", 12)])
def test_the_built_in_networks_have_blocks(name, blocks):
    with torch.device("meta"):
        net = build(NetSettings(name), num_classes=10, in_channels=3, mean=[0.5] * 3, std=[0.2] * 3)
    assert recompute_blocks(net) == blocks
    assert recompute_blocks(net) == 0  # all of them have been found
    assert {type(m).__name__ for m in net.modules()} >= {
        "PreActBlock" if name != "resnet18" else "BasicBlock"
    }


@pytest.mark.parametrize(
    "rules",
    [(SGLR, PGDAT, EMA), (Hard, PGDAT, AWP), (Hard, DAJAT, AWP)],
    ids=["sglr-ema", "awp", "dajat-awp"],
)
def test_a_run_ends_in_the_same_bits(make_trainer, rules):
    label, objective, weight = rules
    runs = []
    for recompute in (False, True):
        runtime = RuntimeSettings(device="cpu", threads=1, recompute=recompute)
        trainer = make_trainer(
            label(), objective(), weight(), f"recompute-{recompute}", net=deep_net(), runtime=runtime
        )
        trainer.fit()
        runs.append(trainer)
    for one, two in zip(*(state_tensors(run.optimizer) for run in runs), strict=True):
        assert torch.equal(one, two)
    for kind in ("objective", "prediction"):
        recipes = [run.recipe for run in runs]
        one, two = (
            (recipe.objective if kind == "objective" else recipe.weight.prediction).state_dict()
            for recipe in recipes
        )
        assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_network_trained_from_python_is_of_its_own_classes_again(tmp_path):
    """Else it could not be pickled, and would go on computing its blocks twice."""
    net = deep_net()
    before = [type(module) for module in net.modules()]
    softdefend.train(
        net,
        (torch.rand(40, 1, 6, 6), torch.arange(40) % K),
        folder=tmp_path / "run",
        attack=PGD(steps=1),
        optim=OptimSettings(epochs=1, batch_size=8, lr=0.05),
        validate=ValidateSettings(attack=PGD(steps=1)),
        runtime=RuntimeSettings(device="cpu", threads=1, recompute=True),
        progress=False,
    )
    assert [type(module) for module in net.modules()] == before
    pickle.dumps(net)


def test_a_network_that_was_refused_is_of_its_own_classes_again(tmp_path):
    """Found where the trainer is set up, after the blocks are: weights of another network."""
    net = deep_net()
    before = [type(module) for module in net.modules()]
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(SettingError, match=r"other\.pt"):
        softdefend.train(
            net,
            (torch.rand(40, 1, 6, 6), torch.arange(40) % K),
            folder=tmp_path / "run",
            optim=OptimSettings(epochs=1, batch_size=8),
            runtime=RuntimeSettings(device="cpu", threads=1, recompute=True),
            init_from=str(tmp_path / "other.pt"),
            progress=False,
        )
    assert [type(module) for module in net.modules()] == before


def test_a_network_without_blocks_is_refused():
    with pytest.raises(SettingError, match=r"runtime\.recompute: got true with Sequential"):
        recompute_blocks(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
