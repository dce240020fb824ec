"""Against Pillow, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chisquare

from softdefend.core.rng import stream
from softdefend.data.policies import (
    FULL,
    OPERATIONS,
    augment,
    cifar10_policy,
    draw_autoaugment,
    draw_randaugment,
)

B, H, W = 6, 24, 32
# Not the whole range of brightness, so that stretching and spreading change something.
PIXELS = torch.randint(20, 200, (B, 3, H, W), dtype=torch.uint8, generator=stream(0, "pixels"))
LEVELS = [-FULL, -39, -9, 0, 3, 27, 30, 60, FULL]


def apply(name: str, level: int, pixels: torch.Tensor = PIXELS) -> np.ndarray:
    """Our result in 256 levels, not rounded."""
    draws = torch.tensor([[[OPERATIONS.index(name), level]]]).expand(len(pixels), 1, 2)
    out = augment(pixels.float() / 255, draws)
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1
    return 255 * out.numpy().astype(np.float64)


def pillow(change, pixels: torch.Tensor = PIXELS) -> np.ndarray:
    """Pillow's result for each image, [b, c, h, w]."""
    images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).numpy()]
    return np.stack([np.asarray(change(image)) for image in images]).transpose(0, 3, 1, 2).astype(np.float64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["brightness", "color", "contrast", "sharpness"])
def test_enhancements_are_pillows_to_a_level_or_two(name: str, level: int) -> None:
    factor = 1 + 0.9 * level / FULL
    theirs = pillow(lambda image: getattr(ImageEnhance, name.capitalize())(image).enhance(factor))
    np.testing.assert_allclose(apply(name, level), theirs, atol=2)


@pytest.mark.parametrize("level", [level for level in LEVELS if level >= 0])
def test_tones_are_pillows(level: int) -> None:
    strength = level / FULL
    bits = 8 - round(4 * strength)
    np.testing.assert_allclose(
        apply("posterize", level), pillow(lambda image: ImageOps.posterize(image, bits)), atol=1e-3
    )
    threshold = 255 * (FULL - level) / FULL
    np.testing.assert_allclose(
        apply("solarize", level), pillow(lambda image: ImageOps.solarize(image, threshold)), atol=1e-3
    )
    np.testing.assert_allclose(apply("invert", level), pillow(ImageOps.invert), atol=1e-3)
    np.testing.assert_allclose(apply("autocontrast", level), pillow(ImageOps.autocontrast), atol=1)
    np.testing.assert_allclose(apply("equalize", level), pillow(ImageOps.equalize), atol=1e-3)


@pytest.mark.parametrize(
    "pixels",
    [
        PIXELS[:, :, :5, :6],  # too few pixels to be spread over 256 levels
        (PIXELS // 64) * 64,  # few levels, many of each
        torch.full_like(PIXELS, 77),
    ],
)
def test_spreading_and_stretching_of_odd_images_are_pillows(pixels: torch.Tensor) -> None:
    theirs = pillow(ImageOps.equalize, pixels)
    np.testing.assert_allclose(apply("equalize", 0, pixels), theirs, atol=1e-3)
    np.testing.assert_allclose(
        apply("autocontrast", 0, pixels), pillow(ImageOps.autocontrast, pixels), atol=1
    )


# Not 60, where every fifth source lies halfway between two pixels, and rounding decides.
@pytest.mark.parametrize("level", [57 if level == 60 else level for level in LEVELS])
def test_shears_and_translations_are_pillows(level: int) -> None:
    slope, strength = 0.3 * level / FULL, level / FULL
    across, down = int(150 / 331 * W * strength), int(150 / 331 * H * strength)
    for name, matrix in (
        ("shear-x", (1, slope, 0, 0, 1, 0)),
        ("shear-y", (1, 0, 0, slope, 1, 0)),
        ("translate-x", (1, 0, across, 0, 1, 0)),
        ("translate-y", (1, 0, 0, 0, 1, down)),
    ):
        ours = apply(name, level)
        theirs = pillow(lambda image, m=matrix: image.transform(image.size, Image.Transform.AFFINE, m))
        agree = np.isclose(ours, theirs, atol=1e-3).mean()
        assert agree == 1 if name.startswith("translate") else agree > 0.995, name


@pytest.mark.parametrize("level", LEVELS)
def test_rotations_are_pillows(level: int) -> None:
    theirs = pillow(lambda image: image.rotate(30 * level / FULL))
    assert np.isclose(apply("rotate", level), theirs, atol=1e-3).mean() > 0.99


def test_identity_and_level_zero_leave_images_as_they_are() -> None:
    for name in ("identity", *OPERATIONS[1:10], "posterize"):
        np.testing.assert_allclose(apply(name, 0), PIXELS.numpy(), atol=1e-3)
    image = torch.rand(B, 3, H, W, generator=stream(0, "float"))
    assert torch.equal(augment(image, torch.tensor([[[0, FULL]]]).expand(B, 1, 2)), image)


def test_each_image_has_its_own_operations_whatever_stands_beside_it() -> None:
    image = torch.rand(200, 3, 12, 12, generator=stream(0, "float"))
    draws = draw_randaugment(200, 3, 20, stream(0, "policy"))
    out, order = augment(image, draws), torch.randperm(200, generator=stream(0, "order"))
    assert torch.equal(augment(image[order], draws[order]), out[order])
    assert torch.equal(
        torch.cat([augment(*pair) for pair in zip(image.split(7), draws.split(7), strict=True)]), out
    )


def test_grey_images_are_augmented_too() -> None:
    image = torch.rand(100, 1, 8, 8, generator=stream(0, "gray"))
    out = augment(image, draw_randaugment(100, 2, 30, stream(0, "policy")))
    assert out.shape == image.shape
    assert out.min() >= 0
    assert out.max() <= 1
    color = torch.tensor([[[OPERATIONS.index("color"), -FULL]]]).expand(100, 1, 2)
    torch.testing.assert_close(augment(image, color), image)


def test_randaugment_draws_all_but_invert_equally_at_one_magnitude_in_both_directions() -> None:
    draws = draw_randaugment(10_000, 2, 12, stream(0, "policy"))
    operation, level = draws.flatten(0, 1).unbind(1)
    counts = torch.bincount(operation, minlength=len(OPERATIONS))
    assert counts[OPERATIONS.index("invert")] == 0
    assert chisquare(counts[:14].numpy()).pvalue > 1e-3
    directed = (operation >= 1) & (operation <= 9)
    assert set(level[~directed].tolist()) == {36}
    assert set(level[directed].tolist()) == {-36, 36}
    assert chisquare(torch.bincount((level[directed] > 0).long()).numpy()).pvalue > 1e-3
    pairs = torch.bincount(draws[:, 0, 0] * 14 + draws[:, 1, 0], minlength=14 * 14)
    assert chisquare(pairs.numpy()).pvalue > 1e-3


def test_autoaugment_makes_the_operations_of_its_sub_policies_as_often_as_these_say() -> None:
    policy, n = cifar10_policy(), 50_000
    operation = draw_autoaugment(n, stream(0, "policy"))[:, :, 0]
    for layer in range(2):
        expected = np.zeros(len(OPERATIONS))
        for chosen, tenths, _ in policy[:, layer].tolist():
            expected[chosen] += tenths / 10 / 25
        expected[0] += 1 - expected.sum()
        counts = torch.bincount(operation[:, layer], minlength=len(OPERATIONS)).numpy()
        used = expected > 0
        assert not counts[~used].any()
        assert chisquare(counts[used], n * expected[used] / expected[used].sum()).pvalue > 1e-3


def test_the_published_sub_policies_are_all_there() -> None:
    """Spot checks against the paper's table, and its count."""
    policy = cifar10_policy()
    assert policy.shape == (25, 2, 3)
    named = [[(OPERATIONS[op], p / 10, level * 9 / FULL) for op, p, level in row] for row in policy.tolist()]
    assert named[0] == [("invert", 0.1, 0), ("contrast", 0.2, 6)]
    assert named[9] == [("contrast", 0.6, 7), ("sharpness", 0.6, 5)]
    assert named[21] == [("translate-y", 0.9, 9), ("translate-y", 0.7, 9)]
    assert named[24] == [("translate-y", 0.7, 9), ("autocontrast", 0.9, 0)]
