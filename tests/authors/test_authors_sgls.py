"""SGLR and PGD-AT beside the authors' published code (devicerxx/SGLS)."""

from __future__ import annotations

import pytest
import torch

from beside import EPOCHS, K, assert_same_network, load, needs, network, ours, same, sgd, theirs
from softdefend import PGDAT, SGLR, Hard
from softdefend.models import NetSettings, build

pytestmark = needs("SGLS")


@pytest.mark.parametrize(
    ("label", "first"), [(SGLR(start=0.5), 3), (SGLR(start=0.0, alpha=0.7), 1), (Hard(), EPOCHS + 1)]
)
def test_a_run_ends_in_the_authors_weights_statistics_and_labels(tmp_path, monkeypatch, label, first):
    trainer = ours(tmp_path / "run", label, PGDAT())
    loss_file = load("SGLS", "losses/loss.py", monkeypatch)
    net = network()
    optimiser = sgd(net, trainer)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.zero_())  # no random start
    settings = {"num_classes": K, "es": first, "perturb_steps": 5, "momentum": getattr(label, "alpha", 0.9)}
    criterion = loss_file.SGLS(trainer.train_data.labels, **settings)

    def step(batch, epoch):
        _, loss = criterion(batch.image, batch.label, batch.index, epoch, net, optimiser)
        loss.backward()
        optimiser.step()

    theirs(trainer, optimiser, step)
    assert_same_network(trainer, net)
    if isinstance(label, SGLR):
        every = torch.arange(trainer.train_data.n)
        same("labels", label.memory.read(every), criterion.soft_labels)


def test_its_resnet_starts_from_the_weights_that_init_kaiming_draws(monkeypatch):
    resnet = load("SGLS", "models/resnet.py", monkeypatch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = list(resnet.resnet18(10).state_dict().values())
        torch.manual_seed(0)
        settings = NetSettings("resnet18", init="kaiming")
        net = build(settings, num_classes=10, in_channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = list(net.state_dict().values())[2:]  # after mean and std
    assert [t.shape for t in found] == [t.shape for t in expected]
    for index, (ours_, theirs_) in enumerate(zip(found, expected, strict=True)):
        same(f"tensor {index}", ours_, theirs_, rtol=0, atol=0)
