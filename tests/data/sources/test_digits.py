from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from softdefend.data.sources import digits


def test_digits_are_scikit_learns_on_a_scale_of_255() -> None:
    raw = digits.read_digits()
    source = load_digits()
    assert raw.train.images.shape == (1797, 1, 8, 8)
    assert raw.train.images.dtype == torch.uint8
    # Half a level of 255 is the most that rounding may move a gray level.
    moved = raw.train.images[:, 0].numpy() / 255 - source.images / 16
    assert np.abs(moved).max() <= 0.5 / 255 + 1e-12
    assert len(raw.train.images.unique()) == 17
    np.testing.assert_array_equal(raw.train.labels.numpy(), source.target)
    assert raw.classes == tuple("0123456789")
    assert raw.test is None
