"""What the context gives an attack, against plain loops: portions, packing, searches that are killed."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from softdefend.execution.context import AttackContext, SavedProgress
from softdefend.execution.counting import CountingModel
from softdefend.execution.randomness import AttackRandomness, CallerRandomness, SeededRandomness
from softdefend.execution.step_graphs import StepGraphs
from tiny import Killed


def context(n: int, random: AttackRandomness | None = None, progress: SavedProgress | None = None, **options):
    model = CountingModel(lambda image: image.flatten(1), n, **options)
    return AttackContext(model, random or CallerRandomness(None, n), progress=progress)


class State(NamedTuple):
    value: Tensor
    name: Tensor


class Given(NamedTuple):
    number: Tensor


@pytest.mark.parametrize("microbatch", [None, 1, 4, 10, 99])
def test_portions_cover_every_image_once(microbatch):
    image = torch.arange(10.0).view(10, 1, 1, 1)
    sizes = []

    def search(active):
        sizes.append(len(active))
        return active.take(Given(image)).number * 2

    assert torch.equal(context(10, microbatch=microbatch).in_portions(image, search), image * 2)
    assert sum(sizes) == 10
    assert max(sizes) <= (microbatch or 10)


def test_a_whole_batch_is_taken_as_it_is():
    """A direct call in training copies nothing."""
    given, active = Given(torch.arange(5)), context(5).active()
    assert active.take(given) is given
    assert active.fill(given.number) is given.number
    assert active.rows is None


@pytest.mark.parametrize("graphs", [None, StepGraphs(lambda run: run)], ids=["plain", "filled"])
def test_packed_images_keep_their_positions_and_their_values(graphs):
    """Packed three times, against a list of what is left."""
    rows = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19])
    active = context(20, step_graphs=graphs).active(rows)
    given = active.take(Given(torch.arange(20) * 10))
    state = State(active.fill(torch.arange(8.0)), active.fill(torch.arange(8)))
    alone = list(range(8))
    for left in ([0, 1, 3, 4, 6, 7], [1, 2, 5], [0, 2]):
        active, state, given = active.keep(torch.tensor(left), state, given)
        alone = [alone[at] for at in left]
        m = len(alone)
        assert len(active) == m
        assert len(state.value) == len(given.number) == (m if graphs is None else 16)
        assert active.rows is not None
        assert active.place is not None
        assert active.place.tolist() == alone
        assert active.rows.tolist() == rows[alone].tolist()
        assert state.value[:m].tolist() == state.name[:m].tolist() == alone
        assert given.number[:m].tolist() == [10 * row for row in rows[alone].tolist()]
        active.net(torch.zeros(len(state.value), 1, 1, 1))
    counts = active.model.counts()
    assert [int(counts.forwards[row]) for row in rows] == [1, 3, 0, 2, 1, 0, 1, 3]
    assert int(counts.forwards.sum()) == 11
    assert counts.unassigned == (0, 0)


class Kept(SavedProgress):
    """Keeps copies, and kills after so many saves."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.left = 0

    def load(self):
        return self.state

    def save(self, state):
        self.state = {name: tensor.clone() for name, tensor in state().items()}
        self.left -= 1
        if self.left == 0:
            raise Killed


def drawn(progress: Kept) -> Tensor:
    """The sum of each image's draws in up to nine searches; a draw above 0.6 solves an image."""
    random = SeededRandomness([torch.arange(5), torch.arange(5, 12)], 3, "a")
    told, total, solved = context(12, random, progress), torch.zeros(12), torch.zeros(12)
    for number, rows in told.searches(9, {"total": total, "solved": solved}, lambda: solved == 0):
        noise = random.batch_noise(torch.zeros(len(rows), 1), rows, normal=False)[:, 0]
        total[rows] += noise + number
        solved[rows] = (noise > 0.6).float()
    return total


def test_killed_after_every_search_it_ends_as_if_it_had_not_been():
    wanted, progress, kills = drawn(Kept()), Kept(), 0
    while True:
        progress.left = 1
        try:
            found = drawn(progress)
            break
        except Killed:
            kills += 1
    assert torch.equal(found, wanted)
    assert kills > 2
    assert int(progress.state["searches"]) == kills


def test_a_batch_by_itself_has_numbers_of_its_own():
    index = [torch.tensor([4, 9]), torch.tensor([0, 1, 2])]
    parts = list(SeededRandomness(index, 7, "a", first=3).batches(torch.device("cpu")))
    assert [rows.tolist() for rows, _ in parts] == [[0, 1], [2, 3, 4]]
    own = [torch.rand(4, generator=random.generator) for _, random in parts]
    assert not torch.equal(*own)
    # The second batch is the first of a later group: where a group begins decides nothing.
    ((_, later),) = SeededRandomness(index[1:], 7, "a", first=4).batches(torch.device("cpu"))
    assert torch.equal(torch.rand(4, generator=later.generator), own[1])
