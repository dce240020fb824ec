"""Square attack (Andriushchenko et al., arXiv 1912.00049): random search with squares, without gradients.

The proposals, the order of the random numbers and the verdicts are those of AutoAttack's reference
implementation (Croce & Hein, arXiv 2003.01690). Nothing between two packings of the batch is read from
the device by the host: even where a query's random numbers begin is kept on the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from softdefend.attacks.base import Attack
from softdefend.attacks.losses import AttackLoss, hard_label, margin
from softdefend.attacks.names import ATTACKS
from softdefend.core.errors import SettingError
from softdefend.core.goals import fooled
from softdefend.core.projections import l1_correction
from softdefend.core.threat import Norm, ThreatModel
from softdefend.execution.context import ActiveImages, AttackContext, steps_until_packing
from softdefend.execution.counting import CountingModel, Forward
from softdefend.execution.step_graphs import fill_up

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which the share of pixels that a square covers halves (the reference's table for 10,000)."""


@ATTACKS.register("square")
@dataclass(frozen=True)
class Square(Attack):
    """Square attack in l-inf, l2 or l1 on the margin loss.

    A query changes one square window of every image, at one place and of one size for the whole batch, and
    keeps the change where it worsens the margin. An image that is wrong is left alone from then on, unless
    the caller brings a loss. Windows
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
    several_batches: ClassVar[bool] = True
    takes_target: ClassVar[bool] = True
    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")
    pattern: ClassVar[str] = r"square(?:-(?P<queries>\d+))?"
    suffix: ClassVar[str | None] = "[-QUERIES]"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 0:
            raise SettingError("attack.queries", self.queries, "a whole number >= 0")
        if not 0 < self.p_init <= 1:
            raise SettingError("attack.p_init", self.p_init, "a share in (0, 1]")

    @property
    def name(self) -> str:
        """``square``, or ``square-1000`` where the queries are not 5000."""
        return "square" if self.queries == 5000 else f"square-{self.queries}"

    def side(self, query: int, height: int, width: int, norm: str = "linf") -> int:
        """Side of a query's window (from 0), in pixels; in l2 and l1 odd and at least 3 where that fits."""
        share: float = self.p_init / 2 ** bisect_left(HALVINGS, query)
        side = max(round(math.sqrt(share * height * width)), 1 if norm == "linf" else 3)
        return min(side if norm == "linf" else side | 1, height, width)

    @torch.no_grad()
    def run(
        self, net: CountingModel, image: Tensor, label: Tensor, threat: ThreatModel, context: AttackContext
    ) -> Tensor:
        """See :meth:`Attack.run`. Cost: at most ``queries + 2`` forwards of each image, no gradient.

        An image that is wrong from the start is returned unchanged, one that stays right as its worst point
        found. A caller's loss is a goal of its own, in place of the margin: every image gets its point of
        largest loss, right or wrong.

        A generator may live on the CPU wherever the images are: its numbers are then the same for every
        device.

        Every batch reads the same sequence of random numbers: the stripes of its images that are searched,
        then the queries. In l-inf places and colors are therefore shared by all batches with equally many of
        these; in l2 and l1 signs are drawn for the images that are still right, so a verdict depends on its
        batch and on nothing else beside it.
        """
        clean, label, device = net.clean_logits(image), hard_label(label), image.device
        proposals = _PROPOSALS[threat.norm](float(threat.eps))
        query = _Query(proposals, None if context.loss is None else partial(_of_rows, context.loss, clean))
        saved = context.progress.load()
        if saved:
            x_adv, done = saved["x_adv"], int(saved["query"])
            left = _Remaining(*(saved[name] for name in _Remaining._fields))
            numbers = _Numbers.resumed(context.random.sequence(), saved["numbers"], device)
        else:
            x_adv, done = image.clone(), 0
            searched = ~fooled(clean, label) if context.loss is None else torch.ones_like(label).bool()
            rows = searched.nonzero().flatten()
            if not len(rows):
                return x_adv
            numbers = _Numbers(context.random.sequence(), int(context.random.batch[-1]) + 1, device)
            stream = numbers.narrow(context.random.batch.to(device)[rows])
            x_adv[rows], stream = proposals.start(image[rows], numbers, stream)
            active = context.active(rows)
            wrong, loss = query.evaluate(active.net, *map(active.fill, (x_adv[rows], label[rows], rows)))
            left = _Remaining(rows, stream, loss[: len(rows)], torch.zeros_like(rows, dtype=torch.bool))
            left = left.packed(active, x_adv, label, numbers, ~wrong)
        noted, (height, width) = done, image.shape[2:]
        while done < self.queries and len(left.rows):
            if done > noted:
                context.progress.save(partial(_progress, x_adv, done, left, numbers))
            # Queries whose windows are of one size; only after them does the host look at the device, often
            # at first, when most images fall.
            side, until = self.side(done, height, width, threat.norm), done + 1
            last = min(done + steps_until_packing(done, 50), self.queries)
            while until < last and self.side(until, height, width, threat.norm) == side:
                until += 1
            numbers.reserve((until - done) * proposals.numbers_per_query(image.shape[1], left.stream))
            active, window = context.active(left.rows), proposals.window(side, device)
            state, given = left.filled(active, x_adv, image, label, numbers, window)
            state = active.repeat(query, state, given, until - done)
            done, numbers.position = until, state.position
            x_adv[left.rows] = state.x_adv[: len(left.rows)]
            left = left._replace(loss=state.loss[: len(left.rows)])
            left = left.packed(active, x_adv, label, numbers, state.right)
        return threat.project(image, x_adv)


def _of_rows(loss: AttackLoss, clean: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
    """A caller's loss knows only the whole batch: rows not asked for stand at their clean logits."""
    value: Tensor = loss(clean.index_copy(0, rows, logits))[rows]
    return value


def _progress(x_adv: Tensor, query: int, left: _Remaining, numbers: _Numbers) -> dict[str, Tensor]:
    numbered = {"query": torch.tensor(query), "numbers": numbers.state()}
    return {"x_adv": x_adv, **left._asdict(), **numbered}


class _State(NamedTuple):
    """Where the search of m images stands."""

    x_adv: Tensor
    """The worst point found around each, [m, c, h, w]."""
    loss: Tensor
    """Its margin, or the caller's loss, [m]."""
    right: Tensor
    """Not yet claimed to be wrong, [m] bool."""
    position: Tensor
    """Where each stream of random numbers is read on, [streams] int64."""


class _Given(NamedTuple):
    """What the search of m images reads."""

    image: Tensor
    """Clean, [m, c, h, w]."""
    label: Tensor
    """[m] int64."""
    rows: Tensor
    """Positions in the batch, [m] int64."""
    refuted: Tensor
    """Claimed to be wrong before and found right in full precision, [m] bool: only a worse point counts."""
    stream: Tensor
    """The stream of random numbers that each image reads, [m] int64, ascending."""
    pool: Tensor
    """Random numbers, [numbers]."""
    window: Tensor
    """The size of the windows; see :meth:`_Proposals.window`."""


@dataclass(frozen=True)
class _Query:
    """A proposal for all images, kept where it is worse.

    Args:
        proposals: where candidates come from.
        loss: of logits [m, k] of the images at ``rows`` [m], [m]: then nothing but it counts, and no image
            is done before the last query. The margin when None.
    """

    proposals: _Proposals
    loss: Callable[[Tensor, Tensor], Tensor] | None

    def __call__(self, net: Forward, state: _State, given: _Given) -> _State:
        numbers = _Reader(given.pool, state.position)
        candidate = self.proposals.propose(state, given, numbers)
        wrong, loss = self.evaluate(net, candidate, given.label, given.rows)
        wins = state.right & ((wrong & ~given.refuted) | (loss > state.loss))
        return _State(
            torch.where(wins.view(-1, 1, 1, 1), candidate, state.x_adv),
            torch.where(wins, loss, state.loss),
            state.right & ~(wrong & wins),
            numbers.position,
        )

    def evaluate(self, net: Forward, candidate: Tensor, label: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the search of each image is done, and its loss, both [m]."""
        logits = net(candidate)
        if self.loss is not None:
            return torch.zeros_like(label, dtype=torch.bool), self.loss(logits, rows)
        # By argmax, as the verdict is: at a tie the true class may still be the answer.
        return fooled(logits, label), margin(logits, label)


class _Remaining(NamedTuple):
    """The m images that are still searched, between packings; fields as in ``_State`` and ``_Given``."""

    rows: Tensor
    stream: Tensor
    loss: Tensor
    refuted: Tensor

    def filled(
        self,
        active: ActiveImages,
        x_adv: Tensor,
        image: Tensor,
        label: Tensor,
        numbers: _Numbers,
        window: Tensor,
    ) -> tuple[_State, _Given]:
        """Where a block of queries begins, and what it reads; ``x_adv``, ``image``, ``label`` of the
        batch."""
        rows, stream, loss, refuted = map(active.fill, self)
        # What fills up is not searched: it must not use up random numbers.
        searched = torch.arange(len(rows), device=rows.device) < len(self.rows)
        state = _State(x_adv[rows], loss, searched, numbers.position)
        return state, _Given(image[rows], label[rows], rows, refuted, stream, numbers.padded(), window)

    def packed(
        self, active: ActiveImages, x_adv: Tensor, label: Tensor, numbers: _Numbers, right: Tensor
    ) -> _Remaining:
        """Without the images that are not ``right`` any more; ``x_adv`` and ``label`` of the batch."""
        left, right = self, right[: len(self.rows)]
        if active.model.unverified:
            fooled = active.verified(~right, x_adv[self.rows], label[self.rows])
            left = self._replace(refuted=self.refuted | (~right & ~fooled))
            right = ~fooled
        kept = right.nonzero().flatten()
        if len(kept) == len(self.rows):
            return left
        left = _Remaining(*(field[kept] for field in left))
        return left._replace(stream=numbers.narrow(left.stream)) if len(kept) else left


class _Reader:
    """Uniform numbers in one fixed order. Several streams read the same sequence, each from a position of
    its own that is kept on the device."""

    def __init__(self, pool: Tensor, position: Tensor) -> None:
        self.pool, self.position = pool, position

    def next(self, count: int) -> Tensor:
        """The next numbers of each stream, [streams, count]."""
        taken = self.pool[self.position[:, None] + torch.arange(count, device=self.pool.device)]
        self.position = self.position + count
        return taken

    def next_rows(self, stream: Tensor, among: Tensor, count: int) -> Tensor:
        """The next ``count`` numbers of each row flagged in ``among`` [m], in turn within its ``stream`` [m]
        (ascending), [m, count]; the rows not flagged use up none and get any."""
        flagged = among.to(torch.int64)
        each = torch.zeros_like(self.position).index_add(0, stream, flagged)
        before = flagged.cumsum(0) - flagged - (each.cumsum(0) - each)[stream]
        offset = self.position[stream] + before.clamp_min(0) * count
        index = offset[:, None] + torch.arange(count, device=self.pool.device)
        taken = self.pool[index.clamp_max(len(self.pool) - 1)]
        self.position = self.position + each * count
        return taken


class _Numbers(_Reader):
    """As above, drawn in advance from a generator.

    A CPU generator gives the same numbers in one draw or in many, so blocks do not change them. They have
    torch's default dtype, as in the reference.
    """

    def __init__(self, generator: torch.Generator | None, streams: int, device: torch.device) -> None:
        super().__init__(
            torch.empty(0, device=device), torch.zeros(streams, dtype=torch.int64, device=device)
        )
        self.generator, self.device, self.first = generator, device, 0

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

    def narrow(self, stream: Tensor) -> Tensor:
        """Forget the streams that no image reads; ``stream`` [m] with the others numbered without gaps."""
        read, stream = torch.unique(stream, return_inverse=True)
        self.position = self.position[read]
        return stream

    def merge(self, stream: Tensor) -> Tensor:
        """One stream of all that stand at the same place: they read the same from now on. ``stream`` [m] with
        their new numbers, which need not ascend."""
        self.position, same = torch.unique(self.position, return_inverse=True)
        merged: Tensor = same[stream]
        return merged

    def reserve(self, count: int) -> None:
        """Make sure that each stream can read ``count`` numbers. Costs a read of the device by the host."""
        low, high = (int(end) for end in torch.stack(self.position.aminmax()).tolist())
        rest = self.pool[low:]
        source = "cpu" if self.generator is None else self.generator.device
        missing = max(high - low + count - len(rest), 0)
        fresh = torch.rand(missing, generator=self.generator, device=source)
        self.pool = torch.cat([rest, fresh.to(self.device)])
        self.position, self.first = self.position - low, self.first + low

    def padded(self) -> Tensor:
        """The pool at one of few lengths (powers of four), so that few different queries are recorded."""
        return fill_up(self.pool, 4 ** max(math.ceil(math.log(len(self.pool), 4)), 6))


@dataclass(frozen=True)
class _Proposals(ABC):
    """Where a search begins and where its candidates come from, in balls of radius ``eps``."""

    eps: float

    @abstractmethod
    def numbers_per_query(self, channels: int, stream: Tensor) -> int:
        """Random numbers that a stream gives at most, where these [m] are read."""

    @abstractmethod
    def start(self, image: Tensor, numbers: _Numbers, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The first points [m, c, h, w], and the streams [m] to be read from then on."""

    @abstractmethod
    def window(self, side: int, device: torch.device) -> Tensor:
        """What tells a query the side of its windows."""

    @abstractmethod
    def propose(self, state: _State, given: _Given, numbers: _Reader) -> Tensor:
        """A candidate for each image, [m, c, h, w], inside the ball and the box."""


class _LinfProposals(_Proposals):
    """Vertical stripes at plus or minus eps, then windows of one sign per channel (algorithm 2)."""

    def numbers_per_query(self, channels: int, stream: Tensor) -> int:
        return 2 + channels

    def start(self, image: Tensor, numbers: _Numbers, stream: Tensor) -> tuple[Tensor, Tensor]:
        m, channels, _, width = image.shape
        everyone = torch.ones(m, dtype=torch.bool, device=image.device)
        numbers.reserve(int(stream.bincount().max()) * channels * width)
        drawn = numbers.next_rows(stream, everyone, channels * width)
        point = (image + self.eps * _sign(drawn).view(m, channels, 1, width)).clamp(0, 1)
        return point, numbers.merge(stream)  # nothing below needs their order

    def window(self, side: int, device: torch.device) -> Tensor:
        """The side itself, [], so that one recording serves all sizes."""
        return torch.full((), side, device=device)

    def propose(self, state: _State, given: _Given, numbers: _Reader) -> Tensor:
        side, (height, width) = given.window, given.image.shape[2:]
        drawn = numbers.next(2 + given.image.shape[1])
        top, left = ((drawn[:, i] * (n - side)).long() for i, n in enumerate((height, width)))
        row = torch.arange(height, device=drawn.device)[:, None] - top[:, None, None, None]
        column = torch.arange(width, device=drawn.device) - left[:, None, None, None]
        inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
        step = torch.where(inside, 2 * self.eps * _sign(drawn[:, 2:])[..., None, None], 0)
        # One stream is the common case: a view for every image.
        moved = state.x_adv + (step if len(drawn) == 1 else step[given.stream])
        return torch.minimum(torch.maximum(moved, given.image - self.eps), given.image + self.eps).clamp(0, 1)


class _L2Proposals(_Proposals):
    """Tiles of ``_eta``, then windows that take over the length of a second window (algorithm 3).

    The sign of a window is drawn for each image that is still right, so the numbers depend on how many are.
    """

    def numbers_per_query(self, channels: int, stream: Tensor) -> int:
        return 5 + int(stream.bincount().max()) * channels

    def start(self, image: Tensor, numbers: _Numbers, stream: Tensor) -> tuple[Tensor, Tensor]:
        m, channels, height, width = image.shape
        everyone = torch.ones(m, dtype=torch.bool, device=image.device)
        # The height names the size for both axes, as in the reference, which fails where we cut a tile off
        # at the border or (below 5 pixels) use tiles of a single one.
        side = max(height // 5, 1)
        start = max((height - 5 * side) // 2, 0)
        tiles = [(i, j) for i in range(height // side) for j in range(max(width // side, 1))]
        numbers.reserve(len(tiles) * self.numbers_per_query(channels, stream))
        eta, delta = self.window(side, image.device), torch.zeros_like(image)
        for i, j in tiles:
            turned = _turned(eta, numbers.next(1), stream)
            tile = turned * _signs(numbers, stream, everyone, channels)
            part = delta[:, :, start + i * side : start + (i + 1) * side, start + j * side :][..., :side]
            part += tile[:, :, : part.shape[2], : part.shape[3]]
        return self._inside(image, delta), stream

    def window(self, side: int, device: torch.device) -> Tensor:
        """The pattern of a window, [side, side]."""
        return _eta(side).to(device)

    def propose(self, state: _State, given: _Given, numbers: _Reader) -> Tensor:
        (m, channels), device = given.image.shape[:2], given.image.device
        drawn = numbers.next(5)
        fresh = _turned(given.window, drawn[:, 4:], given.stream)
        fresh = fresh * _signs(numbers, given.stream, state.right, channels)
        images = (
            torch.arange(m, device=device)[:, None, None, None],
            torch.arange(channels, device=device)[:, None, None],
        )
        side, size = given.window.shape[0], tuple(given.image.shape[2:])
        into = *images, *(along[given.stream] for along in _window(drawn, side, size))
        source = *images, *(along[given.stream] for along in _window(drawn[:, 2:], side, size))
        delta = state.x_adv - given.image
        both = torch.zeros_like(delta)
        # A number of the host would be copied to the device, which a graph cannot hold.
        zero, one = delta.new_zeros(()), delta.new_ones(())
        both.index_put_(into, one).index_put_(source, one)
        length = self._available(delta, delta * both)
        old = delta[into]
        fresh = fresh + old / (1e-12 + self._length(old, (2, 3)))
        delta.index_put_(source, zero)
        delta[into] = fresh / (1e-12 + self._length(fresh, (2, 3))) * length
        return self._inside(given.image, delta)

    def _length(self, delta: Tensor, over: tuple[int, ...]) -> Tensor:
        """Length over these axes, which stay with size one."""
        return delta.square().sum(dim=over, keepdim=True).sqrt()

    def _available(self, delta: Tensor, windows: Tensor) -> Tensor:
        """The length that each channel of a new window gets, [m, c, 1, 1]: what both windows have, and its
        share of what the change leaves of eps."""
        free = (self.eps**2 - self._length(delta, (1, 2, 3)) ** 2).clamp_min(0) / delta.shape[1]
        return (free + self._length(windows, (2, 3)) ** 2).sqrt()

    def _inside(self, image: Tensor, delta: Tensor) -> Tensor:
        """On the sphere, cut to the box."""
        return (image + delta / (self._length(delta, (1, 2, 3)) + 1e-12) * self.eps).clamp(0, 1)


class _L1Proposals(_L2Proposals):
    """As in l2 with steeper pyramids and lengths in l1, projected onto ball and box (Croce & Hein, arXiv
    2103.01208, section 4.3)."""

    def window(self, side: int, device: torch.device) -> Tensor:
        return _eta(side, fall=4, order=1).to(device)

    def _length(self, delta: Tensor, over: tuple[int, ...]) -> Tensor:
        return delta.abs().sum(dim=over, keepdim=True)

    def _available(self, delta: Tensor, windows: Tensor) -> Tensor:
        channels = delta.shape[1]
        free = (self.eps - self._length(delta, (1, 2, 3))).clamp_min(0) / channels
        return (free + self._length(windows, (2, 3))) * channels

    def _inside(self, image: Tensor, delta: Tensor) -> Tensor:
        # Just inside, as in the authors' code: rounding must not leave the ball.
        return (image + delta + l1_correction(image, delta, self.eps * (1 - 1e-6))).clamp(0, 1)


_PROPOSALS: dict[str, type[_Proposals]] = {"linf": _LinfProposals, "l2": _L2Proposals, "l1": _L1Proposals}


def _window(place: Tensor, side: int, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows [s, 1, side, 1] and columns [s, 1, 1, side] of the windows that numbers [s, 2] name."""
    along = torch.arange(side, device=place.device)
    top, left = ((place[:, i] * (n - side)).long() for i, n in enumerate(size))
    return (top[:, None] + along)[:, None, :, None], (left[:, None] + along)[:, None, None, :]


def _signs(numbers: _Reader, stream: Tensor, among: Tensor, channels: int) -> Tensor:
    """A sign for each channel of each image, [m, c, 1, 1]."""
    return _sign(numbers.next_rows(stream, among, channels))[..., None, None]


def _turned(eta: Tensor, turn: Tensor, stream: Tensor) -> Tensor:
    """The pattern of each image's window, [m, 1, side, side], turned by 90 degrees where its stream's
    ``turn`` [streams, 1] is above 1/2."""
    return torch.where(turn[stream, :, None, None] > 0.5, eta.T, eta)


def _eta(side: int, fall: int = 2, order: int = 2) -> Tensor:
    """Two neighboring pyramids of opposite sign, [side, side], of length one in l1 or l2 (eta)."""
    eta = torch.cat([_pyramid(side // 2, side, fall, order), -_pyramid(side - side // 2, side, fall, order)])
    return eta / _size(eta, order)


def _pyramid(height: int, width: int, fall: int, order: int) -> Tensor:
    """Falls from the center by 1/k^fall in rings, [height, width], of length one in l1 or l2."""
    row, column = torch.arange(height).view(-1, 1), torch.arange(width)
    ring = torch.maximum((row - height // 2).abs(), (column - width // 2).abs())
    pyramid = torch.zeros(height, width)
    for k in range(max(height, width) // 2 + 1):
        pyramid += torch.where(ring <= k, 1 / torch.tensor(k + 1.0) ** fall, 0)
    return pyramid / _size(pyramid, order)


def _size(delta: Tensor, order: int) -> Tensor:
    return delta.square().sum().sqrt() if order == 2 else delta.abs().sum()


def _sign(uniform: Tensor) -> Tensor:
    return (2 * uniform - 1).sign()
