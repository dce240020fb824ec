"""SGLR against closed forms and a naive float64 re-derivation of the reference's rule."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from softdefend.attacks import PGD
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.rule import RunInfo
from softdefend.core.threat import Budget, ThreatModel
from softdefend.data import Batch, Resident, Split
from softdefend.labels import SGLR, Hard, Predictions
from softdefend.training import Engine, OptimSettings, Recipe, RuntimeSettings
from softdefend.training.optim import make_optimizer
from softdefend.training.step import Phase, TrainStep

N, K = 12, 5
LABELS = torch.arange(N) % K


def batch(index: torch.Tensor) -> Batch:
    return Batch(index, torch.zeros(len(index), 1, 2, 2), LABELS[index])


def predictions(seed: int, size: int) -> Predictions:
    draw = 2 * torch.randn(2, size, K, generator=stream(seed, "logits"))
    return Predictions(draw[0], draw[1])


def started(**settings) -> SGLR:
    rule = SGLR(start=0.0, **settings)
    rule.setup(RunInfo(LABELS, K, epochs=10))
    return rule


def naive_row(row, label, clean, adversarial, alpha, clean_weight, r, temperature):
    """The rule in plain Python, one sample at a time."""

    def softmax(z):
        e = [math.exp(v / temperature - max(z) / temperature) for v in z]
        return [v / sum(e) for v in e]

    p, q = softmax(clean), softmax(adversarial)
    row = [
        alpha * t + (1 - alpha) * (clean_weight * a + (1 - clean_weight) * b)
        for t, a, b in zip(row, p, q, strict=True)
    ]
    return row, [r * t + (1 - r) * (1.0 if c == label else 0.0) for c, t in enumerate(row)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": 0.7, "clean_weight": 0.5, "r": 0.6, "temperature": 2.0},
        {"alpha": 0.0, "clean_weight": 1.0, "r": 1.0, "temperature": 0.5},
    ],
)
def test_three_updates_equal_the_rule_in_plain_python(settings):
    rule = started(**settings)
    full = {"alpha": 0.9, "clean_weight": 0.2, "r": 1.0, "temperature": 1.0, **settings}
    rows = [[1.0 if c == y else 0.0 for c in range(K)] for y in LABELS.tolist()]
    for step in range(3):
        index = torch.randperm(N, generator=stream(step, "order"))[:7]
        seen = predictions(step, 7)
        target = rule.target(batch(index), seen, "refined")
        for place, i in enumerate(index.tolist()):
            rows[i], expected = naive_row(
                rows[i],
                LABELS[i].item(),
                seen.clean[place].tolist(),
                seen.adversarial[place].tolist(),
                **full,
            )
            np.testing.assert_allclose(target[place], expected, atol=1e-6)
    np.testing.assert_allclose(rule.memory.table, rows, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.9, 0.5, 0.0, 1.0])
def test_the_given_label_weighs_alpha_to_the_k(alpha):
    """Predictions that put no mass on the given label leave it with exactly alpha^k."""
    rule = started(alpha=alpha)
    elsewhere = torch.full((N, K), -200.0)
    elsewhere[torch.arange(N), (LABELS + 1) % K] = 200.0
    for k in range(1, 6):
        target = rule.target(batch(torch.arange(N)), Predictions(elsewhere, elsewhere), "refined")
        np.testing.assert_allclose(target[torch.arange(N), LABELS], alpha**k, atol=1e-6)


def test_r_zero_is_the_hard_rule_exactly():
    hard = Hard()
    hard.setup(RunInfo(LABELS, K, 10))
    rule = started(r=0.0)
    index = torch.arange(N)
    for step in range(3):
        seen = predictions(step, N)
        assert torch.equal(
            rule.target(batch(index), seen, "refined"), hard.target(batch(index), seen, "fixed")
        )
        assert torch.equal(rule.attack_target(batch(index), "refined"), LABELS)


def test_clean_weight_one_ignores_adversarial_predictions():
    first, second = started(clean_weight=1.0), started(clean_weight=1.0)
    seen, index = predictions(0, N), torch.arange(N)
    other = Predictions(predictions(9, N).adversarial, seen.clean)
    assert torch.equal(
        first.target(batch(index), seen, "refined"), second.target(batch(index), other, "refined")
    )
    third = started(clean_weight=0.9)
    assert not torch.equal(third.target(batch(index), seen, "refined"), first.memory.table)


def test_update_after_uses_the_row_as_it_was():
    rule, index = started(update="after"), torch.arange(N)
    assert torch.equal(
        rule.target(batch(index), predictions(0, N), "refined"), nn.functional.one_hot(LABELS, K).float()
    )
    moved = rule.memory.table.clone()
    assert torch.equal(rule.target(batch(index), predictions(1, N), "refined"), moved)


def test_refined_attack_label_is_the_target_before_this_step():
    rule, index = started(attack_label="refined", r=0.7), torch.arange(N)
    target = rule.target(batch(index), predictions(0, N), "refined")
    torch.testing.assert_close(rule.attack_target(batch(index), "refined"), target)
    assert torch.equal(rule.attack_target(batch(index), "hard"), LABELS)


@pytest.mark.parametrize(
    ("epochs", "start", "first"),
    [(200, 0.45, 89), (36, 0.45, 16), (10, 0.0, 0), (10, 1.0, 9), (20, 0.45, 8), (40, 0.45, 17)],
)
def test_refinement_starts_where_the_reference_starts_it(epochs, start, first):
    """Epoch 90 of 200 counted from one, as the reference's sgls-es."""
    rule = SGLR(start=start)
    rule.setup(RunInfo(LABELS, K, epochs))
    phases = [rule.phase(e) for e in range(epochs)]
    assert phases == ["hard"] * first + ["refined"] * (epochs - first)
    assert not rule.needs_clean("hard")
    assert rule.needs_clean("refined")


def test_before_the_start_the_memory_does_not_move():
    rule = started()
    before = rule.memory.table.clone()
    rule.target(batch(torch.arange(N)), Predictions(predictions(0, N).adversarial), "hard")
    assert torch.equal(rule.memory.table, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 1.1},
        {"clean_weight": -0.1},
        {"r": 2},
        {"temperature": 0},
        {"start": 1.5},
        {"clean_bn": "off"},
        {"attack_label": "soft"},
        {"update": "never"},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=f"label.{next(iter(wrong))}"):
        SGLR(**wrong)


def test_one_step_equals_the_reference_rule_rederived_in_float64():
    """One whole training step (attack, two train-mode forwards, memory, loss, gradient) against a naive
    re-derivation of the published rule: loss, target and gradient agree to 1e-6."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, K),
    ).double()
    images = torch.rand(N, 1, 6, 6, generator=stream(0, "img"))
    twin = copy.deepcopy(net)
    rule, threat = SGLR(start=0.0), ThreatModel("linf", Budget("8/255"))
    rule.setup(RunInfo(LABELS, K, 10))
    optim = OptimSettings(lr=0.1, momentum=0.0, weight_decay=0.0)
    optimizer = make_optimizer(net, optim, torch.device("cpu"))
    recipe = Recipe(rule, threat=threat, attack=PGD(steps=10, step_size=Budget("2/255"), start="none"))
    step = _DoubleStep(
        net, Resident(Split(images, LABELS), "cpu"), recipe, optimizer, Engine(RuntimeSettings(device="cpu"))
    )
    index = torch.tensor([3, 0, 7, 11, 5])
    plan = torch.stack([index, *torch.zeros(3, 5, dtype=torch.long)], dim=1)
    step(plan, Phase("refined", "fixed", "fixed"), key=1)

    x, y = images[index].double(), LABELS[index]
    adversarial = x.clone()
    twin.eval()
    for _ in range(10):
        adversarial.requires_grad_(True)
        loss = nn.functional.cross_entropy(twin(adversarial), y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, adversarial)
        adversarial = (adversarial + 2 / 255 * slope.sign()).detach()
        adversarial = torch.clamp(torch.max(torch.min(adversarial, x + 8 / 255), x - 8 / 255), 0, 1)
    twin.train()
    logits = twin(adversarial)
    p_adv = torch.softmax(logits, 1).detach()
    p_clean = torch.softmax(twin(x), 1).detach()
    target = 0.9 * nn.functional.one_hot(y, K).double() + 0.1 * (0.2 * p_clean + 0.8 * p_adv)
    loss = -(target * torch.log_softmax(logits, 1)).sum(1).mean()
    loss.backward()

    np.testing.assert_allclose(rule.memory.table[index], target, atol=1e-6)
    assert step.meters[1].item() / 5 == pytest.approx(loss.item(), abs=1e-6)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        np.testing.assert_allclose(ours.grad, theirs.grad, atol=1e-6)
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


class _DoubleStep(TrainStep):
    """The step with images and logits in float64."""

    def forward(self, image):
        return self.net(image.double()).float()


@pytest.mark.parametrize("clean_weight", [0.0, 0.2])
@pytest.mark.parametrize("r", [0.5, 0.7, 1.0])
def test_where_the_clean_prediction_follows_the_label_only_the_given_labels_share_keeps_it_up(
    r, clean_weight
):
    """As in TRADES: p fits the last target, the attack leaves a share q of what is above 1/k. The fixed point
    is (1 - r) / (1 - r (lambda + (1 - lambda) q)); with r = 1 that is the uniform label."""
    q, rule = 0.7, started(r=r, clean_weight=clean_weight)
    every, target = batch(torch.arange(N)), nn.functional.one_hot(LABELS, K).float()
    for _ in range(400):
        attacked = 1 / K + q * (target - 1 / K)
        target = rule.target(every, Predictions(attacked.log(), target.log()), "refined")
    above = (target[torch.arange(N), LABELS] - 1 / K) / (1 - 1 / K)
    expected = (1 - r) / (1 - r * (clean_weight + (1 - clean_weight) * q))
    assert above.numpy() == pytest.approx(expected, abs=1e-3)
