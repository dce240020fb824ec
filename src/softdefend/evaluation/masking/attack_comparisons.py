"""Do attacks behave as they should? White-box PGD against more effort, larger balls, less knowledge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from softdefend.attacks import APGD, FGSM, PGD, AttackLoss, Square, cross_entropy, margin
from softdefend.attacks.base import larger
from softdefend.core.threat import LARGEST, Budget, ThreatModel, diameter
from softdefend.evaluation.masking.boundary import BOUNDARY, walk_boundary
from softdefend.evaluation.masking.finding import Check, Finding
from softdefend.evaluation.masking.probe import Probe, random_signs
from softdefend.evaluation.masking.surface import FOSC, convergence

_ATHALYE = "Athalye et al. 2018, arXiv 1802.00420"
_CARLINI = "Carlini et al. 2019, arXiv 1902.06705"

TEMPERATURE = Check(
    "another temperature",
    0.15,
    "above",
    "Carlini & Wagner 2016, arXiv 1607.04311",
    "PGD on the cross-entropy fools more images once the logits are scaled: their size hides the gradient.",
    share=True,
)
SATURATED = Check(
    "saturated softmax",
    0.02,
    "above",
    "Carlini & Wagner 2016, arXiv 1607.04311",
    "The true class leads by so much that a float32 softmax rounds to one, and PGD on the cross-entropy "
    "fools such images once the logits are scaled: its robust accuracy is too high.",
    share=True,
)
SINGLE = Check(
    "single step",
    0.15,
    "above",
    _ATHALYE,
    "One step fools images that twenty do not: the iterative attack gets stuck.",
    share=True,
)
STEPS = Check(
    "more steps",
    0.25,
    "above",
    _CARLINI,
    "Of the images that fall, many need eighty more steps: the attack had not converged.",
    share=True,
)
RESTARTS = Check(
    "more restarts",
    0.25,
    "above",
    _CARLINI,
    "Of the images that fall, many need a second random start: each only gets so far.",
    share=True,
)
WIDER = Check(
    "wider ball",
    0.03,
    "above",
    _ATHALYE,
    "Images are fooled at eps but not at twice eps, where the adversary may do all the same.",
    share=True,
)
HUGE = Check(
    "huge ball",
    0.02,
    "above",
    _ATHALYE,
    "Images survive in a ball so wide that uniform gray, which gets another class, lies in it: no network is "
    "robust there, the attack fails.",
    share=True,
)
NOISE = Check(
    "random noise",
    0.025,
    "above",
    _ATHALYE,
    "Random noise fools images that the gradient attacks do not.",
    share=True,
)
BLACK = Check(
    "black box",
    0.025,
    "above",
    f"{_ATHALYE}; Croce & Hein 2020, arXiv 2003.01690",
    "Square, which sees no gradient, fools images that the gradient attacks do not.",
    share=True,
)
TRANSFER = Check(
    "transfer",
    0.025,
    "above",
    f"{_ATHALYE}; Carlini et al. 2019, arXiv 1902.06705",
    "Images made for another network fool this one where the gradient attacks on itself do not.",
    share=True,
)

CHECKS = (
    TEMPERATURE,
    SATURATED,
    SINGLE,
    STEPS,
    RESTARTS,
    FOSC,
    WIDER,
    HUGE,
    NOISE,
    BLACK,
    BOUNDARY,
    TRANSFER,
)

STEP_COUNT, QUERIES, NOISES = 20, 300, 50
ROUNDS_TO_ONE = 17
"""Lead of a logit from which on a float32 softmax is one and the cross-entropy has lost that logit."""


def compare_attacks(probe: Probe, surrogate: nn.Module | None = None) -> list[Finding]:
    """All comparisons of attacks, in the order of ``CHECKS``; at least one image.

    The white-box attack is PGD-20 on the cross-entropy and, where it fails, APGD-20 on the
    difference-of-logits ratio. Cost for each image: 40 gradients, 20 more where the softmax rounds to one and
    PGD fools the network, and up to 80 in the huge ball; for each
    image that PGD does not fool another 225 gradients and 615 forwards.
    """
    short = PGD(steps=STEP_COUNT)
    reached = probe.attacked(short)
    by_pgd = probe.fooled(reached)
    left = probe.only(~by_pgd)
    scaled = partial(_at_temperature, float(probe.logits(probe.images).std(1).median()))

    def also(fooled: Tensor) -> Tensor:
        """Flags of all images from flags of those that PGD did not fool."""
        flags = torch.zeros_like(by_pgd)
        flags[~by_pgd] = fooled
        return flags

    if len(left):
        rescaled = also(left.fooled(left.attacked(short, loss=scaled)))
        single = also(left.fooled(left.attacked(FGSM())))
        longer = also(left.fooled(_further(left, reached[~by_pgd], 4 * STEP_COUNT)))
        again = also(left.fooled(left.attacked(_LargestLoss(short), name="again")))
        stationary = convergence(left, reached[~by_pgd])
        by_dlr = also(left.fooled(left.attacked(APGD(steps=STEP_COUNT, loss="dlr"))))
    else:
        rescaled = single = longer = again = by_dlr = torch.zeros_like(by_pgd)
        stationary = FOSC.skipped("PGD fooled every image.")
    white = by_pgd | by_dlr
    wide = _within(probe, 2 * float(probe.threat.eps))
    return [
        TEMPERATURE.of_flags(rescaled),
        _saturated(probe, by_pgd, rescaled, scaled),
        SINGLE.of_flags(single),
        _only_by(STEPS, longer, by_pgd),
        _only_by(RESTARTS, again, by_pgd),
        stationary,
        WIDER.of_flags(by_pgd & ~wide.fooled(wide.attacked(short))),
        _huge(probe),
        *_from_elsewhere(probe, white, surrogate),
    ]


def _saturated(
    probe: Probe, by_pgd: Tensor, rescaled: Tensor, scaled: Callable[[Tensor], AttackLoss]
) -> Finding:
    """Where the softmax rounds to one: images that only scaled logits fool, less those that only others do.

    Two attacks of one strength each fool a few images that the other does not; the difference is none.
    """
    rounds = probe.values(margin, probe.images) <= -ROUNDS_TO_ONE
    lost = by_pgd & rounds
    if bool(lost.any()):
        again = probe.only(lost)
        lost[lost.clone()] = ~again.fooled(again.attacked(PGD(steps=STEP_COUNT), loss=scaled, name="lost"))
    gained = int((rescaled & rounds).sum()) - int(lost.sum())
    return SATURATED.of_flags(torch.arange(len(probe)) < gained)


def _only_by(check: Check, stronger: Tensor, weaker: Tensor) -> Finding:
    """The share of all images that either fools, [n] bool each, that only the stronger attack fools."""
    either = stronger | weaker
    return check.of_flags(stronger[either]) if bool(either.any()) else check.skipped("No image is fooled.")


def _further(probe: Probe, adversarial: Tensor, steps: int) -> Tensor:
    """More steps of PGD from where it ended. A new start could be a lucky one, which is no slow progress."""
    step_size = float(probe.threat.eps) / 4
    for _ in range(steps):
        grad = probe.gradient(cross_entropy, adversarial).nan_to_num(0, 0, 0)
        adversarial = probe.threat.project(probe.images, probe.threat.ascend(adversarial, grad, step_size))
    return adversarial


@dataclass(frozen=True)
class _LargestLoss:
    """Of four starts the one with the largest loss, whether it fools the network or not.

    It shows how much the loss differs from start to start. Whether *any* of four starts fools the network
    would show less: many images of honest networks of low accuracy fall to one of them.
    """

    attack: PGD
    starts: ClassVar[int] = 4

    @property
    def name(self) -> str:
        """Of its random stream."""
        return f"{self.attack.name}x{self.starts}"

    def __call__(
        self,
        forward: Callable[[Tensor], Tensor],
        image: Tensor,
        label: Tensor,
        threat: ThreatModel,
        *,
        loss: AttackLoss | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images [b, c, h, w]."""
        best, value = image, torch.full_like(label, -torch.inf, dtype=torch.float32)
        for _ in range(self.starts):
            found = self.attack(forward, image, label, threat, loss=loss, generator=generator)
            with torch.no_grad():
                best, value = larger(found, cross_entropy(forward(found), label), best, value)
        return best


def _at_temperature(size: float, label: Tensor) -> AttackLoss:
    """Cross-entropy of logits brought to a standard deviation of one over the classes."""
    return lambda logits: cross_entropy(logits / max(size, 1e-30), label)


def _within(probe: Probe, eps: float) -> Probe:
    """The probe in another ball, or the largest that a threat model takes."""
    norm = probe.threat.norm
    return replace(probe, threat=ThreatModel(norm, Budget(min(eps, LARGEST[norm]))))


def _huge(probe: Probe) -> Finding:
    """Survivors in a ball of half the diameter of the image space (l2: at most 20, l1: at most 1000).

    Only among images for which it is known that something in the ball fools the network: uniform gray is in
    it and gets another class.
    """
    huge = _within(probe, diameter(probe.threat.norm, probe.images[0].numel()) / 2)
    gray = torch.full_like(probe.images, 0.5)
    inside = huge.threat.distance(probe.images, gray) <= float(huge.threat.eps)
    doomed = huge.only(inside & huge.fooled(gray))
    if not len(doomed):
        return HUGE.skipped("No image is known to be fooled there: gray is out of reach, or gets its class.")
    alive = torch.ones(len(doomed), dtype=torch.bool, device=probe.device)
    for attack in (APGD(steps=2 * STEP_COUNT), APGD(steps=2 * STEP_COUNT, loss="dlr")):
        rest = doomed.only(alive)
        if len(rest):
            alive[alive.clone()] = ~rest.fooled(rest.attacked(attack))
    return HUGE.of_flags(alive)


def _from_elsewhere(probe: Probe, white: Tensor, surrogate: nn.Module | None) -> list[Finding]:
    """Noise, Square, a walk along the boundary and transfer, on the images that no gradient attack fooled."""
    left = probe.only(~white)
    noise, black, walked, moved = (torch.zeros_like(white) for _ in range(4))
    if len(left):
        fooled = torch.zeros(len(left), dtype=torch.bool, device=left.device)
        for number in range(NOISES):
            corner = left.images + left.reach * random_signs(left, "noise", number)
            fooled |= left.fooled(left.threat.project(left.images, corner))
        noise[~white] = fooled
        black[~white] = left.fooled(left.attacked(Square(queries=QUERIES)))
        walked[~white] = walk_boundary(left, probe)
    findings = [NOISE.of_flags(noise), BLACK.of_flags(black), BOUNDARY.of_flags(walked)]
    if surrogate is None:
        return [*findings, TRANSFER.skipped("No surrogate network was given.")]
    if len(left):
        other = Probe(surrogate, left.images, left.labels, left.threat, left.batch_size, left.seed)
        moved[~white] = left.fooled(other.attacked(PGD(steps=STEP_COUNT), name="transfer"))
    return [*findings, TRANSFER.of_flags(moved)]
