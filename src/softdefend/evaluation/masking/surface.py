"""Does the gradient say where the loss rises? Checks of the loss surface around the images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from softdefend.attacks import cross_entropy, dlr, margin
from softdefend.evaluation.masking.finding import Check, Finding
from softdefend.evaluation.masking.probe import Loss, Probe, random_signs, random_start
from softdefend.evaluation.masking.rounding import measure_rounding
from softdefend.evaluation.preflight import usual_lead

_ATHALYE = "Athalye et al. 2018, arXiv 1802.00420"

PATH = Check(
    "gradient path",
    0,
    "above",
    f"{_ATHALYE}, shattered gradients",
    "The output has no gradient with respect to the image (detached, or without autograd): white-box attacks "
    "walk at random.",
)
CE = Check(
    "cross-entropy gradient",
    0.01,
    "above",
    "Carlini & Wagner 2016, arXiv 1607.04311; Athalye et al. 2018, arXiv 1802.00420, vanishing gradients",
    "The gradient of the cross-entropy is zero, NaN or infinite for a share of the images.",
    share=True,
)
DLR = Check(
    "DLR gradient",
    0.01,
    "above",
    "Croce & Hein 2020, arXiv 2003.01690",
    "The gradient of the difference-of-logits ratio is zero, NaN or infinite for a share of the images.",
    share=True,
)
LARGE = Check(
    "large logits",
    50,
    "above",
    "Carlini & Wagner 2016, arXiv 1607.04311",
    "The lead of the true logit (median) saturates the softmax in float32, which rounds to one from a lead "
    "of 17 and leaves nothing of the other classes from 104.",
)
SMALL = Check(
    "small logits",
    1e-3,
    "below",
    "Croce & Hein 2020, arXiv 2003.01690",
    "The lead of the true logit (median) is so small that additive constants in losses count.",
)
FINITE = Check(
    "finite differences",
    0.8,
    "below",
    f"{_ATHALYE}, shattered gradients; Pintor et al. 2022, arXiv 2106.09947",
    "What autograd returns is not the slope of the function (median correlation over random directions): a "
    "step without gradient, a straight-through one, or a gradient made up.",
)
NEARBY = Check(
    "nearby gradients",
    0.3,
    "below",
    "Andriushchenko & Flammarion 2020, arXiv 2007.02617",
    "Gradients a small random step apart have little in common (median cosine): steps that follow them lead "
    "nowhere.",
)
JUMPS = Check(
    "jumps",
    0.25,
    "above",
    "Xiao et al. 2020, arXiv 1905.10510; Tramer et al. 2020, arXiv 2002.08347",
    "On a line from an image the output jumps (median share of its change that is left on a 32nd of the "
    "interval; 0.03 is continuous, 1 a jump): a rounding, a look-up or a switch.",
)
FLAT = Check(
    "flat surface",
    0.25,
    "below",
    "Carlini et al. 2019, arXiv 1902.06705; Tramer et al. 2020, arXiv 2002.08347",
    "The margin hardly moves close to the images (slope relative to that to the ball's surface, median): a "
    "plateau that hides the way down.",
)
PINNED = Check(
    "pinned images",
    0.8,
    "above",
    "own check",
    "The evaluated images are the very points where the network is surest, whichever way one leaves them "
    "(share of directions): it has seen them.",
)
FOSC = Check(
    "convergence",
    0.25,
    "above",
    "Wang et al. 2019, arXiv 2112.08304 (FOSC)",
    "Where the attack ends, the gradient still points elsewhere (mean over images not fooled; 0 is a "
    "stationary point, 0.5 a random one): it did not converge.",
)

CHECKS = (PATH, CE, DLR, LARGE, SMALL, FINITE, NEARBY, JUMPS, FLAT, PINNED)

DIRECTIONS, PARTS = 16, 4
SEGMENTS = 64
"""Lines that are searched for jumps, from images drawn at random."""
EPSILON = torch.finfo(torch.float32).eps
GRID, HALVINGS = 33, 12


def check_surface(probe: Probe) -> list[Finding]:
    """All checks but :func:`convergence`; at least one image.

    Cost: about 80 forwards and 8 gradients of each image, and 55 forwards more of 128 images on lines.
    """
    lead = _lead(probe)
    return [
        _path(probe),
        _lost(CE, cross_entropy, probe),
        _lost(DLR, dlr, probe),
        LARGE.of(lead),
        SMALL.of(lead),
        _finite(probe),
        _nearby(probe),
        _jumps(probe),
        _flat(probe),
        _pinned(probe),
    ]


def _path(probe: Probe) -> Finding:
    image = probe.images[:1].clone().requires_grad_(True)
    with torch.enable_grad():
        logits = probe.net(image)
    if not logits.requires_grad:
        return PATH.of(1)
    (grad,) = torch.autograd.grad(logits.sum(), image, allow_unused=True)
    return PATH.of(float(grad is None))


def _lost(check: Check, loss: Loss, probe: Probe) -> Finding:
    """At the images and at a random start, where attacks begin; not where that start fools the network: the
    DLR is constant where the true class is third."""
    lost = torch.zeros(len(probe), dtype=torch.bool, device=probe.device)
    for where in (probe.images, random_start(probe, "gradients")):
        grad = probe.gradient(loss, where).flatten(1)
        lost |= ((grad == 0).all(1) | ~grad.isfinite().all(1)) & ~probe.fooled(where)
    return check.of_flags(lost)


def _lead(probe: Probe) -> float:
    """How far the true logit is above the best other one: the median."""
    return float(probe.values(margin, probe.images).neg().median())


def _inside(probe: Probe, room: float) -> Tensor:
    """Random points of the balls with ``room`` on either side in every pixel."""
    return random_start(probe, "inside").clamp(room, 1 - room)


def _finite(probe: Probe) -> Finding:
    """Correlation over random directions of the measured slope with autograd's, per image.

    The step is as long as changes the margin by a thousandth of what classes lie apart: rounding is a
    thousand times smaller, and a ReLU network is still linear on it. Where the logits themselves are much
    larger than that, or computed less precisely, their rounding is what counts.
    """
    logits = probe.logits(probe.images)
    coarse = _least_change(logits) < _clear_change(probe, probe.images, logits)
    agreement = torch.cat([_agreement(probe.only(~coarse)), _rough_agreement(probe.only(coarse))])
    return FINITE.of(float(agreement.median()))


def _agreement(probe: Probe) -> Tensor:
    """Along random corners of the box, [n]."""
    if not len(probe):
        return probe.images.new_empty(0, dtype=torch.float64)
    room = min(probe.reach / 4, 0.25)
    here = _inside(probe, room)
    grad = probe.gradient(margin, here)
    step = _least_change(probe.logits(here)) / grad.flatten(1).norm(dim=1)
    directions = [random_signs(probe, "finite", number) for number in range(DIRECTIONS)]
    return _slopes_agree(
        probe, here, grad, step.nan_to_num(room, room, room).clamp(room / 1000, room), directions
    )


def _rough_agreement(probe: Probe) -> Tensor:
    """The same where rounding hides small changes, [n]: along the gradient's signs, turned round in random
    parts of the image, which moves the margin most, and as far as the ball reaches."""
    if not len(probe):
        return probe.images.new_empty(0, dtype=torch.float64)
    room = min(probe.reach, 0.25)
    here = _inside(probe, room)
    grad, (n, c, h, w) = probe.gradient(margin, here), probe.images.shape
    parts = [
        torch.randn(
            n, c, PARTS, PARTS, generator=probe.generator("finite-parts", number), device=probe.device
        )
        for number in range(DIRECTIONS)
    ]
    directions = [grad.sign() * F.interpolate(part, (h, w)).sign() for part in parts]
    claimed = torch.stack([(grad * direction).flatten(1).sum(1) for direction in directions])
    step = _clear_change(probe, here, probe.logits(here)) / claimed.square().mean(0).sqrt()
    return _slopes_agree(
        probe, here, grad, step.nan_to_num(room, room, room).clamp(room / 1000, room), directions
    )


def _slopes_agree(probe: Probe, here: Tensor, grad: Tensor, step: Tensor, directions: list[Tensor]) -> Tensor:
    """Correlation over directions [n, c, h, w], [n], of slopes measured over ``step`` [n] with ``grad``'s."""
    measured, claimed = [], []
    for direction in directions:
        away = step.view(-1, 1, 1, 1) * direction
        ahead, behind = (probe.values(margin, here + side * away) for side in (1, -1))
        measured.append((ahead - behind) / (2 * step))
        claimed.append((grad * direction).flatten(1).sum(1))
    return _correlation(torch.stack(measured, 1), torch.stack(claimed, 1))


def _least_change(logits: Tensor) -> Tensor:
    """A change of the margin that is small and no rounding, [n], if the network computes in float32."""
    return torch.maximum(
        1e-3 * usual_lead(logits).float(), 100 * EPSILON * logits.topk(2).values.abs().amax(1)
    )


def _clear_change(probe: Probe, images: Tensor, logits: Tensor) -> Tensor:
    """A change of the margin that the network's own rounding, as it is measured, leaves clear, [n]."""
    return 16 * measure_rounding(probe, images) * logits.abs().amax(1)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of rows [n, m], [n]; zero where either row is zero or not finite."""
    one, other = one.double(), other.double()
    scale: Tensor = torch.linalg.vector_norm(one, dim=1) * torch.linalg.vector_norm(other, dim=1)
    cosine: Tensor = (one * other).sum(1) / scale
    return cosine.nan_to_num(0, 0, 0)


def _nearby(probe: Probe) -> Finding:
    """A twentieth of eps apart on average, by another length in each pixel: no wave can keep step with it."""
    here = _inside(probe, min(probe.reach / 4, 0.25))
    length = torch.rand(here.shape, generator=probe.generator("nearby-length"), device=probe.device)
    there = here + probe.reach / 10 * length * random_signs(probe, "nearby")
    grads = [probe.gradient(margin, where).flatten(1) for where in (here, there)]
    return NEARBY.of(float(_correlation(*grads).median()))


def _jumps(probe: Probe) -> Finding:
    """Towards a corner of a ball of four times eps, and towards an image of another class."""
    drawn = torch.randperm(len(probe), generator=probe.generator("jumps-images"), device=probe.device)
    few = probe.only(drawn[:SEGMENTS].sort().values)
    corner = (few.images + 4 * few.reach * random_signs(few, "jumps")).clamp(0, 1)
    found = [jump(few, few.images, corner)]
    other = _of_another_class(few.labels)
    if other is not None:
        found.append(jump(few, few.images, few.images[other]))
    shares = [float(one.median()) for one in found]
    detail = ", ".join(f"{share:.2g}" for share in shares)
    return JUMPS.of(max(shares), f"Within the ball, then between images: {detail}.")


def _of_another_class(labels: Tensor) -> Tensor | None:
    """For each image the position of one of another class, the next along; None where there is one class."""
    different = labels[:, None] != labels[None, :]
    if not bool(different.any(1).all()):
        return None
    n = len(labels)
    along = (
        torch.arange(n, device=labels.device)[None, :] - torch.arange(n, device=labels.device)[:, None]
    ) % n
    return along.masked_fill(~different, n).argmin(1)


@torch.no_grad()
def jump(probe: Probe, start: Tensor, end: Tensor) -> Tensor:
    """What is left of a change of the logits on a line when its place is known 32 times more closely, [n].

    The line is sampled on a grid, then the steepest interval is halved again and again. Once the interval is
    small the change goes on shrinking with it where the network is continuous, to 1/32, and stays where it
    jumps. A change at the level of rounding counts as none.
    """
    n = len(start)

    def at(t: Tensor) -> Tensor:
        image = start + t.view(-1, 1, 1, 1).to(start) * (end - start)
        return probe.logits(image)

    marks = torch.linspace(0, 1, GRID, dtype=torch.float64, device=start.device)
    values = torch.stack([at(mark.expand(n)) for mark in marks])  # [grid, n, k]
    usual = usual_lead(values.flatten(0, 1)).view(len(marks), n).amax(0).float()
    size = values.abs().amax(0)  # [n, k]
    rounding = torch.maximum(1e-5 * usual[:, None], 4 * EPSILON * size)
    rounding = rounding.maximum(12 * measure_rounding(probe, start)[:, None] * size.amax(1, keepdim=True))

    def change(one: Tensor, other: Tensor) -> Tensor:
        """Largest over the classes, [..., n]; rounding is none."""
        apart = (one - other).abs()
        return torch.where(apart > rounding, apart, 0).amax(-1)

    steepest = change(values[1:], values[:-1]).argmax(0)  # [n]
    rows = torch.arange(n, device=start.device)
    low, high = marks[steepest], marks[steepest + 1]
    below, above = values[steepest, rows], values[steepest + 1, rows]
    changes = []
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        value = at(middle)
        first = (change(value, below) >= change(above, value))[:, None]
        low, high = torch.where(first[:, 0], low, middle), torch.where(first[:, 0], middle, high)
        below, above = torch.where(first, below, value), torch.where(first, value, above)
        changes.append(change(above, below))
    return torch.where(changes[-1] > 0, changes[-1] / changes[-6], 0).clamp_max(1)


def _flat(probe: Probe) -> Finding:
    """Largest slope over a few directions and the gradient's, close by against the ball's surface."""
    here = probe.values(margin, probe.images)
    near, far = probe.reach / 20, probe.reach
    up = probe.gradient(margin, probe.images).nan_to_num(0, 0, 0).sign()
    directions = [up, *(random_signs(probe, "flat", number) for number in range(4))]
    slopes = []
    for reach in (near, far):
        moved = [probe.values(margin, (probe.images + reach * d).clamp(0, 1)) - here for d in directions]
        slopes.append(torch.stack(moved).abs().amax(0) / reach)
    ratio = (slopes[0] / slopes[1]).nan_to_num(0, posinf=math.inf)
    return FLAT.of(float(ratio.clamp_max(1e6).median()))


def _pinned(probe: Probe) -> Finding:
    """Directions along which the margin worsens on both sides of the image."""
    here = probe.values(margin, probe.images)
    both = []
    for number in range(8):
        step = probe.reach / 10 * random_signs(probe, "pinned", number)
        ahead, behind = (probe.values(margin, probe.images + side * step) for side in (1, -1))
        both.append((ahead > here) & (behind > here))
    return PINNED.of(float(torch.stack(both).float().mean()))


def convergence(probe: Probe, adversarial: Tensor) -> Finding:
    """First-order stationarity of attack results that did not fool the network, box and ball together.

    FOSC is the most that the linearised loss could still rise inside the threat model; it is divided by what
    there is between its lowest and highest point, which makes it a number in [0, 1] on every network.
    """
    grad = probe.gradient(cross_entropy, adversarial).nan_to_num(0, 0, 0)
    top, bottom = (
        probe.threat.project(
            probe.images, probe.threat.ascend(probe.images, grad, side * float(probe.threat.eps))
        )
        for side in (1, -1)
    )
    left = ((top - adversarial) * grad).flatten(1).sum(1)
    span = ((top - bottom) * grad).flatten(1).sum(1)
    usable = span > 0
    if not bool(usable.any()):
        return FOSC.skipped("The gradient is zero wherever the attack ended.")
    return FOSC.of(float((left[usable] / span[usable]).clamp(0, 1).mean()))
