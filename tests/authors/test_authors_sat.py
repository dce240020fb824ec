"""SAT with TRADES beside the authors' published code (LayneH/self-adaptive-training)."""

from __future__ import annotations

import pytest
import torch

from beside import EPOCHS, K, assert_same_network, load, needs, ours, same, sgd, theirs
from softdefend import PGD, SAT, TRADES, Hard

pytestmark = [
    needs("self-adaptive-training"),
    pytest.mark.filterwarnings("ignore:size_average and reduce"),
]

ATTACK = PGD(steps=5, step_size="2/255")
"""From the objective's own start: at the image itself the divergence has no gradient, and nothing moves."""
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
"""Our memory keeps its rows in single precision."""


@pytest.mark.parametrize(
    ("label", "first"), [(SAT(start=0.5), 3), (SAT(start=0.0, alpha=0.7), 1), (Hard(), EPOCHS + 1)]
)
def test_a_run_ends_in_the_authors_weights_statistics_and_labels(
    tmp_path, monkeypatch, exact_network, echo, label, first
):
    """Their TRADES makes two forwards in the update, as ours does; before the first epoch of refinement it is
    TRADES alone."""
    trainer = ours(tmp_path / "run", label, TRADES(6.0), attack=ATTACK)
    echo()
    loss_file = load("self-adaptive-training", "losses/trades.py", monkeypatch)
    net = exact_network()
    optimizer = sgd(net, trainer)
    attack = {"step_size": 2 / 255, "epsilon": 8 / 255, "perturb_steps": 5}
    refinement = {"num_classes": K, "es": first, "momentum": getattr(label, "alpha", 0.9)}
    criterion = loss_file.TRADES_SAT(trainer.train_data.labels, **refinement, **attack, beta=6.0)
    criterion.soft_labels = criterion.soft_labels.double()

    def step(batch, epoch):
        _, loss = criterion(batch.image, batch.label, batch.index, epoch, net, optimizer)
        loss.backward()
        optimizer.step()

    theirs(trainer, optimizer, step)
    assert_same_network(trainer, net, **TOLERANCE)
    if isinstance(label, SAT):
        every = torch.arange(trainer.train_data.n)
        same("labels", label.memory.read(every).double(), criterion.soft_labels, **TOLERANCE)
