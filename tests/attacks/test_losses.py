import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from softdefend.attacks import (
    cross_entropy,
    dlr,
    kl_divergence,
    kl_from,
    margin,
    match_logits,
    targeted_dlr,
)
from softdefend.core.errors import SettingError
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


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cross_entropy(LOGITS, LABEL[:6]), "target: got shape [6] for logits [7, 5]"),
        (lambda: cross_entropy(LOGITS, LOGITS[:, :4]), "target: got shape [7, 4] for logits [7, 5]"),
        (lambda: margin(LOGITS, LABEL[:1]), "target: got shape [1]"),
        (lambda: dlr(LOGITS, LABEL[:, None]), "target: got shape [7, 1]"),
        (lambda: targeted_dlr(LOGITS, LABEL, LABEL[:2]), "target: got shape [2]"),
        (lambda: targeted_dlr(LOGITS, LABEL[:2], LABEL), "target: got shape [2]"),
        (lambda: kl_from(LOGITS[:3])(LOGITS), "attack.loss: got logits of 3 images to measure from"),
        (lambda: kl_from(LOGITS)(LOGITS[:, :4]), "attack.loss: got 5 logits to measure from"),
        (lambda: match_logits(LOGITS[:3])(LOGITS), "attack.loss: got logits of 3 images to match"),
        (lambda: match_logits(LOGITS[0]), "attack.loss: got float64 of shape [5] as logits"),
        (lambda: match_logits(LABEL[:, None]), "attack.loss: got int64 of shape [7, 1] as logits"),
        (lambda: match_logits(LOGITS.tolist()), "attack.loss: got a list as logits"),
    ],
    ids=range(12),
)
def test_numbers_of_other_images_are_one_line(call, said):
    with pytest.raises(SettingError) as caught:
        call()
    assert str(caught.value).startswith(said)


def test_one_images_logits_are_matched_by_all():
    everyone = match_logits(LOGITS[:1].expand(7, 5))(LOGITS)
    assert torch.equal(match_logits(LOGITS[:1])(LOGITS), everyone)
