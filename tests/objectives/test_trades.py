import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.labels import Predictions
from softdefend.objectives import PGDAT, TRADES
from tiny import batch_of, believed

ADVERSARIAL, CLEAN = 2 * torch.randn(2, 8, 5, generator=stream(0, "z"))
TARGET = softmax(np.random.default_rng(0).normal(size=(8, 5)), axis=1).astype(np.float32)
BATCH, SUPERVISION = batch_of(torch.zeros(8, 1, 2, 2)), believed(torch.tensor(TARGET))


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_value_against_scipy(beta):
    clean, adversarial = CLEAN.double().numpy(), ADVERSARIAL.double().numpy()
    cross_entropy = -(TARGET * log_softmax(clean, axis=1)).sum(1).mean()
    divergence = rel_entr(softmax(clean, axis=1), softmax(adversarial, axis=1)).sum(1).mean()
    total = TRADES(beta).outer_loss(Predictions(ADVERSARIAL, CLEAN), BATCH, SUPERVISION)
    assert total.item() == pytest.approx(cross_entropy + beta * divergence, rel=1e-5)


def test_gradient_flows_through_the_clean_branch_of_the_divergence():
    """Against finite differences: a detached clean branch (a known port's mistake, about 4 points of
    AutoAttack) would miss the divergence's part."""
    target = torch.tensor(TARGET).double()
    adversarial = ADVERSARIAL.double()

    def total(clean: torch.Tensor) -> torch.Tensor:
        log_p, log_q = clean.log_softmax(1), adversarial.log_softmax(1)
        return -(target * log_p).sum(1).mean() + 6 * (log_p.exp() * (log_p - log_q)).sum(1).mean()

    clean = CLEAN.clone().requires_grad_(True)
    TRADES(6.0).outer_loss(Predictions(ADVERSARIAL, clean), BATCH, SUPERVISION).backward()
    for row, column in ((0, 0), (3, 2), (7, 4)):
        bump = torch.zeros(8, 5, dtype=torch.float64)
        bump[row, column] = 1e-5
        slope = (total(CLEAN.double() + bump) - total(CLEAN.double() - bump)) / 2e-5
        assert clean.grad[row, column].item() == pytest.approx(slope.item(), abs=1e-5)


def test_the_attack_climbs_the_divergence_from_the_clean_prediction_with_one_clean_forward():
    net, calls = nn.Sequential(nn.Flatten(), nn.Linear(4, 5)), []
    net.register_forward_hook(lambda *_: calls.append(1))
    image = torch.rand(8, 1, 2, 2, generator=stream(1, "x"))
    loss = TRADES().inner_loss(net, batch_of(image), torch.zeros(8, dtype=torch.long))
    assert len(calls) == 1
    p = softmax(net(image).detach().numpy(), axis=1)
    q = softmax(ADVERSARIAL.numpy(), axis=1)
    np.testing.assert_allclose(loss(ADVERSARIAL), rel_entr(p, q).sum(1), rtol=1e-4, atol=1e-6)
    loss(ADVERSARIAL)
    assert len(calls) == 2


def test_pgd_at_is_cross_entropy_of_the_adversarial_images_only():
    total = PGDAT().outer_loss(Predictions(ADVERSARIAL, CLEAN), BATCH, SUPERVISION)
    assert total.item() == pytest.approx(
        -(TARGET * log_softmax(ADVERSARIAL.numpy(), axis=1)).sum(1).mean(), rel=1e-5
    )


def test_a_negative_beta_is_refused():
    with pytest.raises(SettingError, match=r"objective\.beta"):
        TRADES(-1)
