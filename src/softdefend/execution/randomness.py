"""Where an attack's random numbers come from: a caller's generator, or an evaluation's seed.

An evaluation attacks the images of several batches at once. A batch owns its random numbers, whatever else is
computed beside it; how many images are computed at once is a matter of memory only. Two families:

* :meth:`AttackRandomness.batch_noise` and :meth:`AttackRandomness.sequence` are the numbers of AutoAttack's
  reference implementation (github.com/fra31/auto-attack): every attack starts every batch from a CPU
  generator with the same seed, so all batches read one and the same sequence, each from its own place.
* :meth:`AttackRandomness.normal_like` and :meth:`AttackRandomness.in_ball` belong to the image: in an
  evaluation they are a hash of seed, attack and the image's position in the data, the same in every batch, in
  every order and on every device (up to rounding).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from softdefend.core import rng
from softdefend.core.projections import uniform_in_l1
from softdefend.core.threat import ThreatModel


class AttackRandomness(ABC):
    """Random numbers for n images, which form one or more batches.

    Args:
        generators: one for each batch; None is torch's global generator.
    """

    def __init__(self, generators: Sequence[torch.Generator | None]) -> None:
        self.generators = tuple(generators)

    @property
    @abstractmethod
    def batch(self) -> Tensor:
        """The batch of each image, [n] int64 on the CPU, ascending from 0."""

    @property
    def generator(self) -> torch.Generator | None:
        """Of the one batch that there is."""
        (own,) = self.generators
        return own

    def batch_noise(self, image: Tensor, rows: Tensor, *, normal: bool) -> Tensor:
        """Numbers never seen before, shaped and typed like ``image`` [m, c, h, w], one draw for each batch
        that has any of ``rows`` [m] (ascending). Uniform in [0, 1), or standard normal."""
        draw = torch.randn if normal else torch.rand
        counts = torch.bincount(self.batch[rows.cpu()], minlength=len(self.generators)).tolist()
        parts = []
        for generator, count in zip(self.generators, counts, strict=True):
            if count:
                # The dtype is torch's default, as in the reference, not the images'.
                device = image.device if generator is None else generator.device
                shape = (count, *image.shape[1:])
                parts.append(draw(shape, generator=generator, device=device).to(image))
        return torch.cat(parts)

    @abstractmethod
    def sequence(self) -> torch.Generator | None:
        """A generator at the start of the sequence that every batch reads."""

    @abstractmethod
    def normal_like(self, image: Tensor, rows: Tensor | None, number: int) -> Tensor:
        """Standard normal numbers shaped like ``image`` [m, c, h, w], which belong to the images.

        Args:
            image: of these images.
            rows: their positions [m] among the n; all when None.
            number: of this draw, from 0.
        """

    @abstractmethod
    def in_ball(self, threat: ThreatModel, image: Tensor, rows: Tensor | None, number: int) -> Tensor:
        """A point drawn uniformly from the ball around each image, [m, c, h, w], not cut to [0, 1]; see
        :meth:`normal_like`."""

    def places(self, n: int, device: torch.device) -> Tensor:
        """The places of all n images in the batch that they are a share of, [n] int64."""
        return torch.arange(n, device=device)

    @abstractmethod
    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, AttackRandomness]]:
        """The rows of each batch, and randomness of its own on ``device``: for attacks that know one batch
        only."""

    def state(self) -> Tensor:
        """Where the generators stand, [batches, bytes] uint8."""
        return torch.stack([g.get_state() for g in self.generators if g is not None])

    def load_state(self, state: Tensor) -> None:
        """Continue from :meth:`state`."""
        for generator, own in zip(self.generators, state, strict=True):
            if generator is not None:
                generator.set_state(own.cpu().clone())  # torch crashes on a view


class CallerRandomness(AttackRandomness):
    """One batch of n images, all of whose numbers come one after the other from a caller's generator.

    Args:
        generator: None is torch's global generator.
        n: images.
    """

    def __init__(self, generator: torch.Generator | None, n: int) -> None:
        super().__init__([generator])
        self.n = n

    @property
    def batch(self) -> Tensor:
        """See :attr:`AttackRandomness.batch`."""
        return torch.zeros(self.n, dtype=torch.int64)

    def sequence(self) -> torch.Generator | None:
        """See :meth:`AttackRandomness.sequence`."""
        return self.generator

    def normal_like(self, image: Tensor, rows: Tensor | None, number: int) -> Tensor:
        """See :meth:`AttackRandomness.normal_like`."""
        return torch.randn(image.shape, generator=self.generator, device=image.device, dtype=image.dtype)

    def in_ball(self, threat: ThreatModel, image: Tensor, rows: Tensor | None, number: int) -> Tensor:
        """See :meth:`AttackRandomness.in_ball`."""
        return threat.random_start(image, self.generator)

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, AttackRandomness]]:
        """See :meth:`AttackRandomness.batches`."""
        yield torch.arange(self.n, device=device), self


class SeededRandomness(AttackRandomness):
    """Several batches of an evaluation.

    Args:
        index: for each batch the positions of its images in the data, int64.
        seed: the evaluation's seed.
        name: of the attack.
        first: how many batches came before these; or, where others lie between them, before each.
    """

    def __init__(self, index: Sequence[Tensor], seed: int, name: str, first: int | Sequence[int] = 0) -> None:
        super().__init__([torch.Generator().manual_seed(seed) for _ in index])
        self.index, self.seed, self.name = torch.cat(list(index)), seed, name
        self.numbers = range(first, first + len(index)) if isinstance(first, int) else tuple(first)
        sizes = torch.tensor([len(part) for part in index])
        self._batch = torch.arange(len(index)).repeat_interleave(sizes)

    @property
    def batch(self) -> Tensor:
        """See :attr:`AttackRandomness.batch`."""
        return self._batch

    def sequence(self) -> torch.Generator | None:
        """See :meth:`AttackRandomness.sequence`."""
        return torch.Generator().manual_seed(self.seed)

    def normal_like(self, image: Tensor, rows: Tensor | None, number: int) -> Tensor:
        """See :meth:`AttackRandomness.normal_like`."""
        rows = self._rows(image, rows)
        return self.normal(rows, image[0].numel(), 2 * number).view(image.shape).to(image)

    def in_ball(self, threat: ThreatModel, image: Tensor, rows: Tensor | None, number: int) -> Tensor:
        """See :meth:`AttackRandomness.in_ball`."""
        rows, pixels = self._rows(image, rows), image[0].numel()
        if threat.norm == "linf":
            noise = self.uniform(rows, pixels, 2 * number).view(image.shape).to(image)
            return image + (2 * noise - 1) * float(threat.eps)
        if threat.norm == "l1":
            noise = self.uniform(rows, pixels + 1, 2 * number).to(image)
            return image + float(threat.eps) * uniform_in_l1(noise).view_as(image)
        noise = self.normal_like(image, rows, number)
        # The volume inside radius r grows as r^d, so uniform in the ball means r = eps * u^(1/d).
        radius = self.uniform(rows, 1, 2 * number + 1).to(image).pow(1 / pixels) * float(threat.eps)
        return image + threat.ascend(torch.zeros_like(image), noise, 1.0) * radius.view(-1, 1, 1, 1)

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, AttackRandomness]]:
        """See :meth:`AttackRandomness.batches`."""
        for number in range(len(self.generators)):
            rows = (self._batch == number).nonzero().squeeze(1)
            step = self.numbers[number]
            own = rng.stream(self.seed, f"evaluate/{self.name}", step=step, device=device)
            yield rows.to(device), CallerRandomness(own, len(rows))

    def uniform(self, rows: Tensor, count: int, number: int) -> Tensor:
        """``count`` numbers in [0, 1) for each of ``rows`` [m], [m, count] float32 on their device; the same
        ones whenever asked for under the same ``number``."""
        key = rng.key(self.seed, f"evaluate/{self.name}", step=number)
        return hashed(key, self.index.to(rows.device)[rows], count)

    def normal(self, rows: Tensor, count: int, number: int) -> Tensor:
        """Standard normal numbers, else as :meth:`uniform`."""
        return _normal(self.uniform(rows, 2 * count, number))

    def _rows(self, image: Tensor, rows: Tensor | None) -> Tensor:
        return torch.arange(len(image), device=image.device) if rows is None else rows


def hashed(key: int, index: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) as a function of (key, index, place), [m, count] float32.

    SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): each index starts a sequence of its own, at a mixed state.

    Args:
        key: 63 bits.
        index: [m] int64.
        count: numbers for each index.
    """
    start = _mix(key ^ _mix(index * _GAMMA))
    place = torch.arange(1, count + 1, device=index.device) * _GAMMA
    # 24 bits are what float32 holds.
    return _shifted(_mix(start[:, None] + place), 40).to(torch.float32) * 2.0**-24


def hashed_normal(key: int, index: Tensor, count: int) -> Tensor:
    """Standard normal numbers as :func:`hashed` makes uniform ones; none is larger than 5.8."""
    return _normal(hashed(key, index, 2 * count))


def _normal(uniform: Tensor) -> Tensor:
    """[m, 2 count] numbers in [0, 1) to [m, count] standard normal ones (Box and Muller)."""
    radius, angle = uniform.chunk(2, dim=1)
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift to the right that fills with zeros; torch's own fills with the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's output function; int64 products wrap around."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)
