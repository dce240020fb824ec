import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.labels import Hard, Predictions, Supervision
from softdefend.objectives import MLCAT
from softdefend.training import OptimSettings
from tiny import batch_of

LABEL = torch.arange(12) % 10
EASY = 7 * (torch.arange(12) % 2)[:, None] * torch.eye(10)[LABEL]
LOGITS = 3 * torch.randn(12, 10, generator=stream(0, "z")) + EASY
BATCH = batch_of(torch.zeros(12, 1, 2, 2), LABEL)
BELIEF = Supervision(LABEL, torch.eye(10)[LABEL])
LOSS = -log_softmax(LOGITS.double().numpy(), axis=1)[np.arange(12), LABEL]
SLOPE = (softmax(LOGITS.double().numpy(), axis=1) - np.eye(10)[LABEL]) / 12
SMALL = LOSS < 1.5


def value_and_gradient(rule, logits=LOGITS, belief=BELIEF):
    logits = logits.clone().requires_grad_(True)
    total = rule.outer_loss(Predictions(logits), BATCH, belief)
    return total.item(), torch.autograd.grad(total, logits)[0].numpy()


def test_the_examples_are_of_both_kinds():
    assert 3 <= SMALL.sum() <= 9


def test_small_losses_pull_as_much_harder_as_they_are_too_small():
    """The derivative of cross-entropy by hand, (p - y) / b, times 1.5 / loss where the loss is below 1.5."""
    value, gradient = value_and_gradient(MLCAT())
    assert value == pytest.approx(np.maximum(LOSS, 1.5).mean(), rel=1e-5)
    expected = SLOPE * np.where(SMALL, 1.5 / LOSS, 1.0)[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_the_published_code_has_the_same_value_and_no_gradient_on_small_losses():
    value, gradient = value_and_gradient(MLCAT(gradient="published"))
    assert value == pytest.approx(np.maximum(LOSS, 1.5).mean(), rel=1e-5)
    assert (gradient[SMALL] == 0).all()
    np.testing.assert_allclose(gradient[~SMALL], SLOPE[~SMALL], rtol=1e-4, atol=1e-7)


def test_published_is_what_an_undetached_factor_computes():
    """The authors' way of writing it, in float64: loss times max(1, 1.5 / loss), nothing cut."""
    logits = LOGITS.double().requires_grad_(True)
    loss = nn.functional.cross_entropy(logits, LABEL, reduction="none")
    rate = 1.5 / loss
    total = (loss * torch.where(rate > 1, rate, 1.0)).mean()
    (theirs,) = torch.autograd.grad(total, logits)
    value, gradient = value_and_gradient(MLCAT(gradient="published"))
    assert value == pytest.approx(total.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, theirs.numpy(), atol=1e-7)


def test_the_least_loss_is_in_nats_and_below_all_losses_changes_nothing():
    value, gradient = value_and_gradient(MLCAT(l_min=1e-9))
    assert value == pytest.approx(LOSS.mean(), rel=1e-5)
    np.testing.assert_allclose(gradient, SLOPE, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("gradient", ["scaled", "published"])
def test_a_loss_of_zero_is_finite(gradient):
    _, slope = value_and_gradient(MLCAT(gradient=gradient), 200 * torch.eye(10)[LABEL])
    assert np.isfinite(slope).all()


def test_what_counts_as_small_is_the_label_rules_loss():
    """A smoothed target keeps the loss of a sure prediction away from zero: it is not small then."""
    smooth = Supervision(LABEL, 0.5 * torch.eye(10)[LABEL] + 0.05)
    sure = 20 * torch.eye(10)[LABEL]
    value, _ = value_and_gradient(MLCAT(), sure, smooth)
    expected = -(smooth.target.numpy() * log_softmax(sure.double().numpy(), axis=1)).sum(1).mean()
    assert expected > 1.5
    assert value == pytest.approx(expected, rel=1e-5)


def test_statistics_move_once_a_step(make_trainer):
    trainer = make_trainer(Hard(), MLCAT(), optim=OptimSettings(epochs=1, batch_size=16))
    trainer.fit()
    assert int(trainer.net[1].num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"l_min": 0.0}, "l_min"), ({"l_min": float("inf")}, "l_min"), ({"gradient": "x"}, "gradient")],
)
def test_impossible_settings_are_refused(settings, name):
    with pytest.raises(SettingError, match=rf"objective\.{name}"):
        MLCAT(**settings)
