from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from softdefend.core.errors import SettingError
from softdefend.data import AugmentSettings, epoch_plan


def plan(
    n: int = 1000, *, seed: int = 0, epoch: int = 0, augment: str = "crop-flip", pad: int = 4
) -> torch.Tensor:
    return epoch_plan(n, seed=seed, epoch=epoch, augment=augment, pad=pad)


def test_every_image_once_and_every_window_inside_the_padded_image() -> None:
    rows = plan()
    assert rows.shape == (1000, 4)
    assert rows.dtype == torch.int64
    assert sorted(rows[:, 0].tolist()) == list(range(1000))
    assert rows[:, 1:3].min() == 0
    assert rows[:, 1:3].max() == 8
    assert set(rows[:, 3].tolist()) == {0, 1}


def test_the_same_place_gives_the_same_plan_and_another_place_another() -> None:
    assert torch.equal(plan(seed=3, epoch=5), plan(seed=3, epoch=5))
    for other in (plan(seed=3, epoch=6), plan(seed=4, epoch=5)):
        for column in range(4):
            assert not torch.equal(plan(seed=3, epoch=5)[:, column], other[:, column])


def test_offsets_and_flips_are_uniform_and_unrelated_to_each_other() -> None:
    rows = plan(20_000)
    assert chisquare(torch.bincount(rows[:, 1], minlength=9).numpy()).pvalue > 1e-3
    assert chisquare(torch.bincount(rows[:, 2], minlength=9).numpy()).pvalue > 1e-3
    assert chisquare(torch.bincount(rows[:, 3], minlength=2).numpy()).pvalue > 1e-3
    joint = torch.bincount(rows[:, 1] * 18 + rows[:, 2] * 2 + rows[:, 3], minlength=162)
    assert chisquare(joint.numpy()).pvalue > 1e-3


def test_augmentations_share_their_draws_and_leave_out_the_rest() -> None:
    full, flip, crop, none = (plan(augment=kind) for kind in ("crop-flip", "flip", "crop", "none"))
    for rows in (flip, crop, none):
        assert torch.equal(rows[:, 0], full[:, 0])
    assert torch.equal(flip[:, 3], full[:, 3])
    assert (flip[:, 1:3] == 4).all()
    assert torch.equal(crop[:, 1:3], full[:, 1:3])
    assert (crop[:, 3] == 0).all()
    assert (none[:, 1:] == torch.tensor([4, 4, 0])).all()


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(
        SettingError,
        match=r"augment\.kind: got rotate; accepted: none or flip or crop or crop-flip or "
        "resized-crop or resized-crop-flip",
    ):
        plan(augment="rotate")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"kind": "rotate"},
            "augment.kind: got rotate; accepted: none or flip or crop or crop-flip or "
            "resized-crop or resized-crop-flip",
        ),
        ({"pad": -1}, "augment.pad: got -1; accepted: 0 or more pixels"),
        ({"pad_mode": "wrap"}, "augment.pad_mode: got wrap; accepted: zero or reflect"),
        (
            {"policy": "trivial"},
            "augment.policy: got trivial; accepted: none or randaugment or autoaugment or color or shape",
        ),
        ({"randaugment_n": 0}, "augment.randaugment_n: got 0; accepted: a whole number from 1 to 100"),
        ({"randaugment_n": 101}, "augment.randaugment_n: got 101; accepted: a whole number from 1 to 100"),
        ({"randaugment_m": 31}, "augment.randaugment_m: got 31; accepted: a whole number from 0 to 30"),
        ({"cutout": -1}, "augment.cutout: got -1; accepted: 0 or more pixels, or a share below 1"),
        ({"cutout": 2.5}, "augment.cutout: got 2.5; accepted: 0 or more pixels, or a share below 1"),
        ({"crop_shift": 1.5}, "augment.crop_shift: got 1.5; accepted: 0 or more pixels, or a share below 1"),
        (
            {"crop_shift": 4},
            "augment.crop_shift: got 4 with augment.kind crop-flip; "
            "accepted: it with augment.kind flip or none",
        ),
        ({"erasing": 1.5}, "augment.erasing: got 1.5; accepted: a number in [0, 1]"),
        ({"erasing_area": 0.01}, "augment.erasing_area: got 0.01; accepted: a number in [0.02, 1]"),
        ({"start": 1.0}, "augment.start: got 1.0; accepted: a number in [0, 1)"),
        ({"cutmix": 1.5}, "augment.cutmix: got 1.5; accepted: a number in [0, 1]"),
        ({"cutmix_alpha": 0.0}, "augment.cutmix_alpha: got 0.0; accepted: a positive number"),
    ],
)
def test_impossible_augmentations_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError) as caught:
        AugmentSettings(**wrong)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_augmentation_begins_at_the_epoch_that_was_meant():
    assert 0.29 * 100 < 29  # a rounding error below a whole number of epochs
    settings = AugmentSettings(start=0.29)
    assert [settings.is_strong(epoch, 100) for epoch in (28, 29)] == [False, True]
