from __future__ import annotations

import pytest
import torch

from softdefend.core.errors import SettingError
from softdefend.core.rng import stream
from softdefend.data import Augmented, AugmentSettings, Resident, Split, epoch_plan
from softdefend.data.policies import augment
from softdefend.data.regions import cutmix, cutout

N, H, W = 30, 8, 10
SPLIT = Split(
    torch.randint(0, 256, (N, 3, H, W), dtype=torch.uint8, generator=stream(0, "x")), torch.arange(N) % 7
)
EVERYTHING = {"policy": "randaugment", "cutout": 3, "cutmix": 0.7}


def data(channels_last: bool = False, **settings: object) -> Augmented:
    chosen = AugmentSettings(**{"pad": 2, **settings})  # type: ignore[arg-type]
    return Augmented(SPLIT, "cpu", chosen, channels_last=channels_last)


def test_by_default_nothing_but_crops_and_flips() -> None:
    ours, plain = data(), Resident(SPLIT, "cpu", pad=2)
    rows = ours.plan(seed=1, epoch=2, views=2)
    assert torch.equal(rows, epoch_plan(N, seed=1, epoch=2, augment="crop-flip", pad=2, views=2))
    for view in range(2):
        assert torch.equal(ours.batch(rows, view).image, plain.batch(rows, view).image)
    assert ours.share(rows) is None
    assert not ours.mixes


def test_the_order_is_crop_flip_policy_cutout_cutmix() -> None:
    ours, plain = data(**EVERYTHING), Resident(SPLIT, "cpu", pad=2)
    rows = ours.plan(seed=1, epoch=2)
    assert rows.shape == (N, 4 + 4 + 2 + 4)
    image = plain.batch(rows).image
    image = augment(image, rows[:, 4:8].view(N, 2, 2))
    image = cutmix(cutout(image, rows[:, 8:10], 3), rows[:, 10:])
    batch = ours.batch(rows)
    assert torch.equal(batch.image, image)
    assert torch.equal(batch.label, rows[:, 0] % 7)
    share = ours.share(rows)
    assert share is not None
    areas = (rows[:, 11] - rows[:, 10]) * (rows[:, 13] - rows[:, 12])
    torch.testing.assert_close(share, 1 - areas / (H * W))
    assert 0 < int((share < 1).sum()) < N


@pytest.mark.parametrize(
    "alone", [{"policy": "autoaugment"}, {"policy": "randaugment"}, {"cutout": 3}, {"cutmix": 0.7}]
)
def test_switching_one_on_changes_no_draw_of_another(alone: dict[str, object]) -> None:
    rows = data(**alone).plan(seed=1, epoch=2)
    assert torch.equal(rows[:, :4], data().plan(seed=1, epoch=2))
    everything = data(**{**EVERYTHING, **alone}).plan(seed=1, epoch=2)
    columns = {"policy": slice(4, 8), "cutout": slice(8, 10), "cutmix": slice(10, 14)}[next(iter(alone))]
    assert torch.equal(rows[:, 4:], everything[:, columns])


def test_the_same_place_gives_the_same_plan_and_another_place_another() -> None:
    ours = data(**EVERYTHING)
    rows = ours.plan(seed=3, epoch=5)
    assert torch.equal(rows, data(**EVERYTHING).plan(seed=3, epoch=5))
    for other in (ours.plan(seed=3, epoch=6), ours.plan(seed=4, epoch=5)):
        for columns in (slice(4, 8), slice(8, 10), slice(10, 14)):
            assert not torch.equal(rows[:, columns], other[:, columns])


def test_views_are_drawn_independently_and_the_first_is_the_same_for_any_number() -> None:
    ours = data(policy="randaugment", cutout=3)
    one, two = ours.plan(seed=1, epoch=0), ours.plan(seed=1, epoch=0, views=2)
    assert two.shape == (N, 1 + 2 * (3 + 4 + 2))
    assert torch.equal(ours.batch(one).image, ours.batch(two, 0).image)
    plain = data().plan(seed=1, epoch=0, views=2)
    second = torch.cat([plain[:, :1], plain[:, 4:7], two[:, 13:19]], dim=1)
    assert torch.equal(ours.batch(two, 1).image, ours.batch(second).image)
    assert not torch.equal(two[:, 7:11], two[:, 13:17])
    assert not torch.equal(two[:, 11:13], two[:, 17:19])


def test_without_mixing_an_image_does_not_depend_on_its_batch() -> None:
    ours = data(policy="autoaugment", cutout=4)
    rows = ours.plan(seed=1, epoch=0)
    apart = torch.cat([ours.batch(part).image for part in rows.split(7)])
    assert torch.equal(apart, ours.batch(rows).image)


def test_memory_order_changes_no_number() -> None:
    first, second = data(**EVERYTHING), data(channels_last=True, **EVERYTHING)
    rows = first.plan(seed=1, epoch=0)
    image = second.batch(rows).image
    torch.testing.assert_close(image, first.batch(rows).image, atol=1e-6, rtol=0)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1


def test_before_the_start_only_crops_and_flips() -> None:
    """The plan keeps its shape, and the draws of all that is on from the start."""
    both, plain = {"policy": "autoaugment", "cutout": 3, "cutmix": 0.7}, data(cutmix=0.7)
    ours = data(**both)
    for view in range(2):
        rows, bare = (one.plan(seed=1, epoch=2, views=2, strong=False) for one in (ours, plain))
        assert torch.equal(ours.batch(rows, view).image, plain.batch(bare, view).image)
        later = ours.plan(seed=1, epoch=2, views=2)
        assert later.shape == rows.shape
        assert torch.equal(later[:, :7], rows[:, :7])
        assert not torch.equal(ours.batch(later, view).image, plain.batch(bare, view).image)


@pytest.mark.parametrize(("epochs", "first"), [(200, 100), (201, 100), (3, 1), (1, 0)])
def test_half_the_run_is_over_as_early_as_in_the_reference(epochs: int, first: int) -> None:
    """alinlab/consistency-adversarial changes to its second loader where its one-based epoch > epochs / 2."""
    settings = AugmentSettings(start=0.5)
    begun = [settings.is_strong(epoch, epochs) for epoch in range(epochs)]
    assert begun == [epoch + 1 > epochs / 2 for epoch in range(epochs)]
    assert begun.index(True) == first
    assert all(AugmentSettings().is_strong(epoch, epochs) for epoch in range(epochs))


def test_a_cutout_below_one_is_a_share_of_the_shorter_side() -> None:
    share, pixels = data(cutout=0.5), data(cutout=4)
    rows = share.plan(seed=1, epoch=0)
    assert torch.equal(rows, pixels.plan(seed=1, epoch=0))
    assert torch.equal(share.batch(rows).image, pixels.batch(rows).image)
    assert torch.equal(data(cutout=0.1).plan(seed=1, epoch=0), data().plan(seed=1, epoch=0))  # no pixel


def test_a_cutout_larger_than_the_image_is_refused() -> None:
    with pytest.raises(SettingError) as caught:
        data(cutout=11)
    assert str(caught.value) == "augment.cutout: got 11; accepted: 0 to 10 pixels for images of 8x10"
