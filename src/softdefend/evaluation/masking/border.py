"""A walk along the decision border, begun on its far side: does it end nearer than attacks from the image?

What lies between an image and the border may lead every attack astray. On the border itself nothing can:
there the gradient of the margin is at right angles to the border, or it is not the margin's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softdefend.attacks import margin
from softdefend.attacks.fab import to_hyperplane
from softdefend.evaluation.masking.finding import Check
from softdefend.evaluation.masking.probe import Probe

BORDER = Check(
    "border",
    0.12,
    "above",
    "Brendel et al. 2018, arXiv 1712.04248; Croce & Hein 2020, arXiv 1907.02044",
    "A walk along the border, begun at images of other classes, ends inside the ball where attacks from the "
    "image find nothing: its surroundings lead them astray.",
    share=True,
)

STARTS, STEPS, HALVINGS = 5, 5, 6


@torch.no_grad()
def walked(probe: Probe, others: Probe) -> Tensor:
    """Which images a walk along the border fools, [n] bool.

    It begins where the line to one of the nearest images of other classes crosses the border. Each step goes
    to the point next to the image on the border as it is linearised there, and back to the border itself.
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
    point = _border(probe, image, beyond, 2 * HALVINGS)
    found = probe.fooled(probe.threat.project(image, point))
    for _ in range(STEPS):
        slope = probe.gradient(margin, point).nan_to_num(0, 0, 0).flatten(1)
        # What the margin is at the image as the border sees it: it is next to nothing at the point.
        gap = (slope * (image - point).flatten(1)).sum(1)
        aim = (image + to_hyperplane(image.flatten(1), slope, gap, norm).view_as(image)).clamp(0, 1)
        wrong = probe.fooled(aim).view(-1, 1, 1, 1)
        point = _border(probe, torch.where(wrong, image, aim), torch.where(wrong, aim, point), HALVINGS)
        found |= probe.fooled(probe.threat.project(image, point))
    return found


def _border(probe: Probe, right: Tensor, wrong: Tensor, halvings: int) -> Tensor:
    """The wrong end of the interval that is left of lines from right to wrong points, [n, c, h, w]."""
    for _ in range(halvings):
        middle = (right + wrong) / 2
        beyond = probe.fooled(middle).view(-1, 1, 1, 1)
        right, wrong = torch.where(beyond, right, middle), torch.where(beyond, middle, wrong)
    return wrong
