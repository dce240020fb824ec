"""Is the network robust on the evaluated images only? Checks beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from softdefend.attacks import margin
from softdefend.evaluation.masking.finding import Check, Finding
from softdefend.evaluation.masking.probe import Probe

MOVED = Check(
    "moved images",
    6,
    "above",
    "own check",
    "Shifted by a pixel or mirrored, the images lose that many times as much of their lead (median) on the "
    "way to the ball's surface: the network is robust on the evaluated images only.",
)
FRESH = Check(
    "fresh images",
    5,
    "above",
    "own check",
    "Other images of the data lose that many times as much of their lead (median) on the way to the ball's "
    "surface: the network is robust on the evaluated images only.",
)

CHECKS = (MOVED, FRESH)

LEAST = 16
"""Images that a median is taken of."""
NOTHING = 1e-3
"""A smaller share of the lead counts as this much: rounding, or a ball of no size."""


def check_other_images(right: Probe, fresh: Probe | None) -> list[Finding]:
    """Both checks; at least one image. Cost: at most 18 forwards and 6 gradients of each image, and for fresh
    images 3 and 1.

    Args:
        right: the evaluated images, which the network gets right.
        fresh: other images of the same data.
    """
    lost = lead_lost(right)
    return [_moved(right, lost), _fresh(fresh, lost)]


def _moved(right: Probe, lost: Tensor) -> Finding:
    ratios = []
    for move in MOVES.values():
        moved = replace(right, images=move(right.images))
        kept = ~moved.fooled(moved.images)
        if int(kept.sum()) >= LEAST:
            ratios.append(_ratio(lead_lost(moved.only(kept)), lost[kept]))
    if not ratios:
        return MOVED.skipped(f"Moved, fewer than {LEAST} images are classified correctly.")
    return MOVED.of(float(torch.tensor(ratios).median()))


def _fresh(fresh: Probe | None, lost: Tensor) -> Finding:
    if fresh is None:
        return FRESH.skipped("No fresh images were given.")
    known = fresh.only(~fresh.fooled(fresh.images))
    if min(len(known), len(lost)) < LEAST:
        return FRESH.skipped(f"Fewer than {LEAST} images are classified correctly.")
    return FRESH.of(_ratio(lead_lost(known), lost))


def lead_lost(probe: Probe) -> Tensor:
    """The share of the true class's lead that one step of the gradient to the ball's surface takes, [n]."""
    lead = -probe.values(margin, probe.images)
    slope = probe.gradient(margin, probe.images).nan_to_num(0, 0, 0)
    step = probe.threat.ascend(probe.images, slope, float(probe.threat.eps))
    left = -probe.values(margin, probe.threat.project(probe.images, step))
    return (lead - left) / lead


def _ratio(other: Tensor, given: Tensor) -> float:
    return float(other.median().clamp_min(NOTHING) / given.median().clamp_min(NOTHING))


def _shift(down: int, right: int) -> Callable[[Tensor], Tensor]:
    """Shifts images by a pixel; the border is repeated."""

    def shift(images: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        return padded[..., 1 - down : 1 - down + h, 1 - right : 1 - right + w]

    return shift


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "down": _shift(1, 0),
    "up": _shift(-1, 0),
    "right": _shift(0, 1),
    "left": _shift(0, -1),
    "mirrored": lambda images: images.flip(-1),
}
