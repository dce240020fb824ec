"""PGD as an evaluation runs it: where its restarts begin, and what it asks the network."""

from __future__ import annotations

import pytest
import torch

from softdefend.attacks import PGD
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.execution.randomness import SeededRandomness


def evaluated(attack: PGD, forward, image: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
    """What the attack makes of the images of one batch of an evaluation."""
    n = len(image)
    model = CountingModel(forward, n)
    context = AttackContext(model, SeededRandomness([torch.arange(n)], 0, attack.name))
    return attack.run_batches(model, image, torch.zeros(n).long(), threat, context)


def asked(attack: PGD, norm: str, image: torch.Tensor) -> list[torch.Tensor]:
    """The images that the network is shown, in order."""
    seen = []
    slope = torch.randn(4, image[0].numel(), generator=stream(1, "w"), dtype=image.dtype)

    def forward(x):
        seen.append(x.detach().clone())
        return x.flatten(1) @ slope.T

    evaluated(attack, forward, image, ThreatModel(norm, Budget("0.1")))
    return seen


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["uniform", "uniform-unclipped", "gaussian"])
def test_every_restart_of_an_evaluation_begins_elsewhere(start, norm):
    image = torch.full((4, 1, 3, 3), 0.5)
    starts = asked(PGD(steps=0, restarts=3, start=start), norm, image)
    assert len(starts) == 3
    for first, second in ((0, 1), (0, 2), (1, 2)):
        moved = (starts[first] - starts[second]).flatten(1)
        assert (moved.abs().amax(1) > 1e-4).all()
        size = 0.001 if start == "gaussian" else 0.1
        assert (moved.abs().amax(1) < 10 * size).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_unclipped_start_leaves_the_box_until_the_first_step_and_a_uniform_one_does_not(norm):
    image = torch.zeros(4, 1, 3, 3)
    assert asked(PGD(steps=1, start="uniform-unclipped"), norm, image)[0].min() < 0
    assert asked(PGD(steps=1, start="uniform"), norm, image)[0].min() == 0


def test_a_gaussian_start_has_the_references_standard_deviation():
    image, label = torch.full((200, 1, 4, 4), 0.5), torch.zeros(200).long()
    attack, threat = PGD(steps=0, start="gaussian"), ThreatModel("linf", Budget("0.1"))
    called = attack(lambda x: x, image, label, threat, generator=stream(0, "a"), loss=lambda logits: logits)
    searched = evaluated(attack, lambda x: x.flatten(1), image, threat)
    for found in (called, searched):
        assert float((found - image).std()) == pytest.approx(0.001, rel=0.1)
