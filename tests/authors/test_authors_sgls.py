"""SGLR and PGD-AT beside the authors' published code (devicerxx/SGLS)."""

from __future__ import annotations

import pytest
import torch

from beside import EPOCHS, K, assert_same_network, load, needs, network, ours, same, sgd, theirs
from softdefend import PGDAT, SGLR, Hard

pytestmark = needs("SGLS")


@pytest.mark.parametrize(
    ("label", "first"), [(SGLR(start=0.5), 3), (SGLR(start=0.0, alpha=0.7), 1), (Hard(), EPOCHS + 1)]
)
def test_a_run_ends_in_the_authors_weights_statistics_and_labels(tmp_path, monkeypatch, label, first):
    trainer = ours(tmp_path / "run", label, PGDAT())
    loss_file = load("SGLS", "losses/loss.py", monkeypatch)
    net = network()
    optimizer = sgd(net, trainer)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.zero_())  # no random start
    settings = {"num_classes": K, "es": first, "perturb_steps": 5, "momentum": getattr(label, "alpha", 0.9)}
    criterion = loss_file.SGLS(trainer.train_data.labels, **settings)

    def step(batch, epoch):
        _, loss = criterion(batch.image, batch.label, batch.index, epoch, net, optimizer)
        loss.backward()
        optimizer.step()

    theirs(trainer, optimizer, step)
    assert_same_network(trainer, net)
    if isinstance(label, SGLR):
        every = torch.arange(trainer.train_data.n)
        same("labels", label.memory.read(every), criterion.soft_labels)
