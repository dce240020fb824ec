"""MART beside the authors' published code (YisenWang/MART)."""

from __future__ import annotations

import pytest

from beside import assert_same_network, load, needs, ours, sgd, theirs
from softdefend import MART, PGD, Hard

pytestmark = needs("MART")

ATTACK = PGD(steps=5, step_size="2/255")
"""From the objective's own start."""


@pytest.mark.parametrize("beta", [5.0, 6.0])
def test_a_run_ends_in_the_authors_weights_and_statistics(tmp_path, monkeypatch, exact_network, echo, beta):
    """The divergence takes log(p + 1e-12) there and log(p) here: less than is seen at these tolerances."""
    trainer = ours(tmp_path / "run", Hard(), MART(beta), attack=ATTACK)
    echo()
    mart_loss = load("MART", "mart.py", monkeypatch).mart_loss
    net = exact_network()
    optimizer = sgd(net, trainer)
    settings = {"step_size": 2 / 255, "epsilon": 8 / 255, "perturb_steps": 5, "beta": beta}

    def step(batch, epoch):
        mart_loss(net, batch.image, batch.label, optimizer, **settings).backward()
        optimizer.step()

    theirs(trainer, optimizer, step)
    assert_same_network(trainer, net, rtol=1e-8, atol=1e-8)
