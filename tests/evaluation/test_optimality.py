"""The quality of attacks, against areas added up by hand and exact distances of linear networks."""

from __future__ import annotations

import math

import pyarrow.parquet as pq
import pytest
import torch
from checkpoint_tools import CPU, QUICK, make_checkpoint
from torch import Tensor, nn

from softdefend.attacks import APGD, Square
from softdefend.attacks.names import parse_attack
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import Resident, split
from softdefend.evaluation import Evaluator, optimality
from softdefend.evaluation.autoattack import Ensemble
from softdefend.evaluation.measurement import measured
from softdefend.evaluation.optimality import (
    LADDER,
    best_known,
    check_optimality,
    find_distances,
    local_optimality,
    optimality_measurement,
    qualities,
    robust_accuracy,
)

IMAGE = 0.3 + 0.4 * torch.rand(12, 1, 4, 4, generator=stream(0, "image"))
INF = math.inf


def drawn(seed: int, n: int = 40, missing: float = 0.2) -> Tensor:
    generator = stream(seed, "distances")
    distance = torch.rand(n, generator=generator, dtype=torch.float64)
    distance[torch.rand(n, generator=generator) < missing] = INF
    return torch.where(torch.arange(n) < 4, 0.0, distance)


def area(distance: Tensor, end: float) -> float:
    """Below the curve of robust accuracy from 0 to ``end``, by a fine sum."""
    eps = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * end
    ordered = distance.sort().values
    left = len(distance) - torch.searchsorted(ordered, eps, right=True)
    return float(left.double().mean()) / len(distance) * end


@pytest.mark.parametrize("seed", range(4))
def test_optimality_is_the_share_of_the_area_between_nothing_and_the_best(seed):
    one, other = drawn(seed), drawn(seed + 10)
    best = best_known({"one": one, "other": other})
    known = best.isfinite()
    end = float(best[known].max())
    nothing = end * float((best[known] > 0).double().mean())
    for distance in (one, other):
        least = area(best[known], end)
        wanted = 1 - (area(distance[known], end) - least) / (nothing - least)
        assert local_optimality(distance, best) == pytest.approx(wanted, abs=1e-4)


def test_the_best_attack_has_one_and_an_attack_that_finds_nothing_has_zero():
    best = drawn(0)
    assert local_optimality(best, best) == 1
    nothing = torch.where(best == 0, 0.0, INF).double()
    assert local_optimality(nothing, best) == pytest.approx(0)
    assert local_optimality(torch.full((3,), INF), torch.full((3,), INF)) == 1


def test_what_is_counted_is_counted_by_hand():
    distances = {
        "a": torch.tensor([0.0, 1.0, 2.0, INF, INF]),
        "b": torch.tensor([0.0, 2.0, 2.01, 4.0, INF]),
    }
    found = qualities(distances)
    assert (found["a"].found, found["a"].closest) == (3, 3)
    assert (found["b"].found, found["b"].closest) == (4, 3)
    assert (found["a"].median_distance, found["b"].median_distance) == (2.0, pytest.approx(2.01))
    assert found["b"].median_ratio == pytest.approx(1.005)
    assert robust_accuracy(distances["b"], [0, 2.0, 3.0, 10]) == [0.8, 0.6, 0.4, 0.2]


def linear() -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False)
    net[1].weight.copy_(torch.randn(2, 16, generator=stream(1, "weight")))
    net[1].bias.copy_(-net[1].weight.sum(1) / 2)
    return net.eval()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_distances_are_those_of_a_linear_network(norm):
    net = linear()
    label = net(IMAGE).argmax(1)
    label[0] = 1 - label[0]  # wrong without an attack
    across, gap = net[1].weight[1] - net[1].weight[0], net(IMAGE).diff(dim=1).flatten().abs()
    exact = (gap / (across.abs().sum() if norm == "linf" else across.norm())).double()
    exact[0] = 0
    eps = float(exact.median())
    threat = ThreatModel(norm, Budget(eps))
    evaluator = Evaluator(net, Resident(split(IMAGE, label), CPU), threat, microbatch=5)
    everyone = torch.arange(12)
    for name in ("fmn", "fab-t", "deepfool"):
        distance = find_distances(evaluator, parse_attack(name), everyone)
        assert ((distance >= 0.999 * exact) & (distance <= 1.06 * exact + 1e-3)).all()
    few = Ensemble("few", (APGD(steps=30), Square(queries=100)))
    for attack in (parse_attack("pgd-20"), few):
        distance = find_distances(evaluator, attack, everyone)
        steps = torch.tensor([factor * eps for factor in LADDER], dtype=torch.float64)
        ceiling = steps[torch.searchsorted(steps, 1.001 * exact).clamp_max(len(LADDER) - 1)]
        within = exact < 0.95 * steps[-1]
        assert (distance >= 0.999 * exact).all()
        assert (distance <= 1.001 * torch.where(exact == 0, 0.0, ceiling))[within].all()


def test_a_claim_that_does_not_hold_is_not_believed(monkeypatch):
    net, attack = linear(), parse_attack("fmn")
    label = net(IMAGE).argmax(1)
    evaluator = Evaluator(net, Resident(split(IMAGE, label), CPU), ThreatModel("l2", Budget("1")))

    def lie(self, net, image, label, norm, **more):
        return image + 0.001, torch.full((len(image),), 0.001)

    monkeypatch.setattr(type(attack), "minimal", lie)
    distance = find_distances(evaluator, attack, torch.arange(12))
    exact = net(IMAGE).diff(dim=1).flatten().abs() / (net[1].weight[1] - net[1].weight[0]).norm()
    assert (distance[exact > 0.01]).isinf().all()


def test_an_attack_is_run_once_whatever_it_is_compared_with(bundle, tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path, bundle)
    asked = []
    find = optimality.find_distances

    def counted(evaluator, attack, index):
        asked.append(attack.name)
        return find(evaluator, attack, index)

    monkeypatch.setattr(optimality, "find_distances", counted)
    for names in (("fmn-20", "fgsm"), ("fmn-20", "fgsm"), ("fgsm", "deepfool", "fmn-20")):
        result = measured(checkpoint, optimality_measurement(checkpoint, QUICK, names, 20))
        assert list(result["attacks"]) == list(names)
    assert asked == ["fmn-20", "fgsm", "deepfool"]
    table = pq.read_table(tmp_path / "evaluation" / "last-optimality.parquet").to_pydict()
    for name in names:
        columns = (table[column] for column in ("best", f"{name}/distance", f"{name}/gap"))
        for best, distance, gap in zip(*columns, strict=True):
            assert gap == (0 if distance == best else distance - best)
            assert gap >= 0
    assert min(result["curves"]["best known"]) == result["unknown"] / result["n"]
    for curve in result["curves"].values():
        assert curve == sorted(curve, reverse=True)
        assert all(a >= b for a, b in zip(curve, result["curves"]["best known"], strict=True))


@pytest.mark.parametrize(
    ("names", "setting"),
    [(("fmn", "fmn"), "--optimality"), (("nothing",), "attacks"), (("fmn", "cw-l2"), "threat.norm")],
)
def test_attacks_that_cannot_be_compared_are_refused(names, setting):
    with pytest.raises(SettingError) as caught:
        check_optimality(names, ThreatModel(), 10)
    assert caught.value.setting == setting
