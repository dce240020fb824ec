import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.labels import Hard, Predictions, Supervision
from softdefend.objectives import SCE
from softdefend.objectives.sce import reverse_cross_entropy
from softdefend.training import OptimSettings
from tiny import batch_of

LOGITS = 2 * torch.randn(8, 5, generator=stream(0, "z"))
LABEL = torch.arange(8) % 5
HARD = torch.eye(5)[LABEL]
BATCH = batch_of(torch.zeros(8, 1, 2, 2), LABEL)


def naive(logits, target, alpha, beta, clip=1e-4):
    """As the authors' code writes it, which clips the target from below before the logarithm."""
    p = softmax(logits, axis=1)
    forward = -(target * log_softmax(logits, axis=1)).sum(1)
    reverse = -(p * np.log(np.clip(target, clip, 1.0))).sum(1)
    return alpha * forward + beta * reverse


@pytest.mark.parametrize("target", [HARD, 0.8 * HARD + 0.04], ids=["hard", "smooth"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 1.0), (6.0, 0.1), (0.0, 1.0), (1.0, 0.0)])
def test_value_against_numpy(alpha, beta, target):
    total = SCE(alpha, beta).outer_loss(Predictions(LOGITS), BATCH, Supervision(LABEL, target))
    expected = naive(LOGITS.double().numpy(), target.double().numpy(), alpha, beta).mean()
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_against_central_differences():
    target = 0.9 * HARD + 0.02 * torch.eye(5)[(LABEL + 1) % 5] + 0.08 * torch.eye(5)[(LABEL + 2) % 5]
    logits = LOGITS.clone().requires_grad_(True)
    SCE().outer_loss(Predictions(logits), BATCH, Supervision(LABEL, target)).backward()
    base = LOGITS.double().numpy()
    for row, column in ((0, 0), (3, 2), (7, 4), (5, 0)):
        bump = np.zeros_like(base)
        bump[row, column] = 1e-5
        up, down = (naive(base + s * bump, target.double().numpy(), 0.1, 1.0).mean() for s in (1, -1))
        assert logits.grad[row, column].item() == pytest.approx((up - down) / 2e-5, abs=1e-6)


def test_for_a_hard_label_the_reverse_term_is_linear_in_the_probability_and_bounded():
    p = softmax(LOGITS.double().numpy(), axis=1)[np.arange(8), LABEL]
    np.testing.assert_allclose(reverse_cross_entropy(LOGITS, HARD, -4.0), 4 * (1 - p), rtol=1e-5)
    worst = reverse_cross_entropy(100 * torch.eye(5)[(LABEL + 1) % 5], HARD, -4.0)
    np.testing.assert_allclose(worst, 4.0, rtol=1e-6)


def test_the_floor_is_the_logarithm_of_the_reference_clip():
    assert SCE().log_zero == pytest.approx(math.log(1e-4))


def test_a_rules_sample_weights_count_for_both_terms():
    weight = torch.linspace(0.5, 1.5, 8)
    total = SCE().outer_loss(Predictions(LOGITS), BATCH, Supervision(LABEL, HARD, weight))
    each = naive(LOGITS.double().numpy(), HARD.double().numpy(), 0.1, 1.0)
    assert total.item() == pytest.approx((weight.numpy() * each).mean(), rel=1e-5)


def test_the_attack_climbs_plain_cross_entropy_and_statistics_move_once_a_step(make_trainer):
    loss = SCE().inner_loss(lambda image: image, BATCH, LABEL)(LOGITS)
    np.testing.assert_allclose(
        loss, -log_softmax(LOGITS.double().numpy(), axis=1)[np.arange(8), LABEL], rtol=1e-5
    )
    trainer = make_trainer(Hard(), SCE(), optim=OptimSettings(epochs=1, batch_size=16))
    trainer.fit()
    assert int(trainer.net[1].num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"beta": float("nan")}, "beta"),
        ({"alpha": 0.0, "beta": 0.0}, "beta"),
        ({"log_zero": 0.0}, "log_zero"),
        ({"log_zero": -math.inf}, "log_zero"),
    ],
)
def test_impossible_settings_are_refused(settings, name):
    with pytest.raises(SettingError, match=rf"objective\.{name}"):
        SCE(**settings)
