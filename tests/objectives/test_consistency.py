import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, softmax

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data import AugmentSettings
from softdefend.labels import Hard, Predictions, Supervision
from softdefend.objectives import Consistency
from softdefend.objectives.consistency import jensen_shannon
from softdefend.training import OptimSettings
from tiny import batch_of

LOGITS = 2 * torch.randn(12, 5, generator=stream(0, "z"))
LABEL = torch.tensor([0, 3, 1, 1, 4, 2])
TARGET = softmax(torch.randn(6, 5, generator=stream(0, "t")).double().numpy(), axis=1)
BATCH = batch_of(torch.zeros(6, 1, 2, 2), LABEL)


def naive(logits, target, weight, temperature):
    """Two views of six samples, view after view."""
    twice = np.concatenate([target, target])
    cross_entropy = -(twice * log_softmax(logits, axis=1)).sum(1).mean()
    p, q = softmax(logits[:6] / temperature, axis=1), softmax(logits[6:] / temperature, axis=1)
    divergence = np.mean([jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)])
    return cross_entropy + weight * divergence


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 0.5), (0.0, 0.5), (10.0, 2.0)])
def test_value_and_gradient_against_scipy(weight, temperature):
    logits = LOGITS.clone().requires_grad_(True)
    belief = Supervision(LABEL, torch.tensor(TARGET).float())
    total = Consistency(weight, temperature).outer_loss(Predictions(logits), BATCH, belief)
    base = LOGITS.double().numpy()
    assert total.item() == pytest.approx(naive(base, TARGET, weight, temperature), rel=1e-5)
    total.backward()
    for row, column in ((0, 0), (5, 4), (6, 1), (11, 3)):
        bump = np.zeros_like(base)
        bump[row, column] = 1e-5
        up, down = (naive(base + sign * bump, TARGET, weight, temperature) for sign in (1, -1))
        assert logits.grad[row, column].item() == pytest.approx((up - down) / 2e-5, abs=1e-5)


def test_the_divergence_is_symmetric_bounded_and_zero_for_equal_predictions():
    first, second = LOGITS[:6], LOGITS[6:]
    torch.testing.assert_close(jensen_shannon(first, second, 0.5), jensen_shannon(second, first, 0.5))
    torch.testing.assert_close(jensen_shannon(first, first + 7.0, 0.5), torch.zeros(6), atol=1e-6, rtol=0)
    apart = jensen_shannon(90 * torch.eye(5), 90 * torch.eye(5).roll(1, 0), 0.5)
    torch.testing.assert_close(apart, torch.full((5,), math.log(2)))


def test_both_views_are_augmentations_of_the_same_images_attacked_and_forwarded_at_once(make_trainer, bundle):
    trainer = make_trainer(
        Hard(),
        Consistency(),
        optim=OptimSettings(epochs=1, batch_size=16),
        augment=AugmentSettings("crop-flip", pad=1),
    )
    batches, sizes = [], []
    goal, forward = trainer.recipe.objective, trainer.step._forward
    inner = goal.inner_loss
    goal.inner_loss = lambda f, batch, target: batches.append((batch, target)) or inner(f, batch, target)
    trainer.step._forward = lambda image: sizes.append(len(image)) or forward(image)
    trainer.fit()
    assert sizes == 3 * [32] * 4  # a step: three of the attack, one of the update
    differ = 0
    for batch, target in batches:
        assert batch.index.shape == batch.label.shape == (16,)
        assert target.tolist() == 2 * batch.label.tolist()
        for position, index in enumerate(batch.index.tolist()):
            original = bundle.train.images[index].float()
            original = original / 255 if bundle.train.images.dtype == torch.uint8 else original
            padded = torch.nn.functional.pad(original, (1, 1, 1, 1))
            crops = [
                padded[:, top : top + 6, left : left + 6]
                for top, left in itertools.product(range(3), repeat=2)
            ]
            possible = [*crops, *[crop.flip(2) for crop in crops]]
            views = batch.image[position], batch.image[16 + position]
            for view in views:
                assert any(torch.allclose(view, candidate) for candidate in possible)
            differ += not torch.equal(*views)
    assert differ > 0.8 * 48  # one chance in 18 that two draws agree


def test_statistics_move_once_a_step(make_trainer):
    trainer = make_trainer(Hard(), Consistency(), optim=OptimSettings(epochs=1, batch_size=16))
    trainer.fit()
    assert int(trainer.net[1].num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("settings", "name"), [({"weight": -1.0}, "weight"), ({"temperature": 0.0}, "temperature")]
)
def test_impossible_settings_are_refused(settings, name):
    with pytest.raises(SettingError, match=rf"objective\.{name}"):
        Consistency(**settings)
