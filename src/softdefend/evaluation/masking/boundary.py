"""A walk along the decision boundary, begun on its far side: does it end nearer than attacks from the image?

What lies between an image and the boundary may lead every attack astray. On the boundary itself nothing can:
there the gradient of the margin is at right angles to the boundary, or it is not the margin's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softdefend.attacks import margin
from softdefend.attacks.fab import to_hyperplane
from softdefend.evaluation.masking.finding import Check
from softdefend.evaluation.masking.probe import Probe

BOUNDARY = Check(
    "border",
    0.12,
    "above",
    "Brendel et al. 2018, arXiv 1712.04248; Croce & Hein 2020, arXiv 1907.02044",
    "A walk along the decision boundary, begun at images of other classes, ends inside the ball where "
    "attacks from the image find nothing: its surroundings lead them astray.",
    share=True,
)

STARTS, STEPS, HALVINGS = 5, 5, 6


@torch.no_grad()
def walk_boundary(probe: Probe, others: Probe) -> Tensor:
    """Which images a walk along the decision boundary fools, [n] bool.

    It begins where the line to one of the nearest images of other classes crosses the boundary. Each step
    goes to the point of the linearized boundary that is next to the image, and back to the boundary itself.
    Cost: at most 265 forwards and 25 gradients of each image.

    Args:
        probe: the images; the network gets them right.
        others: images that the network gets right, of all classes.
    """
    distance = torch.cdist(probe.images.flatten(1), others.images.flatten(1))
    distance.masked_fill_(probe.labels[:, None] == others.labels, torch.inf)
    near = distance.topk(min(STARTS, len(others)), largest=False)
    found = torch.zeros(len(probe), dtype=torch.bool, device=probe.device)
    for away, which in zip(near.values.T, near.indices.T, strict=True):
        left = (~found & away.isfinite()).nonzero().flatten()
        if len(left):
            found[left] = _walk(probe.only(left), others.images[which[left]])
    return found


def _walk(probe: Probe, beyond: Tensor) -> Tensor:
    """One walk for each image, from a wrong point [n, c, h, w] on; which images [n] it fools."""
    image, norm = probe.images, probe.threat.norm
    point = _bisect(probe, image, beyond, 2 * HALVINGS)
    found = probe.fooled(probe.threat.project(image, point))
    for _ in range(STEPS):
        slope = probe.gradient(margin, point).nan_to_num(0, 0, 0).flatten(1)
        # The linearized margin at the image: at the point itself the margin is next to nothing.
        gap = (slope * (image - point).flatten(1)).sum(1)
        next_point = image + to_hyperplane(image.flatten(1), slope, gap, norm).view_as(image)
        next_point = next_point.clamp(0, 1)
        wrong = probe.fooled(next_point).view(-1, 1, 1, 1)
        right_end = torch.where(wrong, image, next_point)
        point = _bisect(probe, right_end, torch.where(wrong, next_point, point), HALVINGS)
        found |= probe.fooled(probe.threat.project(image, point))
    return found


def _bisect(probe: Probe, right: Tensor, wrong: Tensor, halvings: int) -> Tensor:
    """Points just beyond the boundary on lines from right to wrong points, [n, c, h, w]."""
    for _ in range(halvings):
        middle = (right + wrong) / 2
        beyond = probe.fooled(middle).view(-1, 1, 1, 1)
        right, wrong = torch.where(beyond, right, middle), torch.where(beyond, middle, wrong)
    return wrong
