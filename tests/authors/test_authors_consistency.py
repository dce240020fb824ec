"""Consistency regularisation beside the authors' published code (alinlab/consistency-adversarial)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from beside import assert_same_network, definitions, load, needs, ours, same, sgd, theirs
from softdefend import PGD, Consistency, Hard, ThreatModel
from softdefend.core.rng import stream
from softdefend.execution.network_mode import frozen
from softdefend.labels import Predictions, Supervision
from softdefend.objectives.consistency import jensen_shannon
from tiny import batch_of

pytestmark = needs("consistency-adversarial")

ATTACK = PGD(steps=5, step_size="2/255")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def divergence(monkeypatch):
    return load("consistency-adversarial", "training/__init__.py", monkeypatch)._jensen_shannon_div


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 0.5), (30.0, 0.5), (30.0, 2.0)])
def test_a_run_ends_in_the_authors_weights_and_statistics(
    tmp_path, monkeypatch, exact_network, weight, temperature
):
    """Without augmentation the two views are one image: what tells them apart is where their attacks start, a
    long way off, and that is the same in both programs. Theirs takes its attack from advertorch, so here both
    have ours."""

    def start(self, image, generator):
        return image + torch.rand(image.shape, generator=stream(0, "start")) - 0.5

    monkeypatch.setattr(ThreatModel, "random_start", start)
    trainer = ours(tmp_path / "run", Hard(), Consistency(weight, temperature), attack=ATTACK, eps="127/255")
    net = exact_network()
    optimizer = sgd(net, trainer)
    logged, shown = [], {"log": lambda *_: None}
    settings = SimpleNamespace(lam=weight, T=temperature, n_gpus=1, optimizer="other than sgd")  # no schedule

    def adversary(image, label):
        with frozen(net, "eval"):
            return ATTACK(net, image, label, trainer.recipe.threat)

    meter = definitions("consistency-adversarial", "utils/utils.py", "AverageMeter")["AverageMeter"]
    train = definitions(
        "consistency-adversarial",
        "training/adv_train/adv_train_consistency.py",
        "train",
        torch=torch,
        time=SimpleNamespace(time=lambda: 0.0),
        device="cpu",
        AverageMeter=meter,
        _jensen_shannon_div=divergence(monkeypatch),
    )["train"]
    logger = SimpleNamespace(scalar_summary=lambda name, value, _: logged.append((name, value)), **shown)

    def step(batch, epoch):
        loader = [((batch.image, batch.image), batch.label)]
        train(settings, epoch, net, nn.CrossEntropyLoss(), optimizer, None, loader, adversary, logger)

    theirs(trainer, optimizer, step)
    assert min(value for name, value in logged if name == "train/loss_con") > 1e-5 * weight
    assert_same_network(trainer, net, **EXACT)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("size", [0.1, 3.0, 12.0])
def test_the_divergence_and_its_gradient_are_the_authors(monkeypatch, temperature, size):
    """Up to nearly sure predictions, where their clip of the mean at 1e-8 begins to be felt."""
    logits = (size * torch.randn(64, 5, generator=stream(0, "z"))).double().requires_grad_(True)
    first, second = logits.chunk(2)
    expected = divergence(monkeypatch)(first, second, temperature)
    found = jensen_shannon(first, second, temperature).mean()
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    same("value", found, expected, **tolerance)
    (slope,), (their_slope,) = (
        torch.autograd.grad(value, logits, retain_graph=True) for value in (found, expected)
    )
    same("gradient", slope, their_slope, **tolerance)


def test_the_loss_on_given_logits_is_the_authors_sum(monkeypatch):
    logits, label = 3 * torch.randn(24, 5, generator=stream(0, "z")), torch.arange(12) % 5
    first, second = logits.chunk(2)
    cross_entropy = nn.CrossEntropyLoss()(logits, label.repeat(2))
    expected = cross_entropy + 7 * divergence(monkeypatch)(first, second, 0.5)
    belief = Supervision(label, torch.eye(5)[label])
    found = Consistency(7.0, 0.5).outer_loss(Predictions(logits), batch_of(first, label), belief)
    same("loss", found, expected)
