"""Random numbers by batch and by image, against published values and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from softdefend.attacks import FGSM, PGD
from softdefend.core import rng
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.execution.randomness import CallerRandomness, SeededRandomness, _mix, _signed, hashed

MASK = 2**64 - 1


def splitmix(state: int) -> int:
    """One output in Python's integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def test_the_mixer_gives_the_published_sequence():
    """First outputs of SplitMix64 for seed 1234567 (https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64)."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = torch.tensor([_signed((1234567 + i * 0x9E3779B97F4A7C15) & MASK) for i in range(1, 6)])
    assert [x & MASK for x in _mix(states).tolist()] == published


def test_hashed_numbers_are_those_of_plain_integers():
    key, gamma = 0x1234567890ABCDEF, 0x9E3779B97F4A7C15
    found = hashed(key, torch.tensor([0, 3, 10**9]), 4)
    for row, index in zip(found.tolist(), (0, 3, 10**9), strict=True):
        start = splitmix(key ^ splitmix(index * gamma & MASK))
        assert row == [(splitmix((start + p * gamma) & MASK) >> 40) / 2**24 for p in range(1, 5)]


def test_hashed_numbers_look_uniform_within_and_across_images():
    found = hashed(rng.key(0, "x"), torch.arange(300), 300).double().numpy()
    assert found.min() >= 0
    assert found.max() < 1
    for numbers in (found.ravel(), found[0], found[:, 0], np.diagonal(found)):
        assert kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]) < 0.02


def test_normal_numbers_are_normal():
    random = SeededRandomness([torch.arange(200)], 3, "pgd-10")
    found = random.normal(torch.arange(200), 200, 0).double().numpy()
    assert kstest(found.ravel(), "norm").pvalue > 1e-3
    assert np.isfinite(found).all()


def test_an_images_numbers_know_no_batch():
    whole = SeededRandomness([torch.arange(20)], 5, "pgd-10")
    parts = SeededRandomness([torch.tensor([7, 3]), torch.tensor([19])], 5, "pgd-10", first=4)
    wanted = whole.uniform(torch.tensor([7, 3, 19]), 6, 1)
    assert torch.equal(parts.uniform(torch.arange(3), 6, 1), wanted)
    assert torch.equal(parts.uniform(torch.tensor([2]), 6, 1), wanted[2:])
    for other in (
        SeededRandomness([torch.arange(20)], 6, "pgd-10"),
        SeededRandomness([torch.arange(20)], 5, "pgd-20"),
    ):
        assert not torch.isclose(other.uniform(torch.tensor([7, 3, 19]), 6, 1), wanted).any()
    assert not torch.isclose(whole.uniform(torch.tensor([7, 3, 19]), 6, 2), wanted).any()


@pytest.mark.parametrize("normal", [False, True])
def test_fresh_numbers_are_those_of_each_batch_alone(normal):
    """Three batches, of whose images fewer and fewer are asked for, against a generator for each."""
    batches = [torch.arange(0, 4), torch.arange(4, 8), torch.arange(8, 11)]
    image, draw = torch.zeros(11, 2, 3, 3), torch.randn if normal else torch.rand
    random = SeededRandomness(batches, 9, "apgd-ce")
    alone = [torch.Generator().manual_seed(9) for _ in batches]
    state = None
    for left in (range(11), [0, 2, 5, 9, 10], [5, 6, 10], [1]):
        rows = torch.tensor(list(left))
        parts = []
        for batch, own in zip(batches, alone, strict=True):
            count = int(torch.isin(batch, rows).sum())
            if count:  # a batch that has fallen draws nothing
                parts.append(draw((count, 2, 3, 3), generator=own))
        found = random.batch_noise(image[rows], rows, normal=normal)
        assert torch.equal(found, torch.cat(parts))
        if state is not None:
            again = SeededRandomness(batches, 9, "apgd-ce")
            again.load_state(state)
            assert torch.equal(again.batch_noise(image[rows], rows, normal=normal), found)
        state = random.state()


def test_a_callers_generator_is_one_batch():
    image = torch.zeros(5, 1, 2, 2, dtype=torch.float64)
    own, twin = stream(0, "a"), stream(0, "a")
    found = CallerRandomness(own, 5).batch_noise(image, torch.arange(5), normal=False)
    assert torch.equal(found, torch.rand(5, 1, 2, 2, generator=twin).double())


# --- attacks that belong to the image ---------------------------------------------------------------------


def network(image: torch.Tensor) -> torch.Tensor:
    slope = torch.randn(4, image[0].numel(), generator=stream(1, "w"), dtype=image.dtype)
    return (3 * image.flatten(1)).sin() @ slope.T


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=3),
        PGD(steps=2, restarts=3),
        PGD(steps=2, start="gaussian"),
        PGD(steps=0, start="uniform-unclipped"),
        PGD(steps=3, loss="kl"),
        PGD(steps=3, start="none", keep="best"),
        FGSM(),
    ],
    ids=lambda a: f"{a.name}-{getattr(a, 'start', '')}",
)
def test_pgd_knows_no_batch_and_no_order(attack, norm):
    image = torch.rand(12, 2, 3, 3, generator=stream(0, "x")).double()
    label, threat = network(image).argmax(1), ThreatModel(norm, Budget("0.1"))

    def search(index, most=None):
        model = CountingModel(network, len(index), microbatch=most)
        context = AttackContext(model, SeededRandomness([index], 2, attack.name))
        return attack.run_batches(model, image[index], label[index], threat, context)

    whole = search(torch.arange(12))
    order = torch.randperm(12, generator=stream(0, "o"))
    torch.testing.assert_close(search(order)[order.argsort()], whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(search(torch.arange(12), most=5), whole, atol=1e-12, rtol=0)
    assert (threat.distance(image, whole) <= 0.1 + 1e-9).all()


@pytest.mark.parametrize(("norm", "median"), [("linf", 0.1), ("l2", 0.1)])
def test_starts_fill_the_ball(norm, median):
    """l-inf: pixels uniform in [-eps, eps]; l2: the length's median is eps * 2^(-1/d), far inside no ball."""
    image, threat = torch.full((3000, 1, 2, 2), 0.5), ThreatModel(norm, Budget(median))
    attack = PGD(steps=0)
    model, label = CountingModel(network, 3000), torch.zeros(3000).long()
    context = AttackContext(model, SeededRandomness([torch.arange(3000)], 0, attack.name))
    delta = attack.run_batches(model, image, label, threat, context) - image
    delta = delta.double().flatten(1).numpy()
    if norm == "linf":
        assert kstest(delta.ravel() / 0.1, "uniform", (-1, 2)).pvalue > 1e-3
    else:
        length = np.linalg.norm(delta, axis=1) / 0.1
        assert kstest(length**4, "uniform").pvalue > 1e-3
        angle = np.arctan2(delta[:, 0], delta[:, 1]) / math.pi
        assert kstest(angle, "uniform", (-1, 2)).pvalue > 1e-3
