"""A network as an evaluation shows it to an attack: it confirms, counts for each image, knows its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from softdefend.execution.step_graphs import Fields, G, Recorder, S, filled, size

Forward = Callable[[Tensor], Tensor]
"""Maps images [b, c, h, w] in [0, 1] to logits [b, k]."""


class Journal:
    """Where a long attack notes how far it got; this one forgets everything."""

    def load(self) -> dict[str, Tensor]:
        """What was saved last, empty at the start."""
        return {}

    def save(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Note the state that ``state()`` returns; it need not be called."""


class View:
    """A forward for some images of a batch, which counts how often it is asked.

    Logits are float32, or float64 where the network gives that.

    Args:
        forward: images to logits.
        rows: positions [m] of the images in the batch; all when None.
        n: images of a call that is made of them all; more than m where a batch is filled up.
        most: images to be computed at once without gradient; no limit when None.
        recorder: of the steps that :meth:`advance` takes.
    """

    def __init__(
        self,
        forward: Forward,
        rows: Tensor | None,
        n: int,
        most: int | None,
        recorder: Recorder | None = None,
    ) -> None:
        self.rows, self.forwards, self.gradients, self.loose = rows, 0, 0, [0, 0]
        self._forward, self._n, self._most, self._recorder = forward, n, most, recorder

    def __call__(self, image: Tensor) -> Tensor:
        if len(image) == self._n:
            self.forwards += 1
            self.gradients += image.requires_grad
        else:
            self.loose[0] += len(image)
            self.loose[1] += len(image) * image.requires_grad
        if self._most is None or len(image) <= self._most or image.requires_grad:
            return _wide(self._forward(image))
        return torch.cat([_wide(self._forward(part)) for part in torch.split(image, self._most)])

    def more_gradients(self, count: int) -> None:
        """Gradients beyond the first of a forward."""
        self.gradients += count

    def advance(self, step: Step[S, G], state: S, given: G, times: int) -> S:
        """``step`` applied ``times`` times, replayed where that is faster.

        Args:
            step: hashable; a function of this forward, the state and what is given, of nothing else. See
                :mod:`softdefend.execution.step_graphs`.
            state, given: named tuples of tensors, or None, of :meth:`Oracle.fill`'s size.
            times: >= 0.
        """
        if self._recorder is not None and times > 0:
            # Not this object: a recording outlives it.
            alike = View(self._forward, None, self._n, self._most)
            key = step, self._forward, self._most
            done = self._recorder(key, partial(step, alike), alike, state, given, times)
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

    def __call__(self, forward: View, state: S, given: G_in, /) -> S:
        """The next state."""


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class Oracle:
    """The network of an evaluation, for one batch of n images.

    Args:
        forward: images [b, c, h, w] to logits [b, k], what the attack searches with.
        n: images in the batch.
        several: the same where several gradients are taken of one call; ``forward`` when None.
        exact: the network in full precision where ``forward`` is not.
        doubted: no success counts before :meth:`confirmed` has seen it; where ``exact`` is given, when None.
        clean: logits [n, k] of the images as they are, if known.
        most: images to be computed at once; no limit when None.
        recorder: of the steps of searches, which are then made on batches of few sizes; see :meth:`fill`.
    """

    def __init__(
        self,
        forward: Forward,
        n: int,
        *,
        several: Forward | None = None,
        exact: Forward | None = None,
        doubted: bool | None = None,
        clean: Tensor | None = None,
        most: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.n, self.most = n, most
        self.doubted = exact is not None if doubted is None else doubted
        self._forward, self._several = forward, several or forward
        self._exact, self._clean = exact or forward, clean
        self._recorder = recorder
        self._views: list[View] = []
        self._counts: list[Tensor] = []

    def at(self, rows: Tensor | None = None, *, several: bool = False) -> View:
        """The searching forward for the images at ``rows`` [m], in batches as :meth:`fill` makes them; for
        all n, unfilled, when None. ``several`` gradients may be taken of each call where that is said."""
        forward = self._several if several else self._forward
        if rows is None or self._recorder is None:
            return self._view(forward, rows)
        return self._view(forward, rows, size(len(rows)))

    def fill(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same tensors [m, ...] with copies of their last rows behind, to a size that steps are recorded
        in; as they are where nothing is recorded. The copies change nothing about the others, and are the
        caller's to leave out of results."""
        if self._recorder is None:
            return tensors
        return tuple(filled(tensor, size(len(tensor))) for tensor in tensors)

    def exact_at(self, rows: Tensor | None = None) -> View:
        """The forward in full precision."""
        return self._view(self._exact, rows)

    @torch.no_grad()
    def clean(self, image: Tensor) -> Tensor:
        """Logits of the images as they are [n, k], in full precision; computed at most once."""
        if self._clean is None:
            self._clean = self.exact_at()(image)
        return self._clean

    @torch.no_grad()
    def confirmed(self, claimed: Tensor, image: Tensor, label: Tensor, rows: Tensor) -> Tensor:
        """Which of the claims [m] that the network gets ``image`` [m, c, h, w] wrong hold in full precision,
        [m]. Costs a forward of those claimed and a read of the device, or nothing where no claim is doubted.
        What :meth:`fill` put behind the m rows is ignored.
        """
        claimed, image, label = (tensor[: len(rows)] for tensor in (claimed, image, label))
        if not self.doubted:
            return claimed
        which = claimed.nonzero().squeeze(1)
        if not len(which):
            return claimed
        wrong = self.exact_at(rows[which])(image[which]).argmax(dim=1) != label[which]
        return claimed.index_copy(0, which, wrong)

    def parts(self, count: int, device: torch.device) -> Iterator[Tensor]:
        """0 .. count - 1 in portions that can be computed at once."""
        yield from torch.split(torch.arange(count, device=device), self.most or max(count, 1))

    def counts(self) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Forwards and gradients of each image so far, both [n] int64 on the CPU, and those of batches whose
        images are not known, in all."""
        total = torch.zeros(2, self.n, dtype=torch.int64)
        loose = [0, 0]
        for view in self._views:
            made = torch.tensor([[view.forwards], [view.gradients]])
            if view.rows is None:
                total += made
            else:
                total.index_add_(1, view.rows.cpu(), made.expand(2, len(view.rows)))
            loose = [loose[0] + view.loose[0], loose[1] + view.loose[1]]
        for before in self._counts:
            total += before
        return total[0], total[1], (loose[0], loose[1])

    def add_counts(self, forwards: Tensor, gradients: Tensor) -> None:
        """Count what was done before this object was made, both [n] int64."""
        self._counts.append(torch.stack([forwards, gradients]))

    def _view(self, forward: Forward, rows: Tensor | None, filled_to: int | None = None) -> View:
        n = filled_to or (self.n if rows is None else len(rows))
        view = View(forward, rows, n, self.most, self._recorder)
        self._views.append(view)
        return view


def block(done: int, most: int) -> int:
    """Steps until the batch is packed again, after ``done`` of them: the waste on images that fell is at most
    a quarter, and the host looks at the device seldom."""
    return max(1, min(most, done // 4))
