"""Projections onto the part of an l1 or l0 ball that lies in the box [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def l1_correction(image: Tensor, delta: Tensor, eps: Tensor | float) -> Tensor:
    """What added to ``delta`` makes ``image + delta`` the nearest point of the ball and the box.

    Every change is shortened by the same length, or by what leaves the box where that is more, and at most
    to zero (Croce & Hein, arXiv 2103.01208, proposition 2.1). How much all changes lose together is
    piecewise linear in that length: sort where its slope changes, add up.

    Args:
        image: [b, ...] in [0, 1].
        delta: [b, ...], any change.
        eps: radius of the ball, > 0; one for each sample as [b].

    Returns:
        The correction, shaped like ``delta``; exactly its opposite where a change is to vanish.
    """
    x, y = image.flatten(1), delta.flatten(1)
    size = y.abs()
    outside = torch.minimum(1 - x - y, x + y).clamp_max(0).neg()
    ends, order = torch.cat([outside, size], dim=1).sort(dim=1)
    # Between two ends: the changes that have begun to lose more than what leaves the box, not yet all.
    falling = torch.where(order < x.shape[1], 1.0, -1.0).to(y).cumsum(dim=1)
    added = (ends.diff(dim=1) * falling[:, :-1]).cumsum(dim=1)
    lost = outside.sum(dim=1, keepdim=True) + F.pad(added, (1, 0))
    short = eps - size.sum(dim=1)
    below = lost + short[:, None] < 0
    last = below.sum(dim=1, keepdim=True).sub(1).clamp_min(0)
    level, slope, end = (each.gather(1, last) for each in (lost, falling, ends))
    length = torch.where(below[:, :1], (-level - short[:, None]) / slope + end, 0)
    correction = -y.sign() * torch.minimum(torch.maximum(length, outside), size)
    return correction.view_as(delta)


def project_l0(image: Tensor, adversarial: Tensor, count: int) -> Tensor:
    """The nearest point of the box in which at most ``count`` values differ from ``image``.

    Args:
        image: [b, ...] in [0, 1].
        adversarial: [b, ...].
        count: values that may differ, >= 1.
    """
    inside = adversarial.clamp(0, 1)
    if count >= image[0].numel():
        return inside
    # What a changed value saves of the squared distance to ``adversarial``.
    saved = ((adversarial - image).square() - (adversarial - inside).square()).flatten(1)
    kept = torch.zeros_like(saved).scatter(1, saved.topk(count, dim=1).indices, 1).view_as(image)
    return torch.where(kept > 0, inside, image)


def uniform_in_l1(uniform: Tensor) -> Tensor:
    """Points drawn uniformly from the l1 ball of radius one.

    The sizes of d + 1 exponential numbers, divided by their sum, are uniform on a simplex; all but one of
    them, with random signs, are the point.

    Args:
        uniform: [b, d + 1], drawn from [0, 1).

    Returns:
        [b, d].
    """
    signed = 2 * uniform - 1
    size = -torch.log((1 - signed.abs()).clamp_min(torch.finfo(uniform.dtype).tiny))
    return (signed.sign() * size / size.sum(dim=1, keepdim=True))[:, :-1]
