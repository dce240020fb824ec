"""Is the network one fixed function of one image? Checks that need no attack."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from softdefend.attacks import PGD
from softdefend.evaluation.masking.finding import Check, Finding
from softdefend.evaluation.masking.other_images import MOVES
from softdefend.evaluation.masking.probe import Probe
from softdefend.evaluation.preflight import SAME, difference

RANDOM = Check(
    "random forward",
    SAME,
    "above",
    "Athalye et al. 2018, arXiv 1802.00420, stochastic gradients",
    "The output depends on torch's random numbers: attacks have to average over them (EOT) and to be counted "
    "over several draws.",
)
CHANGING = Check(
    "changing forward",
    SAME,
    "above",
    "Croce et al. 2022, arXiv 2202.13711",
    "The output changes from call to call with the same random numbers: the network keeps a state, adapts "
    "or draws numbers elsewhere.",
)
BATCH = Check(
    "batch dependence",
    1e-2,
    "above",
    "Croce et al. 2022, arXiv 2202.13711",
    "An image's output depends on the other images of its batch.",
)
WATCHED = Check(
    "watched forward",
    SAME,
    "above",
    "Carlini et al. 2019, arXiv 1902.06705",
    "The output is another where a gradient is asked for: the network tells an attack from an evaluation.",
)
INNER = Check(
    "gradient in the forward",
    0,
    "above",
    "Croce & Hein 2020, arXiv 2003.01690, checks in the authors' code",
    "The forward pass runs a backward pass of its own, such as a purification or an adaptation to the image.",
)

MEMORY = Check(
    "query memory",
    SAME,
    "above",
    "Carlini et al. 2019, arXiv 1902.06705; Chen et al. 2019, arXiv 1907.05587 (stateful defenses)",
    "The answers to the same images depend on which of them is asked first: the network remembers queries.",
)

CHECKS = (RANDOM, BATCH, WATCHED, INNER, MEMORY, CHANGING)

LOOK = 64
"""Images that these checks look at."""


def check_behavior(probe: Probe) -> list[Finding]:
    """All checks but :func:`check_changing`, on the first 64 images. Cost: about 35 forwards and 10 gradients
    of each, most of them of copies of the network.
    """
    few = probe.only(torch.arange(min(LOOK, len(probe)), device=probe.device))
    with seeded(few), torch.no_grad():
        first = few.forward(few.images)
    if not _apart(first, first_look(few)) <= SAME:
        why = "The output changes by itself from call to call."
        return [*(check.skipped(why) for check in (RANDOM, BATCH, WATCHED)), _inner(few), MEMORY.skipped(why)]
    random = _random(few, first)
    if random.verdict == "suspicious":
        batch = BATCH.skipped("The output is random, and a split batch draws other numbers.")
    else:
        batch = _batch(few, first)
    return [random, batch, _watched(few, first), _inner(few), _memory(few)]


@contextlib.contextmanager
def seeded(probe: Probe, draw: int = 0) -> Iterator[None]:
    """torch's own random numbers from a stream of ours, put back afterwards."""
    with torch.random.fork_rng([probe.device] if probe.device.type == "cuda" else []):
        torch.manual_seed(probe.generator("forward", draw).initial_seed())
        yield


def first_look(probe: Probe) -> Tensor:
    """Logits of the first 64 images in one batch, which :func:`check_changing` compares with later ones."""
    with seeded(probe), torch.no_grad():
        return probe.forward(probe.images[:LOOK])


def check_changing(probe: Probe, first: Tensor) -> Finding:
    """The same forward a few times over, against the one before all other checks."""
    return CHANGING.of(max(_apart(first, first_look(probe)) for _ in range(5)))


def _random(probe: Probe, first: Tensor) -> Finding:
    """Other random numbers, against the first ones."""
    furthest = 0.0
    for draw in (1, 2, 3):
        with seeded(probe, draw), torch.no_grad():
            furthest = max(furthest, _apart(first, probe.forward(probe.images)))
    return RANDOM.of(furthest)


def _batch(probe: Probe, first: Tensor) -> Finding:
    """In halves, backwards and one by one, against all at once."""
    n = len(probe)
    if n < 2:
        return BATCH.skipped("There is one image only.")
    with torch.no_grad():
        halves = torch.cat([probe.forward(part) for part in probe.images.chunk(2)])
        backwards = probe.forward(probe.images.flip(0)).flip(0)
        alone = torch.cat([probe.forward(image[None]) for image in probe.images[:8]])
    return BATCH.of(max(_apart(first, halves), _apart(first, backwards), _apart(first[:8], alone)))


def _watched(probe: Probe, first: Tensor) -> Finding:
    """With a gradient asked for, against without."""
    with seeded(probe), torch.enable_grad():
        return WATCHED.of(_apart(first, probe.forward(probe.images.clone().requires_grad_(True)).detach()))


def _inner(probe: Probe) -> Finding:
    """Whatever runs a backward pass has to unpack the tensors that were saved for it."""
    unpacked = 0

    def unpack(saved: Tensor) -> Tensor:
        nonlocal unpacked
        unpacked += 1
        return saved

    try:
        with seeded(probe), torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, unpack):
            probe.forward(probe.images[:2].clone().requires_grad_(True))
    except RuntimeError as error:  # torch.func refuses to differentiate where saved tensors are watched
        if "saved tensor hooks" not in str(error):
            raise
        return INNER.of(1, "It uses torch.func.")
    return INNER.of(unpacked, f"Saved tensors that were used during the forward: {unpacked}.")


def _memory(probe: Probe) -> Finding:
    """From images that nobody has asked about to their adversarial images and the other way round.

    Each way is asked of a copy of its own, so that neither knows of the other. Memories that copies share are
    not seen.
    """
    fresh = replace(probe, images=MOVES["right"](probe.images))
    try:
        there = replace(fresh, net=copy.deepcopy(probe.net)).attacked(PGD(steps=10))
        way = [fresh.images + share * (there - fresh.images) for share in (0, 1 / 8, 1 / 4, 1 / 2, 1)]
        out = _ask(replace(probe, net=copy.deepcopy(probe.net)), way)
        back = _ask(replace(probe, net=copy.deepcopy(probe.net)), way[::-1])[::-1]
    except Exception as error:  # copying runs the network's own code
        return MEMORY.skipped(f"The network cannot be copied ({' '.join(str(error).split())[:100]}).")
    return MEMORY.of(max(_apart(one, other) for one, other in zip(out, back, strict=True)))


def _ask(probe: Probe, way: list[Tensor]) -> list[Tensor]:
    answers = []
    for images in way:
        with seeded(probe), torch.no_grad():
            answers.append(probe.forward(images))
    return answers


def _apart(logits: Tensor, others: Tensor) -> float:
    return float(difference(logits, others).max())
