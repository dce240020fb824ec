from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.models.normalization import Normalize, normalize

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]


def test_subtracts_the_mean_and_divides_by_the_std_of_each_channel() -> None:
    image = torch.rand(4, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = np.stack([(image[:, c].numpy() - MEAN[c]) / STD[c] for c in range(3)], axis=1)
    np.testing.assert_allclose(Normalize(MEAN, STD)(image).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_statistics_travel_with_the_weights_and_are_not_trained() -> None:
    saved = normalize(nn.Flatten(), MEAN, STD).state_dict()
    net = normalize(nn.Flatten(), [0.0] * 3, [1.0] * 3)
    net.load_state_dict(saved)
    image = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(net(image), Normalize(MEAN, STD)(image).flatten(1), rtol=0, atol=0)
    assert list(net.parameters()) == []


def test_is_the_first_layer() -> None:
    net = normalize(nn.Identity(), MEAN, STD)
    assert isinstance(next(iter(net.children())), Normalize)
    assert "0.49" in repr(net)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.5], [0.0]),
        ([0.5], [-1.0]),
        ([0.5], [float("nan")]),
        ([float("inf")], [1.0]),
        ([0.5, 0.5], [1.0]),
        ([], []),
    ],
)
def test_unusable_statistics_are_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(SettingError, match="normalization"):
        Normalize(mean, std)
