"""Corruptions against closed forms, Pillow, SciPy, colorsys and naive loops."""

from __future__ import annotations

import colorsys
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoint_tools import QUICK, make_checkpoint
from PIL import Image
from scipy import ndimage, stats
from torch import nn

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data import split, subset
from softdefend.evaluation.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
    corruption_measurement,
    corruption_table,
    evaluate_corruptions,
)
from softdefend.evaluation.distortions import (
    defocus_kernel,
    elastic_transform,
    fog,
    glass_blur,
    motion_blur,
    plasma,
    snow,
)
from softdefend.evaluation.measurement import measured

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")
RANDOM = (*NOISES, "glass_blur", "motion_blur", "snow", "fog", "elastic_transform")
# Saturation falls at severities 1 and 2 and rises after; the warp trades one move for another; behind glass a
# wider blur brings pixels nearer again to where they were.
UNORDERED = ("saturate", "elastic_transform", "glass_blur")


def pictures(n: int = 6, c: int = 3, h: int = 12, w: int = 9) -> torch.Tensor:
    return torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, generator=stream(0, "pictures"))


def smooth(n: int = 4, c: int = 3, h: int = 32, w: int = 32) -> torch.Tensor:
    """Waves: neighboring pixels are alike, as in photographs."""
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


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in UNORDERED])
def test_a_higher_severity_moves_images_further(name):
    images = smooth()
    distance = [(corrupt(images, name, s).float() - images.float()).square().mean() for s in SEVERITIES]
    assert 0 < distance[0] < distance[2] < distance[4]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_damaged_the_same_wherever_it_stands(name):
    images = pictures(6)
    whole = corrupt(images, name, 3, seed=5)
    parts = [corrupt(images[[i]], name, 3, seed=5, positions=[i]) for i in (3, 0, 5, 1, 4, 2)]
    parts = torch.cat(parts)[[1, 3, 5, 0, 4, 2]]
    assert torch.equal(whole, parts)
    assert torch.equal(whole, corrupt(images, name, 3, seed=5))
    assert torch.equal(whole, corrupt(images, name, 3, seed=6)) == (name not in RANDOM)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_variance_of_its_law(severity):
    value, shape = 0.4, (8, 3, 64, 64)
    gray = torch.full(shape, value, dtype=torch.float64)
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
        noisy = corrupt(gray, name, severity)
        error = 6 * math.sqrt(variance / gray.numel())  # six standard errors of the mean
        assert noisy.mean().item() == pytest.approx(mean, abs=error)
        assert noisy.var().item() == pytest.approx(variance, rel=0.05)


def test_impulses_are_black_or_white_and_as_many_as_the_level():
    gray = torch.full((8, 3, 64, 64), 0.4)
    hit = corrupt(gray, "impulse_noise", 5)
    changed = hit[hit != gray[0, 0, 0, 0]]
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


@pytest.mark.parametrize(("shape", "mode"), [((3, 13, 10), "RGB"), ((1, 13, 10), "L")], ids=["rgb", "gray"])
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


def test_channels_that_are_no_colors_are_treated_one_by_one():
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


def generators(n: int) -> list[torch.Generator]:
    return [stream(7, "images", step=i) for i in range(n)]


def test_a_pixel_seen_through_glass_is_itself_or_a_neighbor_above_or_left():
    places = torch.arange(40 * 50, dtype=torch.float32).view(1, 1, 40, 50).expand(20, 1, 40, 50) / 2000
    for passes in (1, 2):
        # 0.05 pixels are no blur
        moved = (2000 * glass_blur(places, (0.05, passes), generators(20))).round().long()[:, 0]
        dy, dx = moved // 50 - torch.arange(40)[:, None], moved % 50 - torch.arange(50)
        assert not dy[:, :2].any()
        assert not dy[:, :, :2].any()
        assert not dx[:, :2].any()
        assert not dx[:, :, :2].any()
        inner = torch.stack([dy, dx])[:, :, 4:, 4:]
        assert inner.min() == -passes
        assert inner.max() == 0
        if passes == 1:  # four choices, equally likely; 33,120 draws
            share = torch.bincount(-2 * inner[0].flatten() - inner[1].flatten()) / inner[0].numel()
            assert share.tolist() == pytest.approx([0.25] * 4, abs=0.015)


def test_a_glass_pass_copies_from_the_state_before_it():
    """The published loop goes from the lower right to the upper left, so that its sources are still whole."""
    image = pictures(1, 2, 9, 7).float() / 255
    moves = torch.randint(-1, 1, (2, 2, 9, 7), generator=generators(1)[0])
    wanted = image[0].clone()
    for dy, dx in moves:
        for y in range(8, 1, -1):
            for x in range(6, 1, -1):
                wanted[:, y, x] = wanted[:, y + dy[y, x], x + dx[y, x]].clone()
    assert torch.equal(glass_blur(image, (0.05, 2), generators(1))[0], wanted)


def streaked(image: torch.Tensor, radius: int, sigma: float, degrees: float) -> torch.Tensor:
    """[h, w] by the loops of ImageMagick's motion blur."""
    h, w = image.shape
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    blurred = torch.zeros_like(image)
    for y, x in np.ndindex(h, w):
        for i, weight in enumerate(weights):
            row, column = y + math.ceil(i * sin - 0.5), x + math.ceil(i * cos - 0.5)
            source = image[min(max(row, 0), h - 1), min(max(column, 0), w - 1)]
            blurred[y, x] += source * weight / sum(weights)
    return blurred


def test_motion_blur_is_a_one_sided_gaussian_along_a_line():
    image = pictures(9, 1, 9, 12).float() / 255
    blurred = motion_blur(image, (6, 2.0), generators(9))
    angles = [90 * torch.rand(1, generator=g).item() - 45 for g in generators(9)]
    assert min(angles) < -5
    assert max(angles) > 5
    for i, degrees in enumerate(angles):
        torch.testing.assert_close(blurred[i, 0], streaked(image[i, 0], 6, 2.0, degrees))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_is_the_mean_of_linear_enlargements(severity):
    """By the published factors; the first is 1, so the image takes part twice."""
    image = pictures(1, 1, 20, 32).double() / 255
    total = image[0, 0].numpy().copy()
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    for zoom in factors:
        enlarged = image[0, 0].numpy()
        for axis, side in enumerate((20, 32)):
            inner = math.ceil(side / zoom)
            kept = np.take(enlarged, range((side - inner) // 2, (side - inner) // 2 + inner), axis)
            outer = round(inner * zoom)
            at = np.arange(outer) * (inner - 1) / (outer - 1)
            wide = np.apply_along_axis(lambda line, at=at: np.interp(at, range(len(line)), line), axis, kept)
            first = (outer - side) // 2
            enlarged = np.take(wide, range(first, first + side), axis)
        total += enlarged
    got = corrupt(image, "zoom_blur", severity)[0, 0]
    np.testing.assert_allclose(got, total / (len(factors) + 1), atol=1e-5)


def test_snow_whitens_and_adds_flakes_of_the_right_weight():
    """On black: the mean of what a normal law has above the threshold, twice, once turned round."""
    black = torch.zeros(60, 1, 64, 64)
    law = stats.norm(0.1, 0.2)
    above = law.expect(lambda x: min(x, 1.0), lb=0.6)
    fallen = snow(black, CORRUPTIONS["snow"][1][0], generators(60)) - 0.05 * 0.5
    assert fallen.min() >= -1e-6
    assert fallen.mean().item() == pytest.approx(2 * above, rel=0.05)
    torch.testing.assert_close(fallen, fallen.flip((2, 3)))
    picture = pictures(4, 3, 20, 30).float() / 255
    gray = (picture * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    for mean, spread, *rest, stays in CORRUPTIONS["snow"][1]:
        whitened = stays * picture + (1 - stays) * torch.maximum(picture, 1.5 * gray + 0.5)
        assert (snow(picture, (mean, spread, *rest, stays), generators(4)) >= whitened - 1e-6).all()
        # a law that never comes near the threshold has no flakes
        torch.testing.assert_close(snow(picture, (-9.0, 0.1, *rest, stays), generators(4)), whitened)


def test_snow_falls_in_streaks():
    level = (0.0, 1.0, 1.0, 2.5, 12, 6, 1.0)  # few flakes, nothing whitened
    fallen = snow(torch.zeros(60, 1, 64, 64), level, generators(60))
    beside, below = ((fallen - fallen.roll(1, axis)).square().mean() for axis in (3, 2))
    assert below < 0.65 * beside


def naive_plasma(noise: np.ndarray, decay: float) -> np.ndarray:
    """Diamond-square on a torus, pixel by pixel."""
    side = len(noise)
    height = np.zeros((side, side))
    step, amplitude = side, 100.0**2
    while step > 1:
        half = step // 2
        corners = [(-half, -half), (-half, half), (half, -half), (half, half)]
        sides = [(-half, 0), (half, 0), (0, -half), (0, half)]
        for ways, odd in ((corners, {(1, 1)}), (sides, {(0, 1), (1, 0)})):
            for y, x in np.ndindex(side, side):
                if y % half == x % half == 0 and (y // half % 2, x // half % 2) in odd:
                    around = [height[(y + dy) % side, (x + dx) % side] for dy, dx in ways]
                    height[y, x] = sum(around) / 4 + amplitude * noise[y, x]
        step, amplitude = half, amplitude / decay**2
    height -= height.min()
    return height / height.max()


@pytest.mark.parametrize("side", [2, 8, 32])
def test_plasma_is_diamond_square(side):
    noise = 2 * torch.rand(3, side, side, generator=stream(1, "plasma"), dtype=torch.float64) - 1
    for decay in (3.0, 1.75):
        for one, got in zip(noise, plasma(noise, decay), strict=True):
            np.testing.assert_allclose(got, naive_plasma(one.numpy(), decay), atol=1e-9)


def test_fog_brightens_by_plasma_and_keeps_the_largest_value():
    image = torch.full((6, 3, 32, 32), 0.5)
    foggy = fog(image, (1.5, 1.75), generators(6))
    # plasma reaches 0 and 1 on each 32x32 image: (x + 1.5 m) times 0.5 / (0.5 + 1.5)
    torch.testing.assert_close(foggy.amin((1, 2, 3)), torch.full((6,), 0.125))
    torch.testing.assert_close(foggy.amax((1, 2, 3)), torch.full((6,), 0.5))
    assert torch.equal(foggy[:, :1].expand_as(foggy), foggy)  # the same fog in all channels


def test_saturation_is_the_standard_librarys_hsv():
    images = pictures(2, 3, 4, 5)
    images[0, :, 0, 0] = 0
    images[0, :, 0, 1] = 255
    images[0, :, 0, 2] = 90  # gray has no hue: red, by convention
    for severity, (factor, summand) in enumerate(CORRUPTIONS["saturate"][1], start=1):
        got = corrupt(images.float() / 255, "saturate", severity)
        for n, y, x in np.ndindex(2, 4, 5):
            h, s, v = colorsys.rgb_to_hsv(*(images[n, :, y, x].double() / 255).tolist())
            wanted = colorsys.hsv_to_rgb(h, min(s * factor + summand, 1), v)
            np.testing.assert_allclose(got[n, :, y, x], wanted, atol=1e-6)
    assert torch.equal(corrupt(images[:, :1], "saturate", 5), images[:, :1])


@pytest.mark.parametrize(("h", "w"), [(32, 32), (15, 22)])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_moves_are_scipys(severity, h, w):
    image = pictures(3, 2, h, w).float() / 255
    strength, smoothing, reach = (
        min(h, w) * share for share in CORRUPTIONS["elastic_transform"][1][severity - 1]
    )
    got = elastic_transform(image, CORRUPTIONS["elastic_transform"][1][severity - 1], generators(3))
    y, x = np.mgrid[:h, :w].astype(float)
    for i, generator in enumerate(generators(3)):
        draws = 2 * torch.rand(6 + 2 * h * w, generator=generator).numpy() - 1
        half = min(h, w) // 3
        square = np.array([[half, half], [half, -half], [-half, -half]]) + np.array([w // 2, h // 2])
        moved = square + reach * draws[:6].reshape(3, 2)
        # where each pixel comes from: its place in the moved square's own coordinates
        axes, own = (np.stack([p[0] - p[1], p[1] - p[2]]) for p in (moved, square))
        offset = np.stack([x, y], -1) - moved[1]
        source = offset @ np.linalg.inv(axes) @ own + square[1]
        dx, dy = draws[6:].reshape(2, h, w)
        dx, dy = (
            strength * ndimage.gaussian_filter(d, smoothing, mode="reflect", truncate=3) for d in (dx, dy)
        )
        for channel in range(2):
            turned = ndimage.map_coordinates(
                image[i, channel].numpy(), [source[..., 1], source[..., 0]], order=1, mode="mirror"
            )
            wanted = ndimage.map_coordinates(turned, [y + dy, x + dx], order=1, mode="reflect")
            np.testing.assert_allclose(got[i, channel], wanted, atol=2e-4)


def test_unchanged_levels_stay_whole():
    """Flat images are fixed points of blurs, warps and contrast; a level may not be lost on the way."""
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 8, 8).contiguous()
    blurs = [name for name in CORRUPTIONS if name.endswith("_blur")]
    for name in (*blurs, "elastic_transform", "contrast", "pixelate"):
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
    table = evaluate_corruptions(net, split(images, labels), batch_size=7, seed=3, index=torch.arange(33))
    assert table["n"] == 33
    rates = []
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            damaged = corrupt(images[:33], name, severity, 3).float() / 255
            count = int((net(damaged).argmax(1) == labels[:33]).sum())
            assert table["corruptions"][name]["severities"][severity - 1]["count"] == count
            rates.append(count / 33)
    assert table["mean"] == pytest.approx(sum(rates) / len(rates))
    assert table["clean"]["count"] == int((net(images[:33].float() / 255).argmax(1) == labels[:33]).sum())


def test_an_answer_that_is_no_number_is_wrong_whatever_index_it_has():
    class Blinded(Brightest):
        def forward(self, image):
            logits = super().forward(image)
            return torch.where(image.mean((1, 2, 3))[:, None] > 0.5, math.nan, logits)

    images, labels = pictures(40, 1, 8, 8), torch.zeros(40, dtype=torch.long)
    table = evaluate_corruptions(Blinded(), split(images, labels), names=["brightness"])
    for severity, row in zip(SEVERITIES, table["corruptions"]["brightness"]["severities"], strict=True):
        logits = Blinded()(corrupt(images, "brightness", severity).float() / 255)
        assert logits.isnan().any()
        assert row["count"] == int((logits[:, 0] > logits[:, 1]).sum())  # false where one is NaN


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


def test_a_checkpoints_corruptions_are_those_of_its_network(bundle, tmp_path):
    checkpoint = make_checkpoint(tmp_path, bundle)
    settings = replace(QUICK, size=10, seed=2)
    result = measured(checkpoint, corruption_measurement(checkpoint, settings))
    wanted = evaluate_corruptions(checkpoint.net, bundle.test, index=subset(bundle.test.labels, 10), seed=2)
    assert {name: result[name] for name in wanted} == wanted
    same = replace(settings, attacks=(), batch_size=3, microbatch=2)
    known = corruption_measurement(checkpoint, settings).settings
    assert corruption_measurement(checkpoint, same).settings == known
    assert corruption_measurement(checkpoint, replace(settings, seed=3)).settings != known


def test_the_table_has_a_row_for_each_corruption_and_the_mean():
    rates = [{"rate": share} for share in (0.5, 0.4, 0.3, 0.2, 0.1)]
    table = corruption_table({"corruptions": {"fog": {"severities": rates, "mean": 0.3}}, "mean": 0.3})
    head, fog, mean = (line.split() for line in table.splitlines())
    assert head == ["corruption", "1", "2", "3", "4", "5", "mean"]
    assert fog == ["fog", "50.0", "40.0", "30.0", "20.0", "10.0", "30.0"]
    assert mean == ["mean", "30.0"]
