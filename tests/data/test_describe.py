from __future__ import annotations

import numpy as np
import pytest
import torch

from softdefend.data import DataSettings, Split, channel_stats, describe, from_tensors, load


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_channel_statistics_equal_numpys(kind: str) -> None:
    pixels = torch.randint(
        0, 200, (2500, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = pixels if kind == "uint8" else pixels.float() / 301
    values = images.numpy().astype(np.float64) / (255 if kind == "uint8" else 1)
    mean, std = channel_stats(Split(images, torch.zeros(2500, dtype=torch.int64)))
    np.testing.assert_allclose(mean, values.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(std, values.std(axis=(0, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("level", [torch.tensor(77, dtype=torch.uint8), torch.tensor(0.3)])
def test_a_constant_channel_can_be_divided_by(level: torch.Tensor) -> None:
    mean, std = channel_stats(
        Split(level.expand(50, 1, 8, 8).contiguous(), torch.zeros(50, dtype=torch.int64))
    )
    assert mean == pytest.approx([77 / 255 if level.dtype == torch.uint8 else 0.3])
    assert std == (1.0,)


def test_description_names_sizes_classes_counts_and_fingerprint() -> None:
    images = torch.zeros(30, 1, 4, 6, dtype=torch.uint8)
    labels = torch.tensor([0] * 20 + [1] * 10)
    bundle = from_tensors(
        images, labels, images[18:24], labels[18:24], validation=6, name="toy", classes=("odd", "even")
    )
    lines = [line.split() for line in describe(bundle).splitlines()]
    assert ["name", "toy"] in lines
    assert ["train", "24", "images"] in lines
    assert ["fingerprint", bundle.fingerprint] in lines
    assert ["image", "1x4x6"] in [line[:2] for line in lines]
    assert lines[-3:] == [
        ["class", "train", "validation", "test"],
        ["odd", "16", "4", "2"],
        ["even", "8", "2", "4"],
    ]


def test_description_tells_the_measured_noise() -> None:
    text = describe(load(DataSettings(validation=438, noise="symmetric", noise_rate=0.25)))
    assert "noise measured" in text
    assert "validation 0.0000" in text
    assert text.split("noise measured")[1].split()[:2] == ["train", "0.2500,"]
