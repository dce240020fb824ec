"""Training with noise: what the network sees."""

from __future__ import annotations

import pytest
import torch

from softdefend.attacks import PGD
from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.core.threat import Budget, ThreatModel
from softdefend.objectives import GaussianNoise


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_get_noise_of_the_given_deviation_and_no_attack(norm):
    image, asked = torch.rand(50, 3, 8, 8, generator=stream(0, "image")), []
    threat = ThreatModel(norm, Budget("8/255"))
    attack = GaussianNoise(sigma=0.4).training_attack(PGD(steps=10), threat)
    noisy = attack(asked.append, image, torch.zeros(50).long(), threat, generator=stream(0, "noise"))
    assert asked == []
    noise = (noisy - image).flatten()
    assert float(noise.std()) == pytest.approx(0.4, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.pow(4).mean() / noise.var().square()) == pytest.approx(3, abs=0.2)
    assert float(noisy.min()) < 0
    assert float(noisy.max()) > 1


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_a_deviation_that_is_none_is_refused(sigma):
    with pytest.raises(SettingError, match=r"objective\.sigma"):
        GaussianNoise(sigma)
