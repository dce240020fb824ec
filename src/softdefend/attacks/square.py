"""Square attack (Andriushchenko et al., arXiv 1912.00049): random search with squares, without gradients.

The proposals, the order of the random numbers and the verdicts are those of AutoAttack's reference
implementation (Croce & Hein, arXiv 2003.01690). Nothing between two packings of the batch is read from
the device by the host: even where a query's random numbers begin is kept on the device.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from softdefend.attacks.base import Attack, Forward
from softdefend.attacks.draws import Draws
from softdefend.attacks.losses import AttackLoss, hard_label, margin
from softdefend.attacks.oracle import Journal, Oracle, block
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
        oracle, draws = Oracle(forward, len(image)), Draws.of(generator, len(image))
        return self._run(oracle, image, hard_label(target), threat, draws, Journal(), loss)

    def search(
        self,
        oracle: Oracle,
        image: Tensor,
        label: Tensor,
        threat: ThreatModel,
        *,
        draws: Draws,
        journal: Journal | None = None,
    ) -> Tensor:
        """See :meth:`Attack.search`. Every logical batch reads the same sequence of random numbers: the
        stripes of its images that are right, then the queries. In l-inf places and colours are therefore
        shared by all batches with equally many right images; in l2 signs are drawn for the images that are
        still right, so a verdict depends on its logical batch and on nothing else beside it."""
        return self._run(oracle, image, label, threat, draws, journal or Journal(), None)

    @torch.no_grad()
    def _run(
        self,
        oracle: Oracle,
        image: Tensor,
        label: Tensor,
        threat: ThreatModel,
        draws: Draws,
        journal: Journal,
        loss: AttackLoss | None,
    ) -> Tensor:
        clean, saved = oracle.clean(image), journal.load()
        judge = _Judge(oracle, label, clean, loss)
        kind = _LinfWalk if threat.norm == "linf" else _L2Walk
        if saved:
            result, rows, query = saved["result"], saved["rows"], int(saved["query"])
            numbers = _Numbers.resumed(draws.sequence(), saved["numbers"], image.device)
            walk = kind.resumed(image[rows], float(threat.eps), numbers, saved["stream"], result[rows])
            judge.resume(rows, saved["badness"], saved["doubted"])
            noted = query
        else:
            result, query, noted = image.clone(), 0, 0
            rows = (clean.argmax(dim=1) == label).nonzero().flatten()
            if not len(rows):
                return result
            stream = draws.batch.to(image.device)[rows]
            numbers = _Numbers(draws.sequence(), int(draws.batch[-1]) + 1, image.device)
            walk = kind.begun(image[rows], float(threat.eps), numbers, stream)
            judge.begin(rows, walk.best)
        height, width = image.shape[2:]
        while True:
            # Only here does the host look at the device; often at first, when most images fall.
            result[judge.rows] = walk.best
            left = judge.pack(walk.best)
            if left is not None:
                walk.pack(left)
            if query >= self.queries or not len(judge.rows):
                return threat.project(image, result)
            if query > noted:
                journal.save(partial(_note, result, query, judge, walk, numbers))
            ahead = range(query, min(query + block(query, 50), self.queries))
            numbers.reserve(len(ahead) * walk.numbers_per_query)
            for query in ahead:
                candidate = walk.propose(self.side(query, height, width, threat.norm), judge.active)
                wins = judge(candidate)
                walk.best = torch.where(wins.view(-1, 1, 1, 1), candidate, walk.best)
            query = ahead.stop


def _note(result: Tensor, query: int, judge: _Judge, walk: _Walk, numbers: _Numbers) -> dict[str, Tensor]:
    return {
        "result": result,
        "query": torch.tensor(query),
        "rows": judge.rows,
        "badness": judge.badness,
        "doubted": judge.doubted,
        "stream": walk.stream,
        "numbers": numbers.state(),
    }


class _Judge:
    """Who is still right, and how bad each image has become; m images between two packings."""

    rows: Tensor
    """Their positions in the batch, [m]."""
    badness: Tensor
    """The margin, or the given loss, of the best point, [m]."""
    active: Tensor
    """Not yet claimed to be wrong, [m] bool."""
    doubted: Tensor
    """Claimed to be wrong and found right in full precision, [m] bool: only a worse point counts now."""

    def __init__(self, oracle: Oracle, label: Tensor, clean: Tensor, loss: AttackLoss | None) -> None:
        self.oracle, self.label, self.clean, self.loss = oracle, label, clean, loss

    def begin(self, rows: Tensor, best: Tensor) -> None:
        """From the first points, [m, c, h, w]."""
        self.resume(rows, torch.zeros(0), torch.zeros(len(rows), dtype=torch.bool, device=rows.device))
        wrong, self.badness = self._look(best)
        self.active = ~wrong

    def resume(self, rows: Tensor, badness: Tensor, doubted: Tensor) -> None:
        """From a packing."""
        self.rows, self.badness, self.doubted, self.forward = rows, badness, doubted, self.oracle.at(rows)
        self.active = torch.ones_like(doubted)

    def __call__(self, candidate: Tensor) -> Tensor:
        """Which candidates [m, c, h, w] are kept, [m] bool."""
        wrong, value = self._look(candidate)
        worse = value > self.badness
        wins = self.active & ((wrong & ~self.doubted) | worse)
        self.badness = torch.where(wins, value, self.badness)
        self.active = self.active & ~(wrong & wins)
        return wins

    def pack(self, best: Tensor) -> Tensor | None:
        """Drop the images that are wrong: positions [l] of those that stay, or None where all do."""
        refuted = ~self.active
        if self.oracle.doubted:
            fooled = self.oracle.confirmed(~self.active, best, self.label[self.rows], self.rows)
            refuted, self.active = refuted & ~fooled, ~fooled
            self.doubted = self.doubted | refuted
        left = self.active.nonzero().flatten()
        if len(left) == len(self.rows):
            return None
        self.resume(self.rows[left], self.badness[left], self.doubted[left])
        return left

    def _look(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each image is wrong by now, and how bad it is, both [m]."""
        logits = self.forward(image)
        gap = margin(logits, self.label[self.rows])
        if self.loss is None:
            return gap >= 0, gap
        # A given loss knows only the whole batch: rows not asked for stand at their clean logits.
        return gap >= 0, self.loss(self.clean.index_copy(0, self.rows, logits))[self.rows]


class _Numbers:
    """Uniform numbers in one fixed order, drawn in advance. Several streams read the same sequence, each from
    a position of its own that is kept on the device.

    A CPU generator gives the same numbers in one draw or in many, so blocks do not change them. They have
    torch's default dtype, as in the reference.
    """

    def __init__(self, generator: torch.Generator | None, streams: int, device: torch.device) -> None:
        self.generator, self.device = generator, device
        self.pool, self.first = torch.empty(0, device=device), 0
        self.position = torch.zeros(streams, dtype=torch.int64, device=device)

    @classmethod
    def resumed(cls, generator: torch.Generator | None, state: Tensor, device: torch.device) -> _Numbers:
        """As :meth:`state` left them; ``generator`` stands at the start of the sequence."""
        made = cls(generator, len(state), device)
        made.first = int(state.min())
        torch.rand(made.first, generator=generator)
        made.position = (state - made.first).to(device)
        return made

    def state(self) -> Tensor:
        """Positions from the start of the sequence, [streams]."""
        return self.position + self.first

    def keep(self, streams: Tensor) -> None:
        """Forget all streams but these."""
        self.position = self.position[streams]

    def reserve(self, count: int) -> None:
        """Make sure that each stream can read ``count`` numbers. Costs a read of the device by the host."""
        low, high = (int(end) for end in torch.stack(self.position.aminmax()).tolist())
        rest = self.pool[low:]
        source = "cpu" if self.generator is None else self.generator.device
        missing = max(high - low + count - len(rest), 0)
        fresh = torch.rand(missing, generator=self.generator, device=source)
        self.pool = torch.cat([rest, fresh.to(self.device)])
        self.position, self.first = self.position - low, self.first + low

    def next(self, count: int) -> Tensor:
        """The next numbers of each stream, [streams, count]."""
        taken = self.pool[self.position[:, None] + torch.arange(count, device=self.device)]
        self.position = self.position + count
        return taken

    def next_rows(self, stream: Tensor, among: Tensor, count: int) -> Tensor:
        """The next ``count`` numbers of each row flagged in ``among`` [m], in turn within its ``stream`` [m]
        (ascending), [m, count]; the rows not flagged use up none and get any."""
        flagged = among.to(torch.int64)
        each = torch.zeros_like(self.position).index_add(0, stream, flagged)
        before = flagged.cumsum(0) - flagged - (each.cumsum(0) - each)[stream]
        offset = self.position[stream] + before.clamp_min(0) * count
        taken = self.pool[offset[:, None] + torch.arange(count, device=self.device)]
        self.position = self.position + each * count
        return taken


class _Walk:
    """The images still searched, [m, c, h, w], the worst point found around each, and the stream of random
    numbers that each reads, [m] int64, ascending."""

    numbers_per_query: int
    best: Tensor

    def __init__(self, image: Tensor, eps: float, numbers: _Numbers, stream: Tensor) -> None:
        self.image, self.eps, self.numbers, self.stream = image, eps, numbers, stream
        self._rebuild()

    @classmethod
    def begun(cls, image: Tensor, eps: float, numbers: _Numbers, stream: Tensor) -> _Walk:
        """At the start, with one stream for each logical batch."""
        walk = cls(image, eps, numbers, stream)
        walk._narrow()
        walk.best = walk._start()
        return walk

    @classmethod
    def resumed(cls, image: Tensor, eps: float, numbers: _Numbers, stream: Tensor, best: Tensor) -> _Walk:
        """At a packing."""
        walk = cls(image, eps, numbers, stream)
        walk.best = best
        return walk

    def pack(self, left: Tensor) -> None:
        """Keep only the images at these positions."""
        self.image, self.best, self.stream = self.image[left], self.best[left], self.stream[left]
        if len(left):
            self._narrow()
        self._rebuild()

    def _narrow(self) -> None:
        """Number the streams that are read from zero without gaps."""
        read, self.stream = torch.unique(self.stream, return_inverse=True)
        self.numbers.keep(read)

    def _rebuild(self) -> None:
        """What depends on which images are left."""

    def _start(self) -> Tensor:
        """The first points, [m, c, h, w]."""
        raise NotImplementedError

    def propose(self, side: int, active: Tensor) -> Tensor:
        """A candidate for each image, [m, c, h, w], inside the ball and the box."""
        raise NotImplementedError

    def _window(self, place: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Rows [s, 1, side, 1] and columns [s, 1, 1, side] of the windows that numbers [s, 2] name."""
        height, width = self.image.shape[2:]
        along = torch.arange(side, device=place.device)
        top, left = (place[:, 0] * (height - side)).long(), (place[:, 1] * (width - side)).long()
        return (top[:, None] + along)[:, None, :, None], (left[:, None] + along)[:, None, None, :]


def _at(count: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of samples [count, 1, 1, 1] and channels [1, channels, 1, 1]."""
    return (
        torch.arange(count, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
    )


class _LinfWalk(_Walk):
    """Vertical stripes at plus or minus eps, then windows of one sign per channel (algorithm 2)."""

    def _rebuild(self) -> None:
        self.numbers_per_query = 2 + self.image.shape[1]
        self.lowest, self.highest = (self.image - self.eps).clamp_min(0), (self.image + self.eps).clamp_max(1)

    def _start(self) -> Tensor:
        m, channels, _, width = self.image.shape
        everyone = torch.ones(m, dtype=torch.bool, device=self.image.device)
        self.numbers.reserve(int(self.stream.bincount().max()) * channels * width)
        drawn = self.numbers.next_rows(self.stream, everyone, channels * width)
        # Streams that stand at the same place read the same from now on; nothing below needs their order.
        places, same = torch.unique(self.numbers.position, return_inverse=True)
        self.numbers.position, self.stream = places, same[self.stream]
        return (self.image + self.eps * _sign(drawn).view(m, channels, 1, width)).clamp(0, 1)

    def propose(self, side: int, active: Tensor) -> Tensor:
        drawn = self.numbers.next(self.numbers_per_query)
        streams, channels = len(drawn), self.image.shape[1]
        step = drawn.new_zeros(streams, *self.image.shape[1:])
        colour = (2 * self.eps * _sign(drawn[:, 2:]))[..., None, None]
        step[*_at(streams, channels, step.device), *self._window(drawn, side)] = colour
        # One stream is the common case: a view for every image.
        step = step.expand(len(self.best), -1, -1, -1) if streams == 1 else step[self.stream]
        return torch.minimum(torch.maximum(self.best + step, self.lowest), self.highest)


class _L2Walk(_Walk):
    """Tiles of ``_eta``, then windows that take over the length of a second window (algorithm 3).

    The sign of a window is drawn for each image that is still right, so the numbers depend on how many are.
    """

    def __init__(self, image: Tensor, eps: float, numbers: _Numbers, stream: Tensor) -> None:
        self.shapes: dict[int, Tensor] = {}
        super().__init__(image, eps, numbers, stream)

    def _rebuild(self) -> None:
        most = int(self.stream.bincount().max()) if len(self.stream) else 0
        self.numbers_per_query = 5 + most * self.image.shape[1]

    def _start(self) -> Tensor:
        m, _, height, width = self.image.shape
        everyone = torch.ones(m, dtype=torch.bool, device=self.image.device)
        # The height names the size for both axes, as in the reference, which fails where we cut a tile off
        # at the border or (below 5 pixels) use tiles of a single one.
        side = max(height // 5, 1)
        start = max((height - 5 * side) // 2, 0)
        tiles = [(i, j) for i in range(height // side) for j in range(max(width // side, 1))]
        self.numbers.reserve(len(tiles) * (self.numbers_per_query - 4))
        delta = torch.zeros_like(self.image)
        for i, j in tiles:
            tile = self._eta(side, self.numbers.next(1)) * self._signs(everyone)
            part = delta[:, :, start + i * side : start + (i + 1) * side, start + j * side :][..., :side]
            part += tile[:, :, : part.shape[2], : part.shape[3]]
        return self._on_sphere(delta)

    def propose(self, side: int, active: Tensor) -> Tensor:
        drawn = self.numbers.next(5)
        fresh = self._eta(side, drawn[:, 4:]) * self._signs(active)
        images = _at(len(self.image), self.image.shape[1], self.image.device)
        into = *images, *(along[self.stream] for along in self._window(drawn, side))
        source = *images, *(along[self.stream] for along in self._window(drawn[:, 2:], side))
        delta = self.best - self.image
        free = (self.eps**2 - _length(delta, (1, 2, 3)) ** 2).clamp_min(0) / delta.shape[1]
        both = torch.zeros_like(delta)
        both[into] = both[source] = 1
        length = (free + _length(delta * both, (2, 3)) ** 2).sqrt()
        old = delta[into]
        fresh = fresh + old / (1e-12 + _length(old, (2, 3)))
        delta[source] = 0
        delta[into] = fresh / (1e-12 + _length(fresh, (2, 3))) * length
        return self._on_sphere(delta)

    def _on_sphere(self, delta: Tensor) -> Tensor:
        return (self.image + delta / (_length(delta, (1, 2, 3)) + 1e-12) * self.eps).clamp(0, 1)

    def _signs(self, among: Tensor) -> Tensor:
        """A sign for each channel of each image, [m, c, 1, 1]."""
        return _sign(self.numbers.next_rows(self.stream, among, self.image.shape[1]))[..., None, None]

    def _eta(self, side: int, turn: Tensor) -> Tensor:
        """The pattern of each image's window, [m, 1, side, side], turned by 90 degrees where its stream's
        ``turn`` [streams, 1] is above 1/2."""
        if side not in self.shapes:
            self.shapes[side] = _eta(side).to(self.image.device)
        eta = self.shapes[side]
        return torch.where(turn[self.stream, :, None, None] > 0.5, eta.T, eta)


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
