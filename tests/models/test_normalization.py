from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.models.normalization import Normalize, find_normalizations, normalize

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


# --- what a network does to its input -----------------------------------------------------------------------

IMAGE = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def body() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


class Inside(nn.Module):
    """Something done to the image in the forward itself."""

    def __init__(self, change) -> None:
        super().__init__()
        self.body, self.change = body(), change

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(self.change(image))


class Learned(nn.Module):
    """Mean and standard deviation as frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(MEAN).view(1, -1, 1, 1), requires_grad=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / 0.25


COLUMN = torch.tensor(MEAN).view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("net", "means", "stds"),
    [
        (body(), [], []),
        (normalize(body(), MEAN, STD), [MEAN], [STD]),
        (Inside(lambda x: (x - COLUMN) / 0.25), [MEAN], [[0.25] * 3]),
        (Inside(lambda x: x / 255), [[0.0] * 3], [[255.0] * 3]),
        (Inside(lambda x: 2 * x - 1), [[0.5] * 3], [[0.5] * 3]),
        (nn.Sequential(Learned(), body()), [MEAN], [[0.25] * 3]),
        (nn.Sequential(nn.BatchNorm2d(3), body()), [], []),  # its own to learn
        (nn.Sequential(nn.Identity(), nn.Dropout(0.5), body()), [], []),
        (Inside(lambda x: x.flip(1)), [], []),
        (Inside(lambda x: x.clamp(0.2, 0.8)), [], []),
        (nn.Sequential(nn.Flatten(), nn.Linear(108, 5)), [], []),
        (normalize(nn.Sequential(nn.Flatten(), nn.Linear(108, 5)), MEAN, STD), [MEAN], [STD]),
        (
            normalize(normalize(body(), [0.0] * 3, [2.0] * 3), MEAN, STD),
            [MEAN, MEAN],
            [STD, [0.5, 0.48, 0.52]],
        ),
        (normalize(Inside(lambda x: 2 * x), MEAN, STD), [MEAN, MEAN], [STD, [0.125, 0.12, 0.13]]),
        (normalize(nn.Sequential(nn.Identity(), body()), MEAN, STD), [MEAN], [STD]),
    ],
)
def test_normalizations_are_found_by_what_they_do(net, means, stds) -> None:
    net.train()
    found = find_normalizations(net, IMAGE)
    assert [mean for mean, _ in found] == [pytest.approx(mean, abs=1e-5) for mean in means]
    assert [std for _, std in found] == [pytest.approx(std, rel=1e-4) for std in stds]
    assert all(not m._forward_pre_hooks and not m._forward_hooks and m.training for m in net.modules())


def test_nothing_is_said_of_images_without_contrast() -> None:
    assert find_normalizations(normalize(body(), MEAN, STD), torch.full((2, 3, 6, 6), 0.5)) == []
