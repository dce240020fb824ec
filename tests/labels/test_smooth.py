import numpy as np
import pytest
import torch
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.labels import Smooth
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
