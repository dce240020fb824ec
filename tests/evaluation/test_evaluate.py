"""The evaluator against hand counts, cheating attacks and a naive PGD."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from softdefend.attacks import FGSM, PGD, Attack
from softdefend.data import Resident, split
from softdefend.errors import SettingError
from softdefend.evaluation import Evaluator, Rate
from softdefend.evaluation.run import EvaluateSettings, scaled
from softdefend.rng import stream
from softdefend.threat import Budget, ThreatModel

THREAT = ThreatModel("linf", Budget("0.1"))


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 2 * 3, 3)
    )
    net.train()
    image = torch.rand(23, 2, 4, 5, generator=stream(0, "x"))
    net(image)
    with torch.no_grad():
        label = net.eval()(image).argmax(1)
    label[::4] = (label[::4] + 1) % 3
    return net.train(), split(image, label)


@pytest.mark.parametrize("z", [(0, 10), (10, 10), (3, 10), (455, 1000), (1, 1)])
def test_intervals_are_wilsons(z):
    count, n = z
    flags = torch.arange(n) < count
    rate, p, q = Rate.of(flags), count / n, 1.959963984540054
    centre, half = (p + q * q / (2 * n)), q * math.sqrt(p * (1 - p) / n + q * q / (4 * n * n))
    np.testing.assert_allclose(
        [rate.low, rate.high],
        [(centre - half) / (1 + q * q / n), (centre + half) / (1 + q * q / n)],
        atol=1e-12,
    )
    assert (rate.count, rate.n, rate.rate) == (count, n, p)


def test_counts_equal_a_pgd_written_by_hand(case):
    net, data = case
    result = Evaluator(net, Resident(data, "cpu"), THREAT, batch_size=7)([PGD(steps=6, start="none")])
    net.eval()
    x, y = data.images, data.labels
    adversarial = x.clone()
    for _ in range(6):
        adversarial.requires_grad_(True)
        (slope,) = torch.autograd.grad(
            nn.functional.cross_entropy(net(adversarial), y, reduction="sum"), adversarial
        )
        adversarial = (adversarial.detach() + 0.025 * slope.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    with torch.no_grad():
        clean, attacked = net(x).argmax(1), net(adversarial).argmax(1)
    record = result.attacks["pgd-6"]
    assert torch.equal(result.clean_prediction, clean)
    assert torch.equal(record.prediction, attacked)
    assert torch.equal(record.robust, (clean == y) & (attacked == y))
    torch.testing.assert_close(record.distance, (adversarial - x).abs().flatten(1).amax(1))
    assert (record.forwards, record.backwards) == (23 * 7, 23 * 6)
    assert 0 < result.robust("pgd-6").count < result.clean.count < 23


def test_the_network_is_put_back(case):
    net, data = case
    before = {k: v.clone() for k, v in net.state_dict().items()}
    Evaluator(net, Resident(data, "cpu"), THREAT)([FGSM()])
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


class Cheat(Attack):
    """Returns whatever it is given to return."""

    def __init__(self, make):
        object.__setattr__(self, "make", make)

    @property
    def name(self):
        return "cheat"

    def __call__(self, forward, image, target, threat, *, loss=None, generator=None):
        return self.make(image)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x + 0.5,
        lambda x: 5 * torch.ones_like(x),
        lambda x: x * math.nan,
        lambda x: x - math.inf,
        lambda x: x.double() - 0.3,
    ],
    ids=["far", "out of the box", "nan", "infinite", "float64"],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_cheating_attack_is_projected_and_counted_honestly(case, make, norm):
    net, data = case
    threat = ThreatModel(norm, Budget("0.1"))
    resident = Resident(data, "cpu")
    evaluator = Evaluator(net, resident, threat)
    record = evaluator([Cheat(make)]).attacks["cheat"]
    assert (record.distance <= 0.1 + 1e-6).all()
    wanted = make(data.images)
    wanted = torch.where(wanted.isfinite(), wanted, data.images).float()
    with torch.no_grad():
        inside = threat.project(data.images, wanted)
        assert torch.equal(record.prediction, net.eval()(inside).argmax(1))
    if not make(data.images).isfinite().any():
        assert record.distance.max() < 1e-6


def test_the_worst_case_is_the_intersection_of_all_attacks(case):
    net, data = case
    result = Evaluator(net, Resident(data, "cpu"), THREAT)(
        [FGSM(), PGD(steps=10), PGD(steps=10, loss="margin")]
    )
    each = torch.stack([record.robust for record in result.attacks.values()])
    assert torch.equal(result.worst, each.all(0))
    summary = result.to_dict()
    assert summary["worst"]["count"] == int(each.all(0).sum())
    assert summary["attacks"]["fgsm"]["n"] == 23
    assert all(isinstance(summary["clean"][key], float) for key in ("rate", "low", "high"))


def test_the_same_seed_repeats_and_another_does_not(case):
    net, data = case
    runs = [
        Evaluator(net, Resident(data, "cpu"), THREAT, seed=seed)([PGD(steps=1, step_size=Budget(1e-9))])
        for seed in (0, 0, 1)
    ]
    distances = [run.attacks["pgd-1"].distance for run in runs]
    assert torch.equal(distances[0], distances[1])
    assert not torch.equal(distances[0], distances[2])


def test_two_attacks_of_one_name_are_refused(case):
    net, data = case
    with pytest.raises(SettingError, match=r"evaluate\.attacks: got pgd-5, pgd-5"):
        Evaluator(net, Resident(data, "cpu"), THREAT)([PGD(steps=5), PGD(steps=5, start="none")])


@pytest.mark.parametrize("wrong", [{"size": 0}, {"curve_size": -1}, {"examples": -1}, {"batch_size": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=f"evaluate.{next(iter(wrong))}"):
        EvaluateSettings(**wrong)


def test_multiples_of_eps_are_written_as_eps_is():
    assert [str(scaled(Budget("8/255"), f)) for f in (0.25, 1.0, 1.25)] == ["2/255", "8/255", "10/255"]
    assert str(scaled(Budget("0.1"), 0.5)) == "0.05"
