"""SAT against closed forms and a float64 re-derivation of the rule in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.rule import RunInfo
from softdefend.data import Batch
from softdefend.labels import SAT, Predictions
from softdefend.labels.sat import certainty
from softdefend.objectives import PGDAT, TRADES
from softdefend.training.step import Phase

N, K = 12, 5
LABELS = torch.arange(N) % K


def batch(index: torch.Tensor) -> Batch:
    return Batch(index, torch.zeros(len(index), 1, 2, 2), LABELS[index])


def predictions(seed: int, size: int) -> Predictions:
    draw = 2 * torch.randn(2, size, K, generator=stream(seed, "logits"))
    return Predictions(draw[0], draw[1])


def started(**settings) -> SAT:
    rule = SAT(start=0.0, **settings)
    rule.setup(RunInfo(LABELS, K, epochs=10))
    return rule


def says(rule: SAT, index: torch.Tensor, seen: Predictions):
    one = batch(index)
    return rule.supervise(one, one.image, seen, "refined")


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("alpha", [0.9, 0.5])
def test_four_steps_equal_the_rule_in_numpy(alpha):
    """Rows, weights and the loss TRADES takes of them, over steps that visit samples unevenly."""
    rule, trades = started(alpha=alpha), TRADES(beta=6.0)
    rows = np.eye(K)[LABELS.numpy()]
    for step in range(4):
        index = torch.randperm(N, generator=stream(step, "order"))[:7]
        seen = predictions(step, 7)
        supervision = says(rule, index, seen)
        clean, attacked = softmax(seen.clean.double().numpy()), softmax(seen.adversarial.double().numpy())
        rows[index] = alpha * rows[index] + (1 - alpha) * clean
        weight = rows[index].max(axis=1)
        weight = weight * len(weight) / weight.sum()
        np.testing.assert_allclose(supervision.target, rows[index], atol=1e-6)
        np.testing.assert_allclose(supervision.weight, weight, atol=1e-6)
        fit = (weight * -(rows[index] * np.log(clean)).sum(axis=1)).mean()
        divergence = (clean * (np.log(clean) - np.log(attacked))).sum(axis=1).mean()
        loss = trades.outer_loss(seen, batch(index), supervision)
        assert loss.item() == pytest.approx(fit + 6 * divergence, rel=1e-5)
    np.testing.assert_allclose(rule.memory.read(torch.arange(N)), rows, atol=1e-6)


def test_weights_are_largest_probabilities_over_their_mean():
    target = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.2, 0.6]])
    torch.testing.assert_close(certainty(target), torch.tensor([0.5, 1.0, 0.6]) / 0.7)
    drawn = nn.functional.softmax(torch.randn(64, K, generator=stream(0, "t")), dim=1)
    assert certainty(drawn).mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(certainty(drawn).argsort(), drawn.amax(1).argsort())


def test_only_clean_predictions_enter_the_memory():
    first, second, index = started(), started(), torch.arange(N)
    seen = predictions(0, N)
    other = Predictions(predictions(9, N).adversarial, seen.clean)
    assert torch.equal(says(first, index, seen).target, says(second, index, other).target)
    third = started()
    moved = says(third, index, Predictions(seen.adversarial, predictions(9, N).clean)).target
    assert not torch.equal(moved, first.memory.read(index))


def test_unweighted_differs_in_the_weight_alone():
    weighted, plain, index = started(), started(weighted=False), torch.arange(N)
    seen = predictions(0, N)
    one, other = says(weighted, index, seen), says(plain, index, seen)
    assert other.weight is None
    assert one.weight is not None
    assert torch.equal(one.target, other.target)


@pytest.mark.parametrize(("epochs", "start", "first"), [(100, 0.7, 69), (10, 0.7, 6), (36, 0.45, 16)])
def test_it_starts_at_epoch_70_of_100_counted_from_one(epochs, start, first):
    rule = SAT(start=start)
    rule.setup(RunInfo(LABELS, K, epochs))
    assert [rule.phase(e) for e in range(epochs)] == ["hard"] * first + ["refined"] * (epochs - first)
    assert rule.needs_clean("refined")
    assert not rule.needs_clean("hard")


def test_before_the_start_labels_are_hard_and_samples_alike():
    rule, index = started(), torch.arange(N)
    supervision = rule.supervise(batch(index), batch(index).image, predictions(0, N), "hard")
    assert torch.equal(supervision.target, nn.functional.one_hot(LABELS, K).float())
    assert supervision.weight is None
    assert torch.equal(rule.memory.read(index), supervision.target)
    assert torch.equal(rule.attack_target(batch(index), "refined"), LABELS)


@pytest.mark.parametrize(
    ("objective", "clean_bn", "updates"),
    [
        (PGDAT(), "train", 2),  # adversarial, then the clean forward for the rule
        (PGDAT(), "batch", 1),
        (PGDAT(), "eval", 1),
        (TRADES(), "eval", 2),  # TRADES' own clean forward serves: no third one
    ],
)
def test_batch_norm_statistics_move_as_often_as_documented(make_trainer, objective, clean_bn, updates):
    trainer = make_trainer(SAT(start=0.0, clean_bn=clean_bn), objective)
    plan = torch.cat([torch.arange(8)[:, None], torch.zeros(8, 3, dtype=torch.long)], dim=1)
    trainer.step(plan, Phase("refined", "fixed", "fixed"), key=1)
    assert trainer.net[1].num_batches_tracked.item() == updates


@pytest.mark.parametrize(
    "wrong", [{"alpha": 1.1}, {"start": -0.1}, {"clean_bn": "off"}, {"storage": "float64"}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=f"label.{next(iter(wrong))}"):
        SAT(**wrong)
