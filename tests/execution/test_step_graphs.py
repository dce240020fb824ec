"""Captured steps against the same steps taken one by one; a capture here runs its function again on the
same tensors, as a CUDA graph does."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from softdefend.execution.context import AttackContext
from softdefend.execution.counting import CountingModel
from softdefend.execution.randomness import CallerRandomness
from softdefend.execution.step_graphs import StepGraphs, captured_size, fill_up


def again(run):
    """A capture that rehearses twice and hands the function itself back."""
    run()
    run()
    return run


class State(NamedTuple):
    now: Tensor
    before: Tensor
    count: Tensor


class Given(NamedTuple):
    push: Tensor
    floor: Tensor


def step(net, state, given):
    """Outputs that are inputs of another place, and one that is what was given."""
    now = net(state.now + given.push)
    return State(torch.maximum(now, given.floor), state.now, state.count + 1)


def swap(net, state, given):
    return State(state.before, state.now, state.count)


def rest(net, state, given):
    return State(given.floor, state.before.view(-1).view_as(state.before), state.count)


def start(m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = State(
        torch.randn(m, 4, generator=generator), torch.zeros(m, 4), torch.zeros(m, dtype=torch.int64)
    )
    return state, Given(torch.randn(m, 4, generator=generator), torch.full((m, 4), -1.0))


def seen(graphs, m, net=torch.sin):
    model = CountingModel(net, m, step_graphs=graphs)
    return model, model.for_rows(torch.arange(m))


def active(model, rows):
    return AttackContext(model, CallerRandomness(None, model.n)).active(rows)


@pytest.mark.parametrize("function", [step, swap, rest])
def test_a_captured_step_is_the_same_step(function):
    graphs = StepGraphs(again)
    for seed in range(3):
        state, given = start(16, seed)
        kept = [t.clone() for t in (*state, *given)]
        model, view = seen(graphs, 16)
        alone = CountingModel(torch.sin, 16).for_rows(torch.arange(16))
        for times in (9, 1, 5):  # one step alone is replayed too, once there is a graph
            found, wanted = view.repeat(function, state, given, times), state
            for _ in range(times):
                wanted = function(alone, wanted, given)
            assert type(found) is State
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one, other)
        assert model.counts()[0].tolist() == [alone.forwards] * 16
        # What was passed in is left alone.
        assert all(torch.equal(a, b) for a, b in zip((*state, *given), kept, strict=True))
    assert len(graphs._graphs) == 1


def test_results_do_not_change_with_the_next_replay():
    graphs = StepGraphs(again)
    _, view = seen(graphs, 16)
    first = view.repeat(step, *start(16, 0), 9)
    kept = [t.clone() for t in first]
    view.repeat(step, *start(16, 1), 9)
    assert len(graphs._graphs) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_one_graph_for_each_step_shape_and_type():
    graphs = StepGraphs(again)
    for m in (16, 32, 16):
        seen(graphs, m)[1].repeat(step, *start(m), 8)
    assert len(graphs._graphs) == 2
    state, given = start(16)
    wide = State(state.now.double(), state.before.double(), state.count)
    seen(graphs, 16)[1].repeat(step, wide, Given(given.push.double(), given.floor.double()), 8)
    seen(graphs, 16)[1].repeat(swap, state, given, 8)
    assert len(graphs._graphs) == 4
    graphs.release()
    assert not graphs._graphs


def test_gradients_are_counted_where_they_are_replayed():
    def slope(net, state, given):
        image = state.now.detach().requires_grad_(True)
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(net(image).sum(), image)
        return State(net(grad), state.before, state.count)

    graphs = StepGraphs(again)
    model, view = seen(graphs, 16)
    view.repeat(slope, *start(16), 10)
    assert graphs._graphs
    forwards, gradients, unassigned = model.counts()
    assert (forwards.tolist(), gradients.tolist(), unassigned) == ([20] * 16, [10] * 16, (0, 0))


def test_a_few_steps_are_not_worth_a_capture():
    graphs = StepGraphs(again)
    model, view = seen(graphs, 16)
    for done in range(1, 30):
        view.repeat(step, *start(16), 1)
        assert not graphs._graphs
        assert model.counts()[0].tolist() == [done] * 16
    for rounds, there in ((1, 0), (2, 0), (3, 1)):
        view.repeat(swap, *start(16), 3)
        assert len(graphs._graphs) == there, rounds


def test_what_cannot_be_captured_runs_as_it_is():
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphs = StepGraphs(refuse)
    state, given = start(16)
    with pytest.warns(RuntimeWarning, match="not captured, which is slower: operation not permitted"):
        found = seen(graphs, 16)[1].repeat(step, state, given, 9)
    seen(graphs, 32)[1].repeat(step, *start(32), 9)  # says nothing more
    wanted = CountingModel(torch.sin, 16).for_rows(torch.arange(16)).repeat(step, state, given, 9)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_out_of_memory_is_passed_on():
    def refuse(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = StepGraphs(refuse)
    with pytest.raises(torch.OutOfMemoryError):
        seen(graphs, 16)[1].repeat(step, *start(16), 9)
    assert graphs.enabled


def test_a_step_that_changes_a_type_is_not_captured():
    graphs = StepGraphs(again)
    state, given = start(16)
    narrow = State(state.now.half(), state.before, state.count)
    with pytest.warns(RuntimeWarning, match="keep shapes and types"):
        seen(graphs, 16)[1].repeat(step, narrow, given, 9)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 100, 128, 129, 420, 1000])
def test_batches_are_filled_with_copies_of_the_last_row(count):
    large = captured_size(count)
    assert large >= count
    assert large in (16, 32, 64, 128) or (large % 64 == 0 and large - count < 64)
    tensor = torch.arange(count)
    full = fill_up(tensor, large)
    assert full.tolist() == [*range(count), *[count - 1] * (large - count)]
    assert captured_size(large) == large
    rows, filled = torch.arange(count), CountingModel(torch.sin, count, step_graphs=StepGraphs(again))
    assert torch.equal(active(filled, rows).fill(tensor), full)
    assert active(CountingModel(torch.sin, count), rows).fill(tensor) is tensor


def test_a_filled_batch_counts_its_own_rows_only():
    net = nn.Flatten()
    model = CountingModel(net, 5, step_graphs=StepGraphs(again))
    some = active(model, torch.tensor([1, 3, 4]))
    some.net(some.fill(torch.zeros(3, 1, 1, 2)))
    assert model.counts().forwards.tolist() == [0, 1, 0, 1, 1]
    assert model.counts().unassigned == (0, 0)
