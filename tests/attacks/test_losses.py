import numpy as np
import torch
from scipy.special import log_softmax, rel_entr, softmax

from softdefend.attacks import cross_entropy, kl_divergence, kl_from, margin
from softdefend.core.rng import stream

LOGITS = 3 * torch.randn(7, 5, generator=stream(0, "z"), dtype=torch.float64)
LABEL = torch.tensor([0, 4, 2, 2, 1, 3, 0])


def test_cross_entropy_of_labels_and_of_distributions_against_scipy():
    target = softmax(np.random.default_rng(0).normal(size=(7, 5)), axis=1)
    log_p = log_softmax(LOGITS.numpy(), axis=1)
    np.testing.assert_allclose(cross_entropy(LOGITS, LABEL), -log_p[np.arange(7), LABEL])
    np.testing.assert_allclose(cross_entropy(LOGITS, torch.tensor(target)), -(target * log_p).sum(1))


def test_margin_is_best_other_minus_true():
    rows = [max(z[:y] + z[y + 1 :]) - z[y] for z, y in zip(LOGITS.tolist(), LABEL.tolist(), strict=True)]
    np.testing.assert_allclose(margin(LOGITS, LABEL), rows)
    assert torch.equal(margin(LOGITS, LABEL) > 0, LOGITS.argmax(1) != LABEL)


def test_kl_against_scipy_and_its_direction():
    other = 3 * torch.randn(7, 5, generator=stream(1, "z"), dtype=torch.float64)
    p, q = softmax(LOGITS.numpy(), axis=1), softmax(other.numpy(), axis=1)
    np.testing.assert_allclose(kl_from(LOGITS)(other), rel_entr(p, q).sum(1))
    both = kl_divergence(LOGITS.log_softmax(1), other.log_softmax(1))
    np.testing.assert_allclose(both, rel_entr(p, q).sum(1))


def test_losses_stay_finite_on_saturated_logits():
    extreme = torch.tensor([[1e4, -1e4, 0.0]])
    for value in (
        cross_entropy(extreme, torch.tensor([1])),
        margin(extreme, torch.tensor([1])),
        kl_from(extreme)(-extreme),
    ):
        assert value.isfinite().all()
