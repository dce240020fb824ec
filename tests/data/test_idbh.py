"""IDBH's parts against naive re-implementations: CropShift by cutting and padding, ColorShape by Pillow and
by the published frequencies, random erasing by loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, chisquare, ks_2samp

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data import Augmented, AugmentSettings, Resident, Split
from softdefend.data.policies import COLOR_SHAPE, FULL, OPERATIONS, augment, draw_color_shape
from softdefend.data.regions import draw_erasures, draw_shifts, erase

H, W = 4, 5


def outcomes(most: int, flip: bool) -> dict[bytes, Fraction]:
    """Every image that flip, cut, pad and cut again can make of one, with its probability."""
    image = np.arange(1, H * W + 1).reshape(H, W)
    found: dict[bytes, Fraction] = Counter()
    for mirrored, total in itertools.product((False, True) if flip else (False,), range(most + 1)):
        start = image[:, ::-1] if mirrored else image
        for columns in range(total + 1):
            rows = total - columns
            for y, x, up, left in itertools.product(
                *(range(limit + 1) for limit in (rows, columns, rows, columns))
            ):
                part = start[y : y + H - rows, x : x + W - columns]
                canvas = np.pad(part, ((rows, rows), (columns, columns)))
                result = canvas[up : up + H, left : left + W]
                places = ((rows + 1) * (columns + 1)) ** 2
                found[result.tobytes()] += Fraction(1, (1 + flip) * (most + 1) * (total + 1) * places)
    assert sum(found.values()) == 1
    return found


@pytest.mark.parametrize("kind", ["none", "flip"])
def test_shifted_images_are_as_frequent_as_cutting_and_padding_makes_them(kind: str) -> None:
    """An image of numbers tells what was done to it."""
    n, most = 40_000, 2
    numbers = torch.arange(1, H * W + 1, dtype=torch.uint8).view(1, 1, H, W).expand(n, 1, H, W)
    split = Split(numbers.contiguous(), torch.zeros(n, dtype=torch.int64))
    ours = Augmented(split, "cpu", AugmentSettings(kind, crop_shift=most))  # type: ignore[arg-type]
    made = (255 * ours.batch(ours.plan(seed=0, epoch=0)).image).round().long().squeeze(1).numpy()
    counts = Counter(image.tobytes() for image in made)
    expected = outcomes(most, kind == "flip")
    assert counts.keys() == expected.keys()
    shares = [float(n * expected[key]) for key in counts]
    assert chisquare(list(counts.values()), shares).pvalue > 1e-3


def test_a_shift_takes_the_place_of_a_crop_and_changes_no_other_draw() -> None:
    split = Split(torch.randint(0, 256, (30, 3, 8, 10), dtype=torch.uint8), torch.arange(30))
    shifted = Augmented(split, "cpu", AugmentSettings("flip", crop_shift=0.25, policy="color"))
    plain = Augmented(split, "cpu", AugmentSettings("flip", policy="color"))
    rows, others = (one.plan(seed=1, epoch=2, views=2) for one in (shifted, plain))
    assert rows.shape == (30, 1 + 2 * (3 + 4 + 2))
    for ours, theirs in ((0, 0), (3, 3), (6, 6), (slice(11, 13), slice(7, 9)), (slice(17, 19), slice(9, 11))):
        assert torch.equal(rows[:, ours], others[:, theirs])
    assert rows[:, 1:3].min() >= 0
    assert rows[:, 1:3].max() <= 4  # two pixels of eight


def test_a_shift_of_the_whole_image_is_refused() -> None:
    split = Split(torch.zeros(2, 1, 8, 10, dtype=torch.uint8), torch.arange(2))
    with pytest.raises(SettingError, match=r"augment\.crop_shift: got 8; accepted: 0 to 7 pixels"):
        Augmented(split, "cpu", AugmentSettings("flip", crop_shift=8))


@pytest.mark.parametrize("mixture", ["color", "shape"])
def test_operations_are_drawn_as_often_as_published_and_evenly_over_their_levels(mixture: str) -> None:
    """Frequencies, ranges and signs as the authors' table has them."""
    n = 60_000
    operation, level = draw_color_shape(n, mixture, stream(0, "policy"))[:, 0].unbind(1)
    kinds = ("color", "brightness", "contrast", "sharpness", "autocontrast", "equalize", "slant", "rotate")
    published = [0.125] * 8 if mixture == "color" else [0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.3, 0.3]
    many = dict(zip(kinds, published, strict=True))
    names = np.array([OPERATIONS[int(one)] for one in operation])
    counts = Counter(name.removesuffix("-x").removesuffix("-y") for name in names)
    assert chisquare([counts[name] for name in many], [n * share for share in many.values()]).pvalue > 1e-3
    across = int((names == "slant-x").sum())
    assert binomtest(across, counts["slant"]).pvalue > 1e-3
    steepest, furthest = (0.15, 10) if mixture == "color" else (0.35, 30)
    expected = {
        "color": (0.1, 1.9, 181),
        "brightness": (0.5, 1.9, 141),
        "contrast": (0.5, 1.9, 141),
        "sharpness": (0.1, 1.9, 181),
        "slant-x": (0.05, steepest, round((steepest - 0.05) / 0.005) + 1),
        "slant-y": (0.05, steepest, round((steepest - 0.05) / 0.005) + 1),
        "rotate": (1, furthest, furthest),
    }
    for name, (low, high, values) in expected.items():
        drawn = level[torch.from_numpy(names == name)].double().numpy()
        directed = name.startswith("slant") or name == "rotate"
        strength = np.abs(drawn) / FULL * (0.45 if name != "rotate" else 30) if directed else 1 + drawn / 100
        assert (strength.min(), strength.max()) == pytest.approx((low, high))
        _, frequency = np.unique(np.abs(drawn) if directed else drawn, return_counts=True)
        assert len(frequency) == values
        assert chisquare(frequency).pvalue > 1e-4
        if directed:
            assert binomtest(int((drawn > 0).sum()), len(drawn)).pvalue > 1e-3
    assert {row[0] for row in COLOR_SHAPE[mixture]} <= set(OPERATIONS)


@pytest.mark.parametrize("level", [-70, -20, 10, 30, 70])
def test_slants_are_pillows_about_the_middle(level: int) -> None:
    """As torchvision's ``affine`` of an image of Pillow: nearest neighbor, black outside."""
    h, w = 24, 32
    pixels = torch.randint(20, 200, (5, 3, h, w), dtype=torch.uint8, generator=stream(0, "pixels"))
    slope = math.tan(0.45 * level / FULL)
    for name, matrix in (
        ("slant-x", (1, slope, -slope * h / 2, 0, 1, 0)),
        ("slant-y", (1, 0, 0, slope, 1, -slope * w / 2)),
    ):
        draws = torch.tensor([[[OPERATIONS.index(name), level]]]).expand(5, 1, 2)
        ours = (255 * augment(pixels.float() / 255, draws)).round().numpy()
        images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).numpy()]
        turned = [np.asarray(im.transform(im.size, Image.Transform.AFFINE, matrix)) for im in images]
        theirs = np.stack(turned).transpose(0, 3, 1, 2)
        assert (ours == theirs).mean() > 0.995, name


def naive_erasures(n: int, h: int, w: int, largest: float, seed: int) -> np.ndarray:
    """Boxes (top, bottom, left, right), image by image; zero where none of ten fits."""
    draws, boxes = np.random.default_rng(seed), np.zeros((n, 4), int)
    for row in range(n):
        for _ in range(10):
            area = h * w * draws.uniform(0.02, largest)
            ratio = math.exp(draws.uniform(math.log(0.3), math.log(3.3)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < h and width < w:
                top, left = draws.integers(h - height + 1), draws.integers(w - width + 1)
                boxes[row] = top, top + height, left, left + width
                break
    return boxes


@pytest.mark.parametrize(("h", "w", "largest"), [(32, 32, 0.33), (12, 30, 0.5), (5, 40, 1.0)])
def test_erased_boxes_are_distributed_as_loops_draw_them(h: int, w: int, largest: float) -> None:
    n = 4000
    box = draw_erasures(n, h, w, 1.0, largest, stream(0, "erasing")).numpy()
    naive = naive_erasures(n, h, w, largest, 1)
    for mine, other in ((box, naive), (box[:, 1::2] - box[:, ::2], naive[:, 1::2] - naive[:, ::2])):
        for column in range(mine.shape[1]):
            assert ks_2samp(mine[:, column], other[:, column]).pvalue > 1e-3
    assert (box[:, 1] <= h).all()
    assert (box[:, 3] <= w).all()


def test_half_of_the_images_are_erased_and_nothing_but_their_boxes() -> None:
    n = 2000
    image = torch.rand(n, 3, 8, 9, generator=stream(0, "x")) + 0.1
    box = draw_erasures(n, 8, 9, 0.5, 0.33, stream(0, "erasing"))
    out = erase(image, box)
    for number, (top, bottom, left, right) in enumerate(box[:50].tolist()):
        expected = image[number].clone()
        expected[:, top:bottom, left:right] = 0
        assert torch.equal(out[number], expected)
    touched = int((box[:, 1] > 0).sum())
    assert binomtest(touched, n).pvalue > 1e-3
    assert not draw_erasures(n, 8, 9, 0.0, 0.33, stream(0, "erasing")).any()


def test_a_shift_of_nothing_is_no_shift() -> None:
    offsets, box = draw_shifts(20, 6, 7, 0, stream(0, "shift"))
    assert not offsets.any()
    assert (box == torch.tensor([0, 6, 0, 7])).all()


def test_the_first_view_can_be_left_plain() -> None:
    split = Split(
        torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=stream(0, "x")), torch.arange(40)
    )
    strong = {"policy": "autoaugment", "cutout": 3, "erasing": 1.0}
    ours, every = (
        Augmented(split, "cpu", AugmentSettings(pad=2, plain_first=plain, **strong))  # type: ignore[arg-type]
        for plain in (True, False)
    )
    rows, others = (one.plan(seed=0, epoch=0, views=3) for one in (ours, every))
    bare = Resident(split, "cpu", pad=2)
    assert torch.equal(ours.batch(rows).image, bare.batch(rows).image)
    assert not torch.equal(every.batch(others).image, bare.batch(others).image)
    for view in (1, 2):
        assert torch.equal(ours.batch(rows, view).image, every.batch(others, view).image)
