"""How an attack is run: from where its random numbers come, on how many images at once, what a kill leaves.

A direct call attacks one batch, all of it at once. An evaluation attacks the images of several batches, in
portions that fit into memory, on a network whose successes are perhaps unverified, and may be killed. The
same code serves both: what differs is in the context that the attack is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from softdefend.execution.counting import CountingModel, RowsModel, Step
from softdefend.execution.randomness import AttackRandomness
from softdefend.execution.step_graphs import G, S, captured_size, fill_up, with_fields


class SavedProgress:
    """Where a long attack saves how far it got; this one forgets everything."""

    def load(self) -> dict[str, Tensor]:
        """What was saved last, empty at the start."""
        return {}

    def save(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Save the state that ``state()`` returns; it need not be called."""


@dataclass(frozen=True)
class ActiveImages:
    """The m images of a batch that a search still works on, and the network for them.

    Where steps are captured, the tensors of a search are filled up with copies of their last rows to one of
    few sizes. The copies change nothing about the others, and are the search's to leave out of results.

    Attributes:
        model: the network for the whole batch.
        rows: positions in the batch, [m]; None for the whole batch as it is.
        place: positions among the images that the search began with, [m].
        net: the searching network for these images, filled up.
        many_gradients: several gradients are taken of each call.
    """

    model: CountingModel
    rows: Tensor | None
    place: Tensor | None
    net: RowsModel
    many_gradients: bool = False

    @classmethod
    def of(cls, model: CountingModel, rows: Tensor | None, many_gradients: bool = False) -> ActiveImages:
        """A search begins with the images at ``rows``; with the whole batch as it is when None."""
        place = None if rows is None else torch.arange(len(rows), device=rows.device)
        return cls(model, rows, place, _net(model, rows, many_gradients), many_gradients)

    def __len__(self) -> int:
        return self.model.n if self.rows is None else len(self.rows)

    def take(self, given: G) -> G:
        """The fields [n, ...] of a named tuple for these images, filled up."""
        if self.rows is None:
            return given
        return with_fields(given, (self.fill(field[self.rows]) for field in given))

    def fill(self, tensor: Tensor) -> Tensor:
        """``tensor`` [m, ...] filled up."""
        if self.rows is None or self.model.step_graphs is None:
            return tensor
        return fill_up(tensor, captured_size(len(tensor)))

    def repeat(self, step: Step[S, G], state: S, given: G, times: int) -> S:
        """``step`` applied ``times`` times; see :meth:`RowsModel.repeat`."""
        return self.net.repeat(step, state, given, times)

    def verified(self, claimed: Tensor, x_adv: Tensor, label: Tensor) -> Tensor:
        """Which claims that these images are wrong hold in full precision, [m]; see
        :meth:`CountingModel.verified`."""
        rows = torch.arange(len(self), device=claimed.device) if self.rows is None else self.rows
        return self.model.verified(claimed, x_adv, label, rows)

    def keep(self, left: Tensor, state: S, given: G) -> tuple[ActiveImages, S, G]:
        """Only the images at ``left`` [l] among these m, with state and given packed and filled up anew."""
        everyone = torch.arange(len(self), device=left.device)
        rows, place = (everyone if at is None else at for at in (self.rows, self.place))
        kept = replace(
            self,
            rows=rows[left],
            place=place[left],
            net=_net(self.model, rows[left], self.many_gradients),
        )
        return (
            kept,
            with_fields(state, (kept.fill(field[left]) for field in state)),
            with_fields(given, (kept.fill(field[left]) for field in given)),
        )


def _net(model: CountingModel, rows: Tensor | None, many_gradients: bool) -> RowsModel:
    size = None if rows is None or model.step_graphs is None else captured_size(len(rows))
    return model.for_rows(rows, size, many_gradients=many_gradients)


class AttackContext:
    """What an attack is told beside network, images, labels and threat model.

    Args:
        net: the network of this batch, the one that the attack is given.
        random: the random numbers of these images.
        loss: what the caller wants climbed in place of the attack's own loss: logits [b, k] of the whole
            batch to [b].
        progress: where to save what a killed evaluation should not do twice.
    """

    def __init__(
        self,
        net: CountingModel,
        random: AttackRandomness,
        *,
        loss: Callable[[Tensor], Tensor] | None = None,
        progress: SavedProgress | None = None,
    ) -> None:
        self.net, self.random, self.loss = net, random, loss
        self.progress = progress or SavedProgress()

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of a batch that is attacked alone; None is torch's global one."""
        return self.random.generator

    def active(self, rows: Tensor | None = None, *, many_gradients: bool = False) -> ActiveImages:
        """A search on the images at ``rows`` [m], on the whole batch when None. ``many_gradients`` may be
        taken of each call where that is said."""
        return ActiveImages.of(self.net, rows, many_gradients)

    def in_portions(self, image: Tensor, search: Callable[[ActiveImages], Tensor]) -> Tensor:
        """What ``search`` makes of all images [n, c, h, w], of as many of them at once as fit; rows that it
        filled up are left out."""
        if self.net.microbatch is None:
            return search(self.active())
        everything = torch.arange(len(image), device=image.device)
        portions = (self.active(rows) for rows in self.portions(everything))
        return torch.cat([search(active)[: len(active)] for active in portions])

    def portions(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """``tensor`` [m, ...] in portions of as many images as fit at once."""
        return torch.split(tensor, self.net.microbatch or max(len(tensor), 1))

    def searches(
        self, count: int, results: Mapping[str, Tensor], unsolved: Callable[[], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """The numbers of searches that follow each other, each with the rows of the images it is for.

        Ends with the last search, or where no image is left. After each search ``results`` and the state of
        the random numbers are saved; a resumed attack finds them written into ``results`` and goes on with
        the next.

        Args:
            count: of the searches.
            results: tensors [n, ...] that the searches change in place.
            unsolved: which images the next search is for, [n] bool.
        """
        saved = self.progress.load()
        if saved:
            for name, tensor in results.items():
                tensor.copy_(saved[name])
            self.random.load_state(saved["random"])
        for number in range(int(saved.get("searches", 0)), count):
            # Here the host reads the device: it packs the images that are left.
            rows = unsolved().nonzero().squeeze(1)
            if not len(rows):
                return
            yield number, rows
            self.progress.save(partial(self._state, results, number + 1))

    def _state(self, results: Mapping[str, Tensor], searches: int) -> dict[str, Tensor]:
        return {**results, "searches": torch.tensor(searches), "random": self.random.state()}


def steps_until_packing(done: int, most: int) -> int:
    """Steps until the batch is packed again, after ``done`` of them: the waste on images that fell is at most
    a quarter, and the host looks at the device seldom."""
    return max(1, min(most, done // 4))
