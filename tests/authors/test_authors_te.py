"""Temporal ensembling, on PGD-AT and on TRADES, beside the authors' published code (memorization-AT)."""

from __future__ import annotations

import math

import pytest
import torch

import beside
from beside import assert_same_network, definitions, load, needs, ours, same, sgd, theirs
from softdefend import PGD, TE, TRADESTE, Hard
from softdefend.objectives.te import weight_from_reference

pytestmark = [needs("memorization-AT"), pytest.mark.filterwarnings("ignore:size_average and reduce")]

EPOCHS, FIRST, FULL = 10, 3, 8
"""Length of the run; epochs, from one, at which the ramp starts and is full: two before it, two after."""
ATTACK = PGD(steps=5, step_size="2/255")
"""From the objective's own start, which is part of the method."""
RAMP = {"ramp_start": FIRST / EPOCHS, "ramp_end": FULL / EPOCHS}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


class AsPrecise:
    """A memory as precise as the network of these runs."""

    def setup(self, run):
        super().setup(run)
        self.memory, self.scale = self.memory.double(), self.scale.double()


class ExactTE(AsPrecise, TE): ...


class ExactTRADESTE(AsPrecise, TRADESTE): ...


def train(net, trainer, criterion, published, monkeypatch):
    """Their code, over the run's batches; ``criterion`` names one of theirs. The criterion, as it ends."""
    objective, losses = trainer.recipe.objective, load("memorization-AT", "loss.py", monkeypatch)
    settings = {"beta": objective.beta} if criterion == "TRADES_TE" else {}
    made = getattr(losses, criterion)(
        num_samples=trainer.train_data.n,
        num_classes=beside.K,
        momentum=objective.alpha,
        es=FIRST,
        step_size=2 / 255,
        epsilon=8 / 255,
        perturb_steps=5,
        **settings,
    )
    made.soft_labels = made.soft_labels.double()
    optimizer, rampup = sgd(net, trainer), their_ramp()

    def step(batch, epoch):
        weight = published * rampup(epoch, FIRST, FULL)
        made(batch.image, batch.label, batch.index, epoch, net, optimizer, weight).backward()
        optimizer.step()

    theirs(trainer, optimizer, step)
    return made


def their_ramp():
    return definitions("memorization-AT", "train_te.py", "sigmoid_rampup")["sigmoid_rampup"]


def assert_same_memory(trainer, criterion):
    """Rows, and what is believed of them once the start at zero is corrected for."""
    objective, every = trainer.recipe.objective, torch.arange(trainer.train_data.n)
    same("memory", objective.memory, criterion.soft_labels, **EXACT)
    total = criterion.soft_labels.sum(1, keepdim=True)
    # Every sample is seen once an epoch: how far the average has come is known without either program.
    same("sum", total, torch.full_like(total, 1 - objective.alpha ** (EPOCHS - FIRST + 1)), **EXACT)
    same("ensemble", objective.ensemble(every), criterion.soft_labels / total, **EXACT)


@pytest.mark.parametrize("classes", [5, 8])
@pytest.mark.parametrize(("published", "alpha"), [(300.0, 0.9), (40.0, 0.6)])
def test_a_run_ends_in_the_authors_weights_statistics_and_memory(
    tmp_path, monkeypatch, exact_network, echo_uniform, published, alpha, classes
):
    """Their weight is of a mean over classes and stays when there are more of them; ours does not."""
    monkeypatch.setattr(beside, "K", classes)
    objective = ExactTE(weight_from_reference(classes, published), alpha, **RAMP)
    trainer = ours(tmp_path / "run", Hard(), objective, attack=ATTACK, epochs=EPOCHS)
    net = exact_network()
    echo_uniform()
    criterion = train(net, trainer, "PGD_TE", published, monkeypatch)
    assert_same_network(trainer, net, **EXACT)
    assert_same_memory(trainer, criterion)


@pytest.mark.parametrize("classes", [5, 8])
@pytest.mark.parametrize(("published", "beta"), [(300.0, 6.0), (40.0, 1.0)])
def test_a_run_on_trades_ends_in_the_authors_weights_statistics_and_memory(
    tmp_path, monkeypatch, exact_network, echo, published, beta, classes
):
    """Their attack pulls the attacked prediction and their loss the clean one: our default branch."""
    monkeypatch.setattr(beside, "K", classes)
    objective = ExactTRADESTE(beta, weight=weight_from_reference(classes, published), **RAMP)
    trainer = ours(tmp_path / "run", Hard(), objective, attack=ATTACK, epochs=EPOCHS)
    echo()
    net = exact_network()
    criterion = train(net, trainer, "TRADES_TE", published, monkeypatch)
    assert_same_network(trainer, net, **EXACT)
    assert_same_memory(trainer, criterion)


def test_the_defaults_ramp_as_the_authors_200_epochs_do():
    """Epochs 90 and 150 are their defaults; 0.45 * 200 need not be 90 to the last bit."""
    objective, rampup = TE(), their_ramp()
    objective.ends = objective.ramp_start * 200, objective.ramp_end * 200
    for epoch in range(1, 201):
        assert math.isclose(objective.share(epoch - 1), rampup(epoch, 90, 150), rel_tol=1e-9), epoch
