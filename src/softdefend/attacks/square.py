"""Square attack (Andriushchenko et al., arXiv 1912.00049): random search with squares, without gradients.

The proposals, the order of the random numbers and the verdicts are those of AutoAttack's reference
implementation (Croce & Hein, arXiv 2003.01690). Nothing between two packings of the batch is read from
the device by the host: even where a query's random numbers begin is kept on the device.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softdefend.attacks.base import Attack, Forward
from softdefend.attacks.losses import AttackLoss, margin
from softdefend.errors import SettingError
from softdefend.threat import ThreatModel

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which the share of pixels that a square covers halves (the reference's table for 10,000)."""


@dataclass(frozen=True)
class Square(Attack):
    """Square attack in l-inf or l2 on the margin loss.

    A query changes one square window of every image, at one place and of one size for the whole batch, and
    keeps the change where it worsens the margin. An image that is wrong is left alone from then on. Windows
    are square on images that are not: their area is a share of the image's, their side at most its shorter
    side. As in the reference, a window never touches the last row or column unless it spans the image.

    Args:
        queries: proposals per image, >= 0, after the start; the sizes of the windows do not depend on it.
        p_init: share of the pixels in the first windows, in (0, 1].

    Raises:
        SettingError: a value outside these ranges.
    """

    queries: int = 5000
    """Proposals per image, >= 0."""
    p_init: float = 0.8
    """Share of the pixels that the first windows cover, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.queries < 0:
            raise SettingError("attack.queries", self.queries, "a whole number >= 0")
        if not 0 < self.p_init <= 1:
            raise SettingError("attack.p_init", self.p_init, "a share in (0, 1]")

    @property
    def name(self) -> str:
        """``square``, or ``square-1000`` where the queries are not 5000."""
        return "square" if self.queries == 5000 else f"square-{self.queries}"

    def side(self, query: int, height: int, width: int, norm: str = "linf") -> int:
        """Side of the window of a query (from 0), in pixels; in l2 odd and at least 3 where that fits."""
        share: float = self.p_init / 2 ** bisect_left(HALVINGS, query)
        side = max(round(math.sqrt(share * height * width)), 1 if norm == "linf" else 3)
        return min(side if norm == "linf" else side | 1, height, width)

    @torch.no_grad()
    def __call__(
        self,
        forward: Forward,
        image: Tensor,
        target: Tensor,
        threat: ThreatModel,
        *,
        loss: AttackLoss | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See :meth:`Attack.__call__`. Cost: at most ``queries + 2`` forwards of each image, no gradient.

        An image that is wrong from the start is returned unchanged, one that stays right as its worst point
        found. A ``loss`` given decides what is worse, in place of the margin. ``generator`` may live on the
        CPU wherever the images are: its numbers are then the same for every device. Random numbers belong
        to the batch, so a batch is part of the result.
        """
        label = target if target.ndim == 1 else target.argmax(dim=1)
        clean = forward(image)

        def judge(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            """Whether each of the batch's ``rows`` is wrong by now, and how bad it is, both [m]."""
            gap = margin(logits, label[rows])
            # A given loss knows only the whole batch: rows not asked for stand at their clean logits.
            return gap >= 0, gap if loss is None else loss(clean.index_copy(0, rows, logits))[rows]

        result = image.clone()
        rows = (clean.argmax(dim=1) == label).nonzero().flatten()
        if not len(rows):
            return result
        height, width = image.shape[2:]
        numbers = _Numbers(generator, image.device)
        walk = (_LinfWalk if threat.norm == "linf" else _L2Walk)(image[rows], float(threat.eps), numbers)
        wrong, badness = judge(forward(walk.best), rows)
        active, query = ~wrong, 0
        while True:
            # Only here does the host look at the device; often at first, when most images fall.
            result[rows] = walk.best
            left = active.nonzero().flatten()
            walk.pack(left)
            rows, badness, active = rows[left], badness[left], active[left]
            if query == self.queries or not len(rows):
                return threat.project(image, result)
            block = range(query, min(query + _block(query), self.queries))
            numbers.reserve(len(block) * walk.numbers_per_query)
            for query in block:
                candidate = walk.propose(self.side(query, height, width, threat.norm), active)
                wrong, value = judge(forward(candidate), rows)
                wins = active & (wrong | (value > badness))
                walk.best = torch.where(wins.view(-1, 1, 1, 1), candidate, walk.best)
                badness = torch.where(wins, value, badness)
                active = active & ~wrong
            query = block.stop


def _block(query: int) -> int:
    """Queries until the batch is packed again: images that fell cost at most a quarter more forwards."""
    return max(1, min(50, query // 4))


@dataclass
class _Numbers:
    """Uniform numbers in one fixed order, drawn in advance and read at a position kept on the device.

    A CPU generator gives the same float32 numbers in one draw or in many, so blocks do not change them.
    """

    generator: torch.Generator | None
    device: torch.device
    pool: Tensor = field(init=False)
    position: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.pool = torch.empty(0, device=self.device, dtype=torch.float32)
        self.position = torch.zeros((), dtype=torch.int64, device=self.device)

    def reserve(self, count: int) -> None:
        """Make sure that ``count`` numbers can be read. Costs a read of the device by the host."""
        rest = self.pool[int(self.position) :]
        source = "cpu" if self.generator is None else self.generator.device
        missing = max(count - len(rest), 0)
        fresh = torch.rand(missing, generator=self.generator, device=source, dtype=torch.float32)
        self.pool = torch.cat([rest, fresh.to(self.device)])
        self.position.zero_()

    def next(self, count: int) -> Tensor:
        """The next numbers, [count]."""
        taken = self.pool[self.position + torch.arange(count, device=self.device)]
        self.position += count
        return taken

    def next_rows(self, among: Tensor, count: int) -> Tensor:
        """The next ``count`` numbers of each row flagged in ``among`` [m] in turn, [m, count]; the rows not
        flagged use up none and get any."""
        turn = (among.cumsum(0) - 1).clamp_min(0).view(-1, 1)
        offset = turn * count + torch.arange(count, device=self.device)
        taken = self.pool[self.position + offset]
        self.position += among.sum() * count
        return taken


class _Walk:
    """The images still searched, [m, c, h, w], and the worst point found around each."""

    numbers_per_query: int
    best: Tensor

    def __init__(self, image: Tensor, eps: float, numbers: _Numbers) -> None:
        self.image, self.eps, self.numbers = image, eps, numbers

    def pack(self, left: Tensor) -> None:
        """Keep only the images at these positions."""
        self.image, self.best = self.image[left], self.best[left]

    def propose(self, side: int, active: Tensor) -> Tensor:
        """A candidate for each image, [m, c, h, w], inside the ball and the box."""
        raise NotImplementedError

    def _window(self, place: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Rows [side, 1] and columns [side] of the window that two uniform numbers name."""
        height, width = self.image.shape[2:]
        along = torch.arange(side, device=place.device)
        top, left = (place[0] * (height - side)).long(), (place[1] * (width - side)).long()
        return (top + along).view(-1, 1), left + along


class _LinfWalk(_Walk):
    """Vertical stripes at plus or minus eps, then windows of one sign per channel (algorithm 2)."""

    def __init__(self, image: Tensor, eps: float, numbers: _Numbers) -> None:
        super().__init__(image, eps, numbers)
        m, channels, _, width = image.shape
        self.numbers_per_query = 2 + channels
        numbers.reserve(m * channels * width)
        stripes = _sign(numbers.next(m * channels * width)).view(m, channels, 1, width)
        self.best = (image + eps * stripes).clamp(0, 1)
        self._bound()

    def _bound(self) -> None:
        self.lowest, self.highest = (self.image - self.eps).clamp_min(0), (self.image + self.eps).clamp_max(1)

    def pack(self, left: Tensor) -> None:
        super().pack(left)
        self._bound()

    def propose(self, side: int, active: Tensor) -> Tensor:
        drawn = self.numbers.next(self.numbers_per_query)
        rows, columns = self._window(drawn, side)
        step = drawn.new_zeros(self.image.shape[1:])
        step[:, rows, columns] = (2 * self.eps * _sign(drawn[2:])).view(-1, 1, 1)
        return torch.minimum(torch.maximum(self.best + step, self.lowest), self.highest)


class _L2Walk(_Walk):
    """Tiles of ``_eta``, then windows that take over the length of a second window (algorithm 3).

    The sign of a window is drawn for each image that is still right, so the numbers depend on how many are.
    """

    def __init__(self, image: Tensor, eps: float, numbers: _Numbers) -> None:
        super().__init__(image, eps, numbers)
        m, channels, height, width = image.shape
        self.numbers_per_query = 5 + m * channels
        self.shapes: dict[int, Tensor] = {}
        everyone = torch.ones(m, dtype=torch.bool, device=image.device)
        # The height names the size for both axes, as in the reference, which fails where we cut a tile off
        # at the border or (below 5 pixels) use tiles of a single one.
        side = max(height // 5, 1)
        start = max((height - 5 * side) // 2, 0)
        tiles = [(i, j) for i in range(height // side) for j in range(max(width // side, 1))]
        numbers.reserve(len(tiles) * (1 + m * channels))
        delta = torch.zeros_like(image)
        for i, j in tiles:
            tile = self._eta(side, numbers.next(1)) * self._signs(everyone)
            part = delta[:, :, start + i * side : start + (i + 1) * side, start + j * side :][..., :side]
            part += tile[:, :, : part.shape[2], : part.shape[3]]
        self.best = self._on_sphere(delta)

    def pack(self, left: Tensor) -> None:
        super().pack(left)
        self.numbers_per_query = 5 + len(left) * self.image.shape[1]

    def propose(self, side: int, active: Tensor) -> Tensor:
        drawn = self.numbers.next(5)
        fresh = self._eta(side, drawn[4:]) * self._signs(active)
        into, source = self._window(drawn, side), self._window(drawn[2:], side)
        delta = self.best - self.image
        free = (self.eps**2 - _length(delta, (1, 2, 3)) ** 2).clamp_min(0) / delta.shape[1]
        both = delta.new_zeros(delta.shape[2:])
        both[into] = both[source] = 1
        length = (free + _length(delta * both, (2, 3)) ** 2).sqrt()
        old = delta[:, :, *into]
        fresh = fresh + old / (1e-12 + _length(old, (2, 3)))
        delta[:, :, *source] = 0
        delta[:, :, *into] = fresh / (1e-12 + _length(fresh, (2, 3))) * length
        return self._on_sphere(delta)

    def _on_sphere(self, delta: Tensor) -> Tensor:
        return (self.image + delta / (_length(delta, (1, 2, 3)) + 1e-12) * self.eps).clamp(0, 1)

    def _signs(self, among: Tensor) -> Tensor:
        """A sign for each channel of each image, [m, c, 1, 1]."""
        return _sign(self.numbers.next_rows(among, self.image.shape[1]))[..., None, None]

    def _eta(self, side: int, turn: Tensor) -> Tensor:
        """The window's pattern, [side, side], turned by 90 degrees where ``turn`` > 1/2."""
        if side not in self.shapes:
            self.shapes[side] = _eta(side).to(self.image.device)
        eta = self.shapes[side]
        return torch.where(turn > 0.5, eta.T, eta)


def _eta(side: int) -> Tensor:
    """Two neighbouring pyramids of opposite sign, [side, side], of Euclidean length one (the paper's eta)."""
    eta = torch.cat([_pyramid(side // 2, side), -_pyramid(side - side // 2, side)])
    return eta / eta.square().sum().sqrt()


def _pyramid(height: int, width: int) -> Tensor:
    """Falls from the centre by 1/k^2 in rings, [height, width], of Euclidean length one."""
    row, column = torch.arange(height).view(-1, 1), torch.arange(width)
    ring = torch.maximum((row - height // 2).abs(), (column - width // 2).abs())
    pyramid = torch.zeros(height, width)
    for k in range(max(height, width) // 2 + 1):
        pyramid += torch.where(ring <= k, 1 / torch.tensor(k + 1.0) ** 2, 0)
    return pyramid / pyramid.square().sum().sqrt()


def _sign(uniform: Tensor) -> Tensor:
    return (2 * uniform - 1).sign()


def _length(delta: Tensor, over: tuple[int, ...]) -> Tensor:
    """Euclidean length over these axes, which stay with size one."""
    return delta.square().sum(dim=over, keepdim=True).sqrt()
