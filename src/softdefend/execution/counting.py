"""The network under attack: it counts what each image costs, and answers in full precision where it
matters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.goals import fooled
from softdefend.execution.step_graphs import Fields, G, S, StepGraphs

Forward = Callable[[Tensor], Tensor]
"""Maps images [b, c, h, w] in [0, 1] to logits [b, k]."""


class Mask(NamedTuple):
    """Which values of n images may change."""

    free: Tensor
    """[n, c, h, w] bool."""
    image: Tensor
    """Clean, [n, c, h, w]."""

    def __call__(self, x_adv: Tensor, rows: Tensor | None) -> Tensor:
        """``x_adv`` [m, c, h, w] of the images at ``rows`` [m], all when None, clean where it may not change.

        Raises:
            SettingError: another number of images, of which it is not known which they are.
        """
        free, image = (each if rows is None else each[rows] for each in self)
        if len(free) != len(x_adv):
            given = f"{len(x_adv)} images of {len(free)}"
            raise SettingError("attack.mask", given, "an attack that says which images it asks about")
        return torch.where(free, x_adv, image)

    def of(self, rows: Tensor) -> Mask:
        """That of the images at ``rows``."""
        return Mask(self.free[rows], self.image[rows])


class RowsModel:
    """The network for some images (rows) of a batch, which counts what it is asked.

    Logits are float32, or float64 where the network gives that.

    Args:
        forward: images to logits.
        rows: positions [m] of the images in the batch; all when None.
        size: images of a call that is made of them all; more than m where the batch is filled up.
        microbatch: images to be computed at once without gradient; no limit when None.
        step_graphs: of the steps that :meth:`repeat` takes.
        mask: what the network is shown of the images.

    Attributes:
        forwards, gradients: of each of the images.
        unassigned: forwards and gradients of batches whose images are not known, in all.
    """

    def __init__(
        self,
        forward: Forward,
        rows: Tensor | None,
        size: int,
        microbatch: int | None,
        step_graphs: StepGraphs | None = None,
        mask: Mask | None = None,
    ) -> None:
        self.mask = mask
        self.rows, self.forwards, self.gradients, self.unassigned = rows, 0, 0, [0, 0]
        self._forward, self._size, self._microbatch = forward, size, microbatch
        self._step_graphs = step_graphs

    def __call__(self, image: Tensor) -> Tensor:
        if self.mask is not None:
            image = self.mask(image, self.rows)
        if len(image) == self._size:
            self.forwards += 1
            self.gradients += image.requires_grad
        else:
            self.unassigned[0] += len(image)
            self.unassigned[1] += len(image) * image.requires_grad
        if self._microbatch is None or len(image) <= self._microbatch or image.requires_grad:
            return _at_least_float32(self._forward(image))
        parts = torch.split(image, self._microbatch)
        return torch.cat([_at_least_float32(self._forward(part)) for part in parts])

    def add_gradients(self, count: int) -> None:
        """Count further gradients of one forward of all images."""
        self.gradients += count

    def repeat(self, step: Step[S, G], state: S, given: G, times: int) -> S:
        """``step`` applied ``times`` times, replayed from a captured graph where that is faster.

        Args:
            step: hashable; a function of this network, the state and what is given, of nothing else. See
                :mod:`softdefend.execution.step_graphs`.
            state, given: named tuples of tensors, or None, of this network's size.
            times: >= 0.
        """
        if self._step_graphs is not None and times > 0:
            # Not this object: a graph outlives it.
            twin = RowsModel(self._forward, None, self._size, self._microbatch)
            key = step, self._forward, self._microbatch
            done = self._step_graphs(key, partial(step, twin), twin, state, given, times)
            if done is not None:
                state, forwards, gradients = done
                self.forwards += forwards
                self.gradients += gradients
                return state
        for _ in range(times):
            state = step(self, state, given)
        return state


G_in = TypeVar("G_in", bound=Fields, contravariant=True)


class Step(Protocol[S, G_in]):
    """One step of a search."""

    def __call__(self, net: RowsModel, state: S, given: G_in, /) -> S:
        """The next state."""


class Counts(NamedTuple):
    """What a batch of n images has cost so far."""

    forwards: Tensor
    """Of each image, [n] int64 on the CPU."""
    gradients: Tensor
    """Of each image, [n] int64 on the CPU."""
    unassigned: tuple[int, int]
    """Forwards and gradients of calls whose images are not known, in all."""


class CountingModel:
    """The network under attack, for one batch of n images.

    Called with all n images it counts a forward of each; attacks that work on fewer ask :meth:`for_rows`. A
    call with any other number of images is counted too, but to no image.

    Args:
        forward: images [b, c, h, w] to logits [b, k], what the attack searches with.
        n: images in the batch.
        many_gradients: the same where several gradients are taken of one call; ``forward`` when None.
        exact: the network in full precision where ``forward`` is not.
        unverified: no success counts before :meth:`verified` has seen it; where ``exact`` is given, when
            None.
        clean_logits: logits [n, k] of the images as they are, if known.
        microbatch: images to be computed at once; no limit when None.
        step_graphs: of the steps of searches, which are then made on batches of few sizes.
        mask: of the images; steps are then not captured.
    """

    def __init__(
        self,
        forward: Forward,
        n: int,
        *,
        many_gradients: Forward | None = None,
        exact: Forward | None = None,
        unverified: bool | None = None,
        clean_logits: Tensor | None = None,
        microbatch: int | None = None,
        step_graphs: StepGraphs | None = None,
        mask: Mask | None = None,
    ) -> None:
        self.n, self.microbatch, self.mask = n, microbatch, mask
        self.step_graphs = None if mask is not None else step_graphs
        self.unverified = exact is not None if unverified is None else unverified
        self._forward, self._many_gradients = forward, many_gradients or forward
        self._exact, self._clean_logits = exact or forward, clean_logits
        self._views: list[RowsModel] = []
        self._parts: list[tuple[Tensor, CountingModel]] = []
        self._earlier: list[Tensor] = []
        self._whole = self.for_rows(None)

    def __call__(self, image: Tensor) -> Tensor:
        return self._whole(image)

    def for_rows(
        self, rows: Tensor | None, size: int | None = None, *, many_gradients: bool = False
    ) -> RowsModel:
        """The searching network for the images at ``rows`` [m], all n when None.

        Args:
            rows: positions in the batch.
            size: images of a call that is made of them all, where that is filled up; m when None.
            many_gradients: several gradients are taken of each call.
        """
        return self._view(self._many_gradients if many_gradients else self._forward, rows, size)

    def at(self, rows: Tensor) -> Forward:
        """The network for the images at ``rows`` [m], of attacks that need not say whose a forward is: this
        one itself, unless a mask has to know."""
        return self if self.mask is None else self.for_rows(rows)

    def exact(self, rows: Tensor | None = None) -> RowsModel:
        """The network in full precision, for the images at ``rows`` [m], all n when None."""
        return self._view(self._exact, rows, None)

    def part(self, rows: Tensor) -> CountingModel:
        """The network in full precision as one of a smaller batch, the images at ``rows`` [m]; its counts
        add to these."""
        mask = None if self.mask is None else self.mask.of(rows)
        model = CountingModel(self._exact, len(rows), microbatch=self.microbatch, mask=mask)
        self._parts.append((rows, model))
        return model

    @torch.no_grad()
    def clean_logits(self, image: Tensor) -> Tensor:
        """Logits of the images as they are [n, k], in full precision; computed at most once."""
        if self._clean_logits is None:
            self._clean_logits = self.exact()(image)
        return self._clean_logits

    @torch.no_grad()
    def verified(self, claimed: Tensor, x_adv: Tensor, label: Tensor, rows: Tensor) -> Tensor:
        """Which of the claims [m] that ``x_adv`` [m, c, h, w] fools the network hold in full precision,
        [m]. Costs a forward of those claimed and a read of the device, or nothing where successes need no
        verification. What was filled up behind the m rows is ignored.
        """
        claimed, x_adv, label = (tensor[: len(rows)] for tensor in (claimed, x_adv, label))
        if not self.unverified:
            return claimed
        which = claimed.nonzero().squeeze(1)
        if not len(which):
            return claimed
        held = fooled(self.exact(rows[which])(x_adv[which]), label[which])
        return claimed.index_copy(0, which, held)

    def counts(self) -> Counts:
        """What the batch has cost so far."""
        total, unassigned = torch.zeros(2, self.n, dtype=torch.int64), [0, 0]
        for view in self._views:
            made = torch.tensor([[view.forwards], [view.gradients]])
            if view.rows is None:
                total += made
            else:
                total.index_add_(1, view.rows.cpu(), made.expand(2, len(view.rows)))
            unassigned = [unassigned[0] + view.unassigned[0], unassigned[1] + view.unassigned[1]]
        for rows, part in self._parts:
            forwards, gradients, rest = part.counts()
            total.index_add_(1, rows.cpu(), torch.stack([forwards, gradients]))
            unassigned = [unassigned[0] + rest[0], unassigned[1] + rest[1]]
        for before in self._earlier:
            total += before
        return Counts(total[0], total[1], (unassigned[0], unassigned[1]))

    def add_counts(self, forwards: Tensor, gradients: Tensor) -> None:
        """Count what was done before this object was made, both [n] int64."""
        self._earlier.append(torch.stack([forwards, gradients]))

    def add_unassigned_gradients(self, count: int) -> None:
        """Count gradients beyond the first of a forward, of images that are not known."""
        self._whole.unassigned[1] += count

    def _view(self, forward: Forward, rows: Tensor | None, size: int | None) -> RowsModel:
        size = size or (self.n if rows is None else len(rows))
        view = RowsModel(forward, rows, size, self.microbatch, self.step_graphs, self.mask)
        self._views.append(view)
        return view


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
