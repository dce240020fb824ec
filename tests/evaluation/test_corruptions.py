"""Corruptions against closed forms, Pillow, colorsys and naive loops."""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from softdefend.data import split
from softdefend.errors import SettingError
from softdefend.evaluation.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
    defocus_kernel,
    evaluate_corruptions,
)
from softdefend.rng import stream

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")


def pictures(n: int = 6, c: int = 3, h: int = 12, w: int = 9) -> torch.Tensor:
    return torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=stream(0, "pictures"))


def smooth(n: int = 4, c: int = 3, h: int = 32, w: int = 32) -> torch.Tensor:
    """Waves: neighbouring pixels are alike, as in photographs."""
    y, x = torch.meshgrid(torch.linspace(0, 3, h), torch.linspace(0, 5, w), indexing="ij")
    waves = torch.stack([torch.sin(x + i) * torch.cos(y * (i + 1)) for i in range(n * c)])
    return (255 * (0.5 + 0.45 * waves)).to(torch.uint8).view(n, c, h, w)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 11, 17), (2, 9, 6)], ids=str)
def test_shape_type_and_range_stay(name, shape):
    images = pictures(3, *shape)
    for severity in (1, 5):
        damaged = corrupt(images, name, severity)
        assert (damaged.shape, damaged.dtype) == (images.shape, torch.uint8)
        continuous = corrupt(images.float() / 255, name, severity)
        assert continuous.dtype == torch.float32
        assert continuous.min() >= 0
        assert continuous.max() <= 1
        # the same corruption, but for the last level
        assert (255 * continuous - damaged.float()).abs().max() <= 1.01


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_severity_moves_images_further(name):
    images = smooth()
    distance = [(corrupt(images, name, s).float() - images.float()).square().mean() for s in SEVERITIES]
    assert 0 < distance[0] < distance[2] < distance[4]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_damaged_the_same_wherever_it_stands(name):
    images = pictures(6)
    whole = corrupt(images, name, 3, seed=5)
    parts = torch.cat([corrupt(images[:1], name, 3, seed=5), corrupt(images[1:], name, 3, seed=5, first=1)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole, corrupt(images, name, 3, seed=5))
    assert torch.equal(whole, corrupt(images, name, 3, seed=6)) == (name not in NOISES)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_variance_of_its_law(severity):
    value, shape = 0.4, (8, 3, 64, 64)
    grey = torch.full(shape, value, dtype=torch.float64)
    level = {name: CORRUPTIONS[name][1][severity - 1] for name in NOISES}
    p = level["impulse_noise"]
    salted = p / 2 + (1 - p) * value
    law = {
        "gaussian_noise": (value, level["gaussian_noise"] ** 2),
        "shot_noise": (value, value / level["shot_noise"]),
        "speckle_noise": (value, (level["speckle_noise"] * value) ** 2),
        "impulse_noise": (salted, p / 2 + (1 - p) * value**2 - salted**2),
    }
    for name, (mean, variance) in law.items():
        noisy = corrupt(grey, name, severity)
        error = 6 * math.sqrt(variance / grey.numel())  # six standard errors of the mean
        assert noisy.mean().item() == pytest.approx(mean, abs=error)
        assert noisy.var().item() == pytest.approx(variance, rel=0.05)


def test_impulses_are_black_or_white_and_as_many_as_the_level():
    grey = torch.full((8, 3, 64, 64), 0.4)
    hit = corrupt(grey, "impulse_noise", 5)
    changed = hit[hit != grey[0, 0, 0, 0]]
    assert set(changed.tolist()) == {0.0, 1.0}
    assert len(changed) / hit.numel() == pytest.approx(0.07, rel=0.03)
    assert changed.mean().item() == pytest.approx(0.5, abs=0.03)


def test_contrast_is_the_closed_form():
    images = pictures().double() / 255
    means = images.mean((2, 3), keepdim=True)
    wanted = 0.15 * images + 0.85 * means
    torch.testing.assert_close(corrupt(images, "contrast", 5), wanted, atol=1e-6, rtol=0)


def test_brightness_is_the_standard_librarys_hsv():
    images = pictures(2, 3, 4, 5)
    images[0, :, 0, 0] = 0  # black has no hue
    images[0, :, 0, 1] = 255
    for severity, add in zip(SEVERITIES, (0.05, 0.1, 0.15, 0.2, 0.3), strict=True):
        got = corrupt(images.float() / 255, "brightness", severity)
        for n, y, x in np.ndindex(2, 4, 5):
            h, s, v = colorsys.rgb_to_hsv(*(images[n, :, y, x].double() / 255).tolist())
            wanted = colorsys.hsv_to_rgb(h, s, min(v + add, 1))
            np.testing.assert_allclose(got[n, :, y, x], wanted, atol=1e-6)


def test_brightness_of_grey_is_a_sum():
    images = pictures(2, 1)
    wanted = (images.float() / 255 + 0.2).clamp(max=1)
    torch.testing.assert_close(corrupt(images.float() / 255, "brightness", 4), wanted)


@pytest.mark.parametrize(("shape", "mode"), [((3, 13, 10), "RGB"), ((1, 13, 10), "L")], ids=["rgb", "grey"])
def test_jpeg_and_pixelation_are_pillows(shape, mode):
    images = pictures(3, *shape)
    for severity, quality, share in ((1, 80, 0.95), (5, 40, 0.65)):
        jpeg, blocks = (corrupt(images, name, severity) for name in ("jpeg_compression", "pixelate"))
        for i, image in enumerate(images):
            pixels = image.permute(1, 2, 0).numpy() if mode == "RGB" else image[0].numpy()
            picture = Image.fromarray(pixels)
            assert picture.mode == mode
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=quality)
            small = picture.resize((int(10 * share), int(13 * share)), Image.Resampling.BOX)
            for got, wanted in (
                (jpeg[i], Image.open(buffer)),
                (blocks[i], small.resize((10, 13), Image.Resampling.BOX)),
            ):
                expected = np.asarray(wanted).reshape(13, 10, -1).transpose(2, 0, 1)
                np.testing.assert_array_equal(got.numpy(), expected)


def test_channels_that_are_no_colours_are_treated_one_by_one():
    images = pictures(2, 2)
    for name in ("jpeg_compression", "pixelate"):
        alone = torch.cat([corrupt(images[:, i : i + 1], name, 5) for i in range(2)], dim=1)
        assert torch.equal(corrupt(images, name, 5), alone)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_is_a_naive_correlation_mirrored_at_the_border(severity):
    radius, alias = CORRUPTIONS["defocus_blur"][1][severity - 1]
    # the kernel by its definition: a disk on a 17x17 grid, smoothed once by three taps in each direction
    grid = np.zeros((17, 17))
    for y, x in np.ndindex(17, 17):
        grid[y, x] = (x - 8) ** 2 + (y - 8) ** 2 <= radius**2
    grid /= grid.sum()
    taps = np.array([math.exp(-1 / (2 * alias**2)), 1, math.exp(-1 / (2 * alias**2))])
    taps /= taps.sum()
    padded = np.pad(grid, 1)
    wanted = sum(taps[i] * taps[j] * padded[i : i + 17, j : j + 17] for i, j in np.ndindex(3, 3))
    kernel = defocus_kernel(radius, alias)
    reach = len(kernel) // 2
    np.testing.assert_allclose(kernel, wanted[8 - reach : 9 + reach, 8 - reach : 9 + reach], atol=1e-12)
    assert kernel.sum() == pytest.approx(1)

    images = pictures(1, 1, 7, 6).double() / 255
    blurred = corrupt(images, "defocus_blur", severity)[0, 0]
    wide = np.pad(images[0, 0].numpy(), reach, mode="reflect")
    size = len(kernel)
    for y, x in np.ndindex(7, 6):
        assert blurred[y, x] == pytest.approx((wide[y : y + size, x : x + size] * kernel).sum(), abs=1e-6)


def test_gaussian_blur_of_a_point_is_a_gaussian():
    point = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    point[0, 0, 10, 10] = 1
    blurred = corrupt(point, "gaussian_blur", 5)[0, 0]
    line = torch.exp(-torch.arange(-10, 11).double().square() / 2)
    line[line < math.exp(-8.1)] = 0  # cut at four standard deviations
    line /= line.sum()
    torch.testing.assert_close(blurred, torch.outer(line, line), atol=1e-6, rtol=0)


def test_unchanged_levels_stay_whole():
    """Flat images are fixed points of the blurs and of contrast; a level may not be lost on the way."""
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 8, 8).contiguous()
    for name in ("gaussian_blur", "defocus_blur", "contrast", "pixelate"):
        assert torch.equal(corrupt(levels, name, 5), levels), name


class Brightest(nn.Module):
    """Logits: mean of the upper and of the lower half."""

    def forward(self, image):
        half = image.shape[2] // 2
        return torch.stack([image[:, :, :half].mean((1, 2, 3)), image[:, :, half:].mean((1, 2, 3))], 1)


def test_the_table_counts_what_a_loop_counts():
    images = pictures(40, 1, 8, 8)
    images[::2, :, :4] //= 2
    images[1::2, :, 4:] //= 2
    labels = torch.arange(40) % 2
    labels = 1 - labels
    net = Brightest()
    table = evaluate_corruptions(net, split(images, labels), batch_size=7, seed=3, limit=33)
    assert table["n"] == 33
    rates = []
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            damaged = corrupt(images[:33], name, severity, 3).float() / 255
            count = int((net(damaged).argmax(1) == labels[:33]).sum())
            assert table["corruptions"][name]["severities"][severity - 1]["count"] == count
            rates.append(count / 33)
    assert table["mean"] == pytest.approx(sum(rates) / 50)
    assert table["clean"]["count"] == int((net(images[:33].float() / 255).argmax(1) == labels[:33]).sum())


def test_the_batch_size_is_no_part_of_the_result():
    images, labels = pictures(20), torch.arange(20) % 2
    tables = [
        evaluate_corruptions(Brightest(), split(images, labels), batch_size=size, names=["shot_noise"])
        for size in (3, 20)
    ]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"name": "rain"}, "corruption"),
        ({"severity": 0}, "severity"),
        ({"severity": 6}, "severity"),
        ({"images": torch.zeros(3, 4, 4)}, "images"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "images"),
    ],
    ids=str,
)
def test_what_cannot_be_corrupted_is_refused(change, setting):
    with pytest.raises(SettingError, match=f"^{setting}: got"):
        corrupt(**{"images": pictures(), "name": "contrast", "severity": 1, **change})
