"""Do attacks behave as they should? More effort, more room, less knowledge against the white-box attack."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from softdefend.attacks import APGD, FGSM, PGD, Attack, AttackLoss, Square, cross_entropy
from softdefend.attacks.base import Randomness, larger
from softdefend.core.threat import LARGEST, Budget, ThreatModel
from softdefend.evaluation.masking.border import BORDER, walked
from softdefend.evaluation.masking.finding import Check, Finding
from softdefend.evaluation.masking.probe import Probe
from softdefend.evaluation.masking.surface import FOSC, convergence
from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel

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

CHECKS = (TEMPERATURE, SINGLE, STEPS, RESTARTS, FOSC, WIDER, HUGE, NOISE, BLACK, BORDER, TRANSFER)

STEP_COUNT, QUERIES, NOISES = 20, 300, 50


def attempts(probe: Probe, surrogate: nn.Module | None = None) -> list[Finding]:
    """All comparisons of attacks, in the order of ``CHECKS``; at least one image.

    The white-box attack is PGD-20 on the cross-entropy and, where it fails, APGD-20 on the
    difference-of-logits ratio. Cost for each image: 40 gradients, and up to 80 in the huge ball; for each
    image that PGD does not fool another 225 gradients and 615 forwards.
    """
    short = PGD(steps=STEP_COUNT)
    reached = probe.attacked(short)
    by_pgd = probe.fooled(reached)
    left = probe.only(~by_pgd)

    def also(fooled: Tensor) -> Tensor:
        """Flags of all images from flags of those that PGD did not fool."""
        flags = torch.zeros_like(by_pgd)
        flags[~by_pgd] = fooled
        return flags

    if len(left):
        scaled = partial(_at_temperature, float(probe.logits(probe.images).std(1).median()))
        rescaled = also(left.fooled(left.attacked(short, loss=scaled)))
        single = also(left.fooled(left.attacked(FGSM())))
        longer = also(left.fooled(_further(left, reached[~by_pgd], 4 * STEP_COUNT)))
        again = also(left.fooled(left.attacked(_Loudest(short), name="again")))
        stationary = convergence(left, reached[~by_pgd])
        by_dlr = also(left.fooled(left.attacked(APGD(steps=STEP_COUNT, loss="dlr"))))
    else:
        rescaled = single = longer = again = by_dlr = torch.zeros_like(by_pgd)
        stationary = FOSC.skipped("PGD fooled every image.")
    white = by_pgd | by_dlr
    wide = _within(probe, 2 * float(probe.threat.eps))
    return [
        TEMPERATURE.of_flags(rescaled),
        SINGLE.of_flags(single),
        _only_by(STEPS, longer, by_pgd),
        _only_by(RESTARTS, again, by_pgd),
        stationary,
        WIDER.of_flags(by_pgd & ~wide.fooled(wide.attacked(short))),
        _huge(probe),
        *_from_elsewhere(probe, white, surrogate),
    ]


def _only_by(check: Check, stronger: Tensor, weaker: Tensor) -> Finding:
    """The share of all images that either fools, [n] bool each, that only the stronger attack fools."""
    either = stronger | weaker
    return check.of_flags(stronger[either]) if bool(either.any()) else check.skipped("No image is fooled.")


def _further(probe: Probe, adversarial: Tensor, steps: int) -> Tensor:
    """More steps of PGD from where it ended, so that a lucky start is not taken for slow progress."""
    step_size = float(probe.threat.eps) / 4
    for _ in range(steps):
        grad = probe.gradient(cross_entropy, adversarial).nan_to_num(0, 0, 0)
        adversarial = probe.threat.project(probe.images, probe.threat.ascend(adversarial, grad, step_size))
    return adversarial


@dataclass(frozen=True)
class _Loudest(Attack):
    """Of four starts the one of largest loss, whether it fools the network or not: how much the landscape
    differs from start to start. Many images of honest networks of low accuracy fall to *any* of four."""

    attack: PGD
    starts: ClassVar[int] = 4
    randomness: ClassVar[Randomness] = "batch"

    @property
    def name(self) -> str:
        return f"{self.attack.name}x{self.starts}"

    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        best, value = image, torch.full_like(label, -torch.inf, dtype=torch.float32)
        for _ in range(self.starts):
            x_adv = self.attack(net, image, label, threat, loss=context.loss, generator=context.generator)
            with torch.no_grad():
                best, value = larger(x_adv, cross_entropy(net(x_adv), label), best, value)
        return best


def _at_temperature(size: float, label: Tensor) -> AttackLoss:
    """Cross-entropy of logits brought to a standard deviation of one over the classes."""
    return lambda logits: cross_entropy(logits / max(size, 1e-30), label)


def _within(probe: Probe, eps: float) -> Probe:
    """The probe in another ball, or the largest that a threat model takes."""
    return probe.within(ThreatModel(probe.threat.norm, Budget(min(eps, LARGEST[probe.threat.norm]))))


def _huge(probe: Probe) -> Finding:
    """Survivors in a ball of half the diameter of the image space (l2: at most 20), among images for which it
    is known that something in it fools the network: uniform gray is in the ball and gets another class."""
    side = 1.0 if probe.threat.norm == "linf" else probe.images[0].numel() ** 0.5
    huge = _within(probe, side / 2)
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
    """Noise, Square, a walk along the border and transfer, on the images that no gradient attack fooled."""
    left = probe.only(~white)
    noise, black, border, moved = (torch.zeros_like(white) for _ in range(4))
    if len(left):
        fooled = torch.zeros(len(left), dtype=torch.bool, device=left.device)
        for number in range(NOISES):
            corner = left.images + left.reach * left.signs("noise", number)
            fooled |= left.fooled(left.threat.project(left.images, corner))
        noise[~white] = fooled
        black[~white] = left.fooled(left.attacked(Square(queries=QUERIES)))
        border[~white] = walked(left, probe)
    findings = [NOISE.of_flags(noise), BLACK.of_flags(black), BORDER.of_flags(border)]
    if surrogate is None:
        return [*findings, TRANSFER.skipped("No surrogate network was given.")]
    if len(left):
        other = Probe(surrogate, left.images, left.labels, left.threat, left.batch_size, left.seed)
        moved[~white] = left.fooled(other.attacked(PGD(steps=STEP_COUNT), name="transfer"))
    return [*findings, TRANSFER.of_flags(moved)]
