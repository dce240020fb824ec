import numpy as np
import pytest
import torch
from torch import nn

from softdefend.attacks.losses import cross_entropy
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.rule import RunInfo
from softdefend.data import Batch
from softdefend.labels import Predictions, Smooth
from softdefend.labels.smooth import smooth

ONE_HOT = nn.functional.one_hot(torch.tensor([2, 0, 3]), 4).float()


def test_uniform_convention_is_torchs():
    logits = torch.randn(3, 4, generator=stream(0, "z"))
    theirs = nn.functional.cross_entropy(logits, ONE_HOT.argmax(1), label_smoothing=0.3)
    ours = nn.functional.cross_entropy(logits, smooth(ONE_HOT, 0.3, "uniform"))
    torch.testing.assert_close(ours, theirs)


def test_others_convention_leaves_the_true_class_exactly_one_minus_s():
    np.testing.assert_allclose(smooth(ONE_HOT, 0.3, "others")[0], [0.1, 0.1, 0.7, 0.1], atol=1e-7)


@pytest.mark.parametrize("wrong", [{"smoothing": 1.0}, {"smoothing": -0.1}, {"convention": "mine"}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=f"label.{next(iter(wrong))}"):
        Smooth(**wrong)


def test_the_term_of_the_attack_is_smoothed_apart_from_that_of_the_loss():
    label = torch.tensor([0, 3, 1])
    batch = Batch(torch.arange(3), torch.zeros(3, 1, 2, 2), label)
    for attack_label in ("hard", "smoothed"):
        rule = Smooth(0.3, "uniform", attack_label)
        rule.setup(RunInfo(label, 4, epochs=3))
        target = rule.target(batch, Predictions(torch.zeros(3, 4)), rule.phase(0))
        climbed = rule.attack_target(batch, rule.phase(0))
        assert torch.equal(climbed, label if attack_label == "hard" else target)
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(logits, label, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, climbed), expected)
    with pytest.raises(SettingError, match=r"^label\.attack_label: got 'soft'; accepted: hard or smoothed"):
        Smooth(attack_label="soft")
