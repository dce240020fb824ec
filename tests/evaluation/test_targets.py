"""Targeted evaluations: which class each image is to be taken for, and what counts."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest
import torch

from ensemble_tools import Images, rugged, sample
from softdefend.attacks import APGD, FAB, PGD, Attack, Square
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import ThreatModel
from softdefend.evaluation import Ensemble, EvaluateSettings, Evaluator
from softdefend.evaluation.targets import choose_targets

SHAPE, K, N = (1, 5, 5), 5, 60
THREAT = ThreatModel("linf", "0.15")


def pieces() -> tuple[torch.nn.Module, Images]:
    net = rugged(SHAPE, K)
    return net, sample(net, N, SHAPE)


def chosen(rule: str, index: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    net, data = pieces()
    index = torch.arange(N) if index is None else index
    return choose_targets(rule, data.labels[index], net(data.image[index]), index, seed)


def test_each_rule_is_what_it_says():
    net, data = pieces()
    assert torch.equal(chosen("next"), (data.labels + 1) % K)
    assert chosen("3").tolist() == [3] * N
    for label, logits, target in zip(data.labels, net(data.image), chosen("least-likely"), strict=True):
        order = [i for i in logits.argsort().tolist() if i != label]
        assert target == order[0]


def test_random_targets_are_uniform_over_the_other_classes_and_belong_to_the_image():
    label, index = torch.arange(4000) % K, torch.arange(4000)
    target = choose_targets("random", label, torch.zeros(4000, K), index, 0)
    assert not (target == label).any()
    counts = torch.stack([((target - label) % K == step).sum() for step in range(1, K)])
    assert ((counts / 4000 - 1 / (K - 1)).abs() < 0.03).all()
    order = torch.randperm(N, generator=stream(0, "o"))
    assert torch.equal(chosen("random", order), chosen("random")[order])
    assert not torch.equal(chosen("random", seed=1), chosen("random"))


@pytest.mark.parametrize("rule", ["next", "random", "least-likely", "2"])
def test_only_the_target_is_a_success(rule):
    net, data = pieces()
    result = Evaluator(net, data, THREAT, targeted=rule, batch_size=7)([PGD(steps=10)])
    record, target = result.attacks["pgd-10"], chosen(rule)[result.index]
    assert torch.equal(result.target, target)
    right = result.clean_prediction == result.label
    assert torch.equal(record.robust, right & (record.prediction != target))
    other = (record.prediction != result.label) & (record.prediction != target)
    assert other.any() or rule == "2"  # what an untargeted evaluation would count
    assert result.to_dict()["attacks"]["pgd-10"]["reached"]["count"] == int(
        (record.prediction == target).sum()
    )
    table = pq.read_table(io.BytesIO(result.to_parquet()))
    assert table["target"].to_pylist() == target.tolist()
    assert result.how["left_out"] == (int((data.labels == 2).sum()) if rule == "2" else 0)
    assert len(result.label) == N - result.how["left_out"]


def test_a_targeted_ensemble_attacks_what_is_neither_wrong_nor_reached():
    net, data = pieces()
    members = (APGD(steps=10), FAB(steps=10), Square(queries=100))
    results = [
        Evaluator(net, data, THREAT, targeted="next", batch_size=9, microbatch=m)(
            [Ensemble("three", members)]
        )
        for m in (4, 60)
    ]
    record = results[0].attacks["three"]
    reached = results[0].clean_prediction == results[0].target
    for trial in record.trials.values():
        assert not (trial.attacked & reached).any()
        reached = reached | (trial.attacked & (trial.prediction == results[0].target))
    assert torch.equal(record.robust, (results[0].clean_prediction == results[0].label) & ~reached)
    assert reached.any()
    assert record.robust.any()
    assert torch.equal(record.prediction, results[1].attacks["three"].prediction)


class Own(Attack):
    """An attack that knows labels alone."""

    name = "own"

    def run(self, net, image, label, threat, context):
        return image


def test_what_cannot_be_is_refused_before_anything_runs():
    net, data = pieces()
    for make, word in (
        (lambda: Evaluator(net, data, THREAT, targeted="nearest"), "next, random, least-likely or"),
        (lambda: Evaluator(net, data, THREAT, targeted="5")([PGD(steps=1)]), "from 0 to 4"),
        (lambda: Evaluator(net, data, THREAT, targeted="next")([Own()]), "no targeted form"),
        (lambda: EvaluateSettings(targeted="-1"), "a class number"),
        (lambda: EvaluateSettings(targeted=""), "a class number"),
    ):
        with pytest.raises(SettingError, match=word):
            make()
    alike = Images(data.image, torch.full_like(data.labels, 2))
    with pytest.raises(SettingError, match="the class of every image"):
        Evaluator(net, alike, THREAT, targeted="2")([PGD(steps=1)])
