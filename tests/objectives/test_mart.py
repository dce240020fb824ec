import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.labels import SGLR, Hard, Predictions, Supervision
from softdefend.objectives import MART
from softdefend.objectives.mart import likeliest_wrong
from softdefend.training import OptimSettings
from tiny import batch_of

ADVERSARIAL, CLEAN = 2 * torch.randn(2, 8, 5, generator=stream(0, "z"))
LABEL = torch.arange(8) % 5
TARGET = softmax(torch.randn(8, 5, generator=stream(0, "t")).numpy(), axis=1)
BATCH = batch_of(torch.zeros(8, 1, 2, 2), LABEL)
BELIEF = Supervision(LABEL, torch.tensor(TARGET))


def naive(clean, adversarial, target, label, beta):
    """The paper's loss (table 1 and its boosted cross-entropy) sample by sample, in float64."""
    total = 0.0
    for x, z, t, y in zip(clean, adversarial, target, label, strict=True):
        p, q = x.softmax(0), z.softmax(0)
        others = [k for k in range(len(q)) if k != y]
        rival = others[int(q.detach()[others].argmax())]
        boosted = -(t * q.log()).sum() - (1.0001 - q[rival] + 1e-12).log()
        total = total + boosted + beta * (p * (p / q).log()).sum() * (1.0000001 - p[y])
    return total / len(clean)


@pytest.mark.parametrize("beta", [0.0, 1.0, 5.0])
def test_value_and_both_gradients_against_a_naive_float64_loop(beta):
    inputs = [CLEAN.double().requires_grad_(True), ADVERSARIAL.double().requires_grad_(True)]
    expected = naive(*inputs, torch.tensor(TARGET).double(), LABEL.tolist(), beta)
    clean, adversarial = (CLEAN.clone().requires_grad_(True), ADVERSARIAL.clone().requires_grad_(True))
    total = MART(beta).outer_loss(Predictions(adversarial, clean), BATCH, BELIEF)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(total, [clean, adversarial], materialize_grads=True)
    theirs = torch.autograd.grad(expected, inputs, materialize_grads=True)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), reference, atol=1e-6, rtol=1e-4)


def test_weighting_and_margin_use_the_given_label_where_another_is_believed():
    """With a target that names another class everywhere, only the label term may change."""
    elsewhere = torch.eye(5)[(LABEL + 1) % 5]
    given = Supervision(LABEL, torch.eye(5)[LABEL])
    seen = Predictions(ADVERSARIAL, CLEAN)
    difference = MART().outer_loss(seen, BATCH, Supervision(LABEL, elsewhere)) - MART().outer_loss(
        seen, BATCH, given
    )
    log_q = ADVERSARIAL.double().log_softmax(1)
    rows = torch.arange(8)
    only_label_term = (log_q[rows, LABEL] - log_q[rows, (LABEL + 1) % 5]).mean()
    assert difference.item() == pytest.approx(only_label_term.item(), rel=1e-5)


def test_an_image_that_is_surely_right_clean_is_not_pulled_and_one_that_is_surely_wrong_is_pulled_whole():
    sure = 30 * torch.eye(5)[torch.tensor([2, 3])]  # the label is 2 for both
    batch = batch_of(torch.zeros(2, 1, 2, 2), torch.tensor([2, 2]))
    belief = Supervision(batch.label, torch.eye(5)[batch.label])
    pulled = MART(1.0).outer_loss(Predictions(ADVERSARIAL[:2], sure), batch, belief) - MART(0.0).outer_loss(
        Predictions(ADVERSARIAL[:2], sure), batch, belief
    )
    q = softmax(ADVERSARIAL[1].double().numpy())
    wrong = rel_entr(softmax(sure[1].double().numpy()), q).sum()
    assert pulled.item() == pytest.approx(wrong / 2, rel=1e-4)


def test_the_margin_is_of_the_likeliest_wrong_class_also_where_the_network_is_right():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    q = softmax(logits.double().numpy(), axis=1)
    ours = likeliest_wrong(logits, torch.tensor([0, 0]))
    np.testing.assert_allclose(ours, [-np.log(1.0001 - q[0, 1]), -np.log(1.0001 - q[1, 2])], rtol=1e-5)


def test_a_batch_of_one_and_saturated_predictions_are_finite():
    clean = torch.tensor([[-200.0, 0.0, 200.0]], requires_grad=True)
    adversarial = torch.tensor([[-200.0, 200.0, 0.0]], requires_grad=True)
    batch = batch_of(torch.zeros(1, 1, 2, 2), torch.tensor([0]))
    total = MART().outer_loss(
        Predictions(adversarial, clean), batch, Supervision(batch.label, torch.eye(3)[batch.label])
    )
    total.backward()
    assert total.shape == ()
    assert total.isfinite()
    assert clean.grad.isfinite().all()
    assert adversarial.grad.isfinite().all()


def test_the_attack_climbs_cross_entropy_from_gaussian_noise(make_trainer):
    loss = MART().inner_loss(lambda image: image, BATCH, LABEL)
    q = softmax(ADVERSARIAL.double().numpy(), axis=1)
    np.testing.assert_allclose(loss(ADVERSARIAL), -np.log(q[np.arange(8), LABEL]), rtol=1e-5)
    assert make_trainer(Hard(), MART()).step.attack.start == "gaussian"


@pytest.mark.parametrize("label", [Hard(), SGLR(start=0.0)], ids=["hard", "sglr"])
def test_statistics_move_twice_a_step_once_clean_once_adversarial(make_trainer, label):
    trainer = make_trainer(label, MART(), optim=OptimSettings(epochs=1, batch_size=16))
    trainer.fit()
    assert int(trainer.net[1].num_batches_tracked) == 3 * 2


@pytest.mark.parametrize("beta", [-1.0, float("nan")])
def test_an_impossible_beta_is_refused(beta):
    with pytest.raises(SettingError, match=r"objective\.beta"):
        MART(beta)
