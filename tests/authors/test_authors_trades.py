"""TRADES beside the authors' published code (yaodongyu/TRADES)."""

from __future__ import annotations

from functools import partial

import pytest
from torch import nn

from beside import assert_same_network, load, needs, ours, same, sgd, theirs
from softdefend import PGD, TRADES, Hard

pytestmark = [needs("TRADES"), pytest.mark.filterwarnings("ignore:size_average and reduce")]

ATTACK = PGD(steps=5, step_size="2/255")
"""From the objective's own start: at the image itself the divergence has no gradient, and nothing moves."""
EXACT = {"rtol": 1e-9, "atol": 1e-9}


class ThreeForwards(TRADES):
    """The update as published: the clean images once more after the adversarial ones."""

    def predict(self, net, image, adversarial):
        predictions = super().predict(net, image, adversarial)
        net(image)
        return predictions


def train(net, trainer, monkeypatch):
    """Their code, over the run's batches."""
    trades_loss = load("TRADES", "trades.py", monkeypatch).trades_loss
    optimizer, beta = sgd(net, trainer), trainer.recipe.objective.beta
    settings = {"step_size": 2 / 255, "epsilon": 8 / 255, "perturb_steps": 5, "beta": beta}

    def step(batch, epoch):
        trades_loss(net, batch.image, batch.label, optimizer, **settings).backward()
        optimizer.step()

    theirs(trainer, optimizer, step)


@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_with_a_third_forward_a_run_ends_in_the_authors_weights_and_statistics(
    tmp_path, monkeypatch, exact_network, echo, beta
):
    """It gives the logits of the first, and its gradient. What it moves is running statistics, and with them
    the attack, which reads them: nothing else tells the two programs apart."""
    trainer = ours(tmp_path / "run", Hard(), ThreeForwards(beta), attack=ATTACK)
    echo()
    net = exact_network()
    train(net, trainer, monkeypatch)
    assert_same_network(trainer, net, **EXACT)


@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_where_no_attack_reads_statistics_a_run_ends_in_the_authors_weights(
    tmp_path, monkeypatch, exact_network, echo, beta
):
    """Our objective as it is. Running statistics mix clean and adversarial forwards 1 : 1 here and 2 : 1
    there, on purpose; of them only the number of their updates can be compared."""
    trainer = ours(tmp_path / "run", Hard(), TRADES(beta), attack=ATTACK, attack_bn="batch")
    echo()
    net = exact_network()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]

    def track(moves):
        for norm in norms:
            norm.track_running_stats = moves

    # Their attack lies between these two calls: the batch's statistics in it, as attack_bn says.
    monkeypatch.setattr(net, "eval", partial(track, False))
    monkeypatch.setattr(net, "train", partial(track, True))
    train(net, trainer, monkeypatch)
    for (name, found), expected in zip(trainer.net.named_parameters(), net.parameters(), strict=True):
        same(name, found, expected, **EXACT)
    steps = trainer.optim.epochs * trainer.steps_per_epoch
    counts = [buffer.item() for name, buffer in trainer.net.named_buffers() if name.endswith("tracked")]
    assert counts == [2 * steps] * len(norms)
    assert [norm.num_batches_tracked.item() for norm in norms] == [3 * steps] * len(norms)
