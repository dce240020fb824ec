"""One call for the whole audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from softdefend.core.errors import SettingError
from softdefend.core.threat import ThreatModel
from softdefend.evaluation.masking import attack_comparisons, behavior, other_images, surface
from softdefend.evaluation.masking.finding import Audit, Check, Finding
from softdefend.evaluation.masking.probe import Probe
from softdefend.execution.network_mode import frozen, tf32

CHECKS = (*behavior.CHECKS, *surface.CHECKS, *other_images.CHECKS, *attack_comparisons.CHECKS)
"""Everything that an audit looks at."""


def audit(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    batch_size: int = 250,
    seed: int = 0,
    surrogate: nn.Module | None = None,
    fresh: tuple[Tensor, Tensor] | None = None,
    progress: bool = False,
) -> Audit:
    """Look for signs that gradient attacks overstate this network's robustness (gradient masking).

    The network is taken in eval mode with frozen parameters and put back afterwards, as is torch's random
    state. Results repeat with the same seed and ``batch_size``. Thresholds, and the figures of honest and
    deceiving networks: docs/audit.md.

    Args:
        net: images [b, c, h, w] in [0, 1] to logits [b, k], k >= 2, on the device of ``images``. It may lack
            a gradient, be random or change: that is what is looked for.
        images: [n, c, h, w] float32 in [0, 1]; 250 of them tell most, more make the shares sharper.
        labels: [n] int64. Only images that are classified correctly take part.
        threat: the perturbations whose evaluation is in doubt.
        batch_size: images at once.
        seed: of every random draw.
        surrogate: another network for the same classes, plainly trained at best, for the transfer check.
        fresh: other images and labels of the same data, like ``images`` and ``labels``; no test images.
        progress: show a bar.

    Returns:
        One finding for each check, and the verdict over all of them.

    Raises:
        SettingError: no image, as many labels as images not given, a batch size below one, an l0 threat.
    """
    if batch_size < 1:
        raise SettingError("audit.batch_size", batch_size, "a whole number >= 1")
    if threat.norm == "l0":
        raise SettingError("threat.norm", threat.norm, "linf, l2 or l1 for an audit")
    if images.ndim != 4 or len(images) == 0 or labels.shape != images.shape[:1]:
        given = f"images {list(images.shape)} and labels {list(labels.shape)}"
        raise SettingError("audit.images", given, "images [n, c, h, w] and labels [n], n >= 1")
    with ExitStack() as stack:
        stack.enter_context(tf32(False))
        for module in (net, surrogate):
            if module is not None:
                stack.enter_context(frozen(module, "eval"))
        probe = Probe(net, images, labels, threat, batch_size, seed)
        stack.enter_context(behavior.seeded(probe))
        right = ~probe.fooled(images)
        others = None if fresh is None else replace(probe, images=fresh[0], labels=fresh[1])
        findings = _findings(probe, probe.only(right), surrogate, others, progress)
    return Audit.of(findings, len(images), int(right.sum()))


def _findings(
    probe: Probe, right: Probe, surrogate: nn.Module | None, fresh: Probe | None, progress: bool
) -> list[Finding]:
    """Behavior on all images, the rest on those classified correctly."""
    first = behavior.first_look(probe)
    why = _nothing_to_attack(probe, right)

    def unless(checks: Sequence[Check], make: Callable[[], list[Finding]]) -> list[Finding]:
        return [check.skipped(why) for check in checks] if why else make()

    beside = partial(other_images.check_other_images, right, fresh)
    compare = partial(attack_comparisons.compare_attacks, right, surrogate)
    stages: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("behavior", lambda: behavior.check_behavior(probe)),
        ("surface", lambda: unless(surface.CHECKS, lambda: surface.check_surface(right))),
        ("other images", lambda: unless(other_images.CHECKS, beside)),
        ("attacks", lambda: unless(attack_comparisons.CHECKS, compare)),
        ("repeat", lambda: [behavior.check_changing(probe, first)]),
    ]
    findings = []
    with tqdm(stages, desc="audit", leave=False, disable=None if progress else True) as bar:
        for name, stage in bar:
            bar.set_postfix_str(name)
            findings += stage()
    return findings


@torch.no_grad()
def _nothing_to_attack(probe: Probe, right: Probe) -> str:
    """Why attacks would say nothing about this network; empty where they do."""
    if len(right) == 0:
        return "No image is classified correctly."
    noise = torch.rand(probe.images[:2].shape, generator=probe.generator("constant"), device=probe.device)
    logits = probe.logits(torch.cat([right.images[:2], noise]))
    if bool((logits == logits[0]).all()):
        return "The output does not depend on the image."
    return ""
