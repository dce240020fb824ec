"""Where an attack's random numbers come from when the images of several logical batches are attacked at once.

A *logical* batch owns its random numbers, whatever else is computed beside it; how many images are computed
at once is a matter of memory only. Two families:

* :meth:`Draws.fresh` and :meth:`Draws.sequence` are the numbers of AutoAttack's reference implementation
  (github.com/fra31/auto-attack): every attack starts every logical batch from a CPU generator with the same
  seed, so all batches read one and the same sequence, each from its own place.
* :meth:`Draws.uniform` and :meth:`Draws.normal` belong to the image: they are a hash of seed, attack and the
  image's position in the data, the same in every batch, in every order and on every device (up to rounding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softdefend.core import rng


@dataclass(frozen=True)
class Draws:
    """Random numbers for n images, which form one or more logical batches.

    Attributes:
        batch: [n] int64 on the CPU, ascending from 0: the logical batch of each image.
        generators: one for each logical batch; None is torch's global generator.
        index: [n] int64, position of each image in the data.
        seed: the evaluation's seed; None where a caller's generator is all there is.
        name: of the attack.
        first: how many logical batches came before these.
    """

    batch: Tensor
    generators: tuple[torch.Generator | None, ...]
    index: Tensor
    seed: int | None = None
    name: str = ""
    first: int = 0

    @classmethod
    def of(cls, generator: torch.Generator | None, n: int) -> Draws:
        """One logical batch of n images that draws from ``generator``."""
        return cls(torch.zeros(n, dtype=torch.int64), (generator,), torch.arange(n))

    @classmethod
    def seeded(cls, index: Sequence[Tensor], seed: int, name: str, first: int = 0) -> Draws:
        """Several logical batches of an evaluation, given by the positions of their images in the data."""
        sizes = torch.tensor([len(part) for part in index])
        generators = tuple(torch.Generator().manual_seed(seed) for _ in index)
        batch = torch.arange(len(index)).repeat_interleave(sizes)
        return cls(batch, generators, torch.cat(list(index)), seed, name, first)

    def fresh(self, rows: Tensor, image: Tensor, *, normal: bool) -> Tensor:
        """Numbers never seen before, shaped and typed like ``image`` [m, c, h, w], one draw for each logical
        batch that has any of ``rows`` [m] (ascending). Uniform in [0, 1), or standard normal."""
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

    def sequence(self) -> torch.Generator | None:
        """A generator at the start of the sequence that every logical batch reads."""
        if self.seed is None:
            return self.generators[0]
        return torch.Generator().manual_seed(self.seed)

    def portions(self, device: torch.device) -> Iterator[tuple[Tensor, torch.Generator | None]]:
        """The rows of each logical batch, and a generator of its own on ``device``: for attacks that know
        nothing of logical batches."""
        for number, own in enumerate(self.generators):
            rows = (self.batch == number).nonzero().squeeze(1)
            if self.seed is not None:
                step = self.first + number
                own = rng.stream(self.seed, f"evaluate/{self.name}", step=step, device=device)
            yield rows.to(device), own

    def uniform(self, rows: Tensor, count: int, number: int) -> Tensor:
        """``count`` numbers in [0, 1) for each of ``rows`` [m], [m, count] float32 on their device; the same
        ones whenever asked for under the same ``number``."""
        key = rng.key(self.seed or 0, f"evaluate/{self.name}", step=number)
        return hashed(key, self.index.to(rows.device)[rows], count)

    def normal(self, rows: Tensor, count: int, number: int) -> Tensor:
        """Standard normal numbers (Box and Muller), else as :meth:`uniform`."""
        radius, angle = self.uniform(rows, 2 * count, number).chunk(2, dim=1)
        return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)

    def state(self) -> Tensor:
        """Where the generators stand, [batches, bytes] uint8."""
        return torch.stack([g.get_state() for g in self.generators if g is not None])

    def load_state(self, state: Tensor) -> None:
        """Continue from :meth:`state`."""
        for generator, own in zip(self.generators, state, strict=True):
            if generator is not None:
                generator.set_state(own.cpu().clone())  # torch crashes on a view


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
