from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare, ks_2samp

from softdefend.core.rng import stream
from softdefend.data.regions import cutmix, cutout, draw_boxes, draw_centers, own_share

H, W = 7, 10


@pytest.mark.parametrize("side", [1, 2, 5, 6, 7])
def test_every_pixel_is_cut_out_by_the_squares_that_cover_it_and_by_no_other(side: int) -> None:
    """One image for every possible center; a square of an even side reaches one further up and left."""
    center = torch.tensor([(y, x) for y in range(H) for x in range(W)])
    image = torch.rand(H * W, 3, H, W, generator=stream(0, "x")) + 0.1
    out = cutout(image, center, side).numpy()
    for number, (y, x) in enumerate(center.tolist()):
        expected = image[number].numpy().copy()
        top, left = y - side // 2, x - side // 2
        expected[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
        np.testing.assert_array_equal(out[number], expected)
    if side < H:
        whole = (out[:, 0] == 0).sum((1, 2)) == side**2
        assert whole.sum() == (H - side + 1) * (W - side + 1)


def test_centres_are_uniform() -> None:
    center = draw_centers(20_000, H, W, stream(0, "cutout"))
    counts = torch.bincount(center[:, 0] * W + center[:, 1], minlength=H * W)
    assert chisquare(counts.numpy()).pvalue > 1e-3
    assert not torch.equal(center, draw_centers(20_000, H, W, stream(0, "cutout", 1)))


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_the_share_is_that_of_the_pixels_that_stayed(alpha: float) -> None:
    n = 500
    image = torch.arange(1.0, n + 1)[:, None, None, None].expand(n, 2, H, W)
    box = draw_boxes(n, H, W, 0.8, alpha, stream(0, "cutmix"))
    out = cutmix(image, box)
    own = (out == image).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(own_share(box, H, W), own)
    other = torch.cat([image[-1:], image[:-1]])
    assert ((out == image) | (out == other)).all()
    assert ((own > 0) & (own < 1)).any()


def test_one_image_alone_is_mixed_with_itself() -> None:
    image = torch.rand(1, 3, H, W)
    assert torch.equal(cutmix(image, torch.tensor([[0, 5, 2, 9]])), image)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_shares_are_distributed_as_the_papers_recipe_in_numpy(alpha: float) -> None:
    """A box of sides sqrt(1 - lambda) about a uniform pixel, cut at the border."""
    h, w, n = 32, 32, 4000
    box = draw_boxes(n, h, w, 1.0, alpha, stream(1, "cutmix"))
    draws = np.random.default_rng(0)
    ratio = np.sqrt(1 - draws.beta(alpha, alpha, n))
    sides, shares = (ratio * h).astype(int), []
    for side, y, x in zip(sides, draws.integers(0, h, n), draws.integers(0, w, n), strict=True):
        kept = np.ones((h, w))
        kept[max(y - side // 2, 0) : y - side // 2 + side, max(x - side // 2, 0) : x - side // 2 + side] = 0
        shares.append(kept.mean())
    assert ks_2samp(own_share(box, h, w).numpy(), shares).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_boxes_lie_inside_and_images_are_mixed_with_the_given_probability(probability: float) -> None:
    n = 5000
    top, bottom, left, right = draw_boxes(n, H, W, probability, 1.0, stream(2, "cutmix")).unbind(1)
    assert (top >= 0).all()
    assert (top <= bottom).all()
    assert (bottom <= H).all()
    assert (left >= 0).all()
    assert (left <= right).all()
    assert (right <= W).all()
    empty = binomtest(int(((bottom == top) | (right == left)).sum()), n).proportion_ci(0.999)
    # A box of less than a pixel's height is empty too: lambda > 1 - 1/H^2.
    assert empty.low <= 1 - probability * (1 - 1 / H**2) <= empty.high


def test_more_images_begin_with_other_draws_but_the_same_key_gives_the_same() -> None:
    first, again = (draw_boxes(50, H, W, 0.5, 1.0, stream(3, "cutmix", 4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw_boxes(50, H, W, 0.5, 1.0, stream(3, "cutmix", 5)))
