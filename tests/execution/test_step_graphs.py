"""Recorded steps against the same steps taken one by one; a recording here runs its function again on the
same tensors, as a CUDA graph does."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from softdefend.execution.counting import Oracle
from softdefend.execution.step_graphs import Recorder, filled, size


def again(run):
    """A tape that rehearses twice and hands the function itself back."""
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


def step(forward, state, given):
    """Outputs that are inputs of another place, and one that is what was given."""
    now = forward(state.now + given.push)
    return State(torch.maximum(now, given.floor), state.now, state.count + 1)


def swap(forward, state, given):
    return State(state.before, state.now, state.count)


def rest(forward, state, given):
    return State(given.floor, state.before.view(-1).view_as(state.before), state.count)


def start(m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = State(
        torch.randn(m, 4, generator=generator), torch.zeros(m, 4), torch.zeros(m, dtype=torch.int64)
    )
    return state, Given(torch.randn(m, 4, generator=generator), torch.full((m, 4), -1.0))


def seen(recorder, m, net=torch.sin):
    oracle = Oracle(net, m, recorder=recorder)
    return oracle, oracle.at(torch.arange(m))


@pytest.mark.parametrize("function", [step, swap, rest])
def test_a_recording_takes_the_same_steps(function):
    recorder = Recorder(again)
    for seed in range(3):
        state, given = start(16, seed)
        kept = [t.clone() for t in (*state, *given)]
        oracle, view = seen(recorder, 16)
        alone = Oracle(torch.sin, 16).at(torch.arange(16))
        for times in (9, 1, 5):  # one step alone is replayed too, once there is a recording
            found, wanted = view.advance(function, state, given, times), state
            for _ in range(times):
                wanted = function(alone, wanted, given)
            assert type(found) is State
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one, other)
        assert oracle.counts()[0].tolist() == [alone.forwards] * 16
        # What was passed in is left alone.
        assert all(torch.equal(a, b) for a, b in zip((*state, *given), kept, strict=True))
    assert len(recorder._recordings) == 1


def test_results_do_not_change_with_the_next_replay():
    recorder = Recorder(again)
    _, view = seen(recorder, 16)
    first = view.advance(step, *start(16, 0), 9)
    kept = [t.clone() for t in first]
    view.advance(step, *start(16, 1), 9)
    assert len(recorder._recordings) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_one_recording_for_each_step_shape_and_type():
    recorder = Recorder(again)
    for m in (16, 32, 16):
        seen(recorder, m)[1].advance(step, *start(m), 8)
    assert len(recorder._recordings) == 2
    state, given = start(16)
    wide = State(state.now.double(), state.before.double(), state.count)
    seen(recorder, 16)[1].advance(step, wide, Given(given.push.double(), given.floor.double()), 8)
    seen(recorder, 16)[1].advance(swap, state, given, 8)
    assert len(recorder._recordings) == 4
    recorder.forget()
    assert not recorder._recordings


def test_gradients_are_counted_where_they_are_replayed():
    def slope(forward, state, given):
        image = state.now.detach().requires_grad_(True)
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(forward(image).sum(), image)
        return State(forward(grad), state.before, state.count)

    recorder = Recorder(again)
    oracle, view = seen(recorder, 16)
    view.advance(slope, *start(16), 10)
    assert recorder._recordings
    forwards, gradients, loose = oracle.counts()
    assert (forwards.tolist(), gradients.tolist(), loose) == ([20] * 16, [10] * 16, (0, 0))


def test_a_few_steps_are_not_worth_a_recording():
    recorder = Recorder(again)
    oracle, view = seen(recorder, 16)
    for done in range(1, 30):
        view.advance(step, *start(16), 1)
        assert not recorder._recordings
        assert oracle.counts()[0].tolist() == [done] * 16
    for rounds, there in ((1, 0), (2, 0), (3, 1)):
        view.advance(swap, *start(16), 3)
        assert len(recorder._recordings) == there, rounds


def test_what_cannot_be_recorded_runs_as_it_is():
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    recorder = Recorder(refuse)
    state, given = start(16)
    with pytest.warns(RuntimeWarning, match="not captured, which is slower: operation not permitted"):
        found = seen(recorder, 16)[1].advance(step, state, given, 9)
    seen(recorder, 32)[1].advance(step, *start(32), 9)  # says nothing more
    wanted = Oracle(torch.sin, 16).at(torch.arange(16)).advance(step, state, given, 9)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_out_of_memory_is_passed_on():
    def refuse(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    recorder = Recorder(refuse)
    with pytest.raises(torch.OutOfMemoryError):
        seen(recorder, 16)[1].advance(step, *start(16), 9)
    assert recorder.enabled


def test_a_step_that_changes_a_type_is_not_recorded():
    recorder = Recorder(again)
    state, given = start(16)
    narrow = State(state.now.half(), state.before, state.count)
    with pytest.warns(RuntimeWarning, match="keep shapes and types"):
        seen(recorder, 16)[1].advance(step, narrow, given, 9)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 100, 128, 129, 420, 1000])
def test_batches_are_filled_with_copies_of_the_last_row(count):
    large = size(count)
    assert large >= count
    assert large in (16, 32, 64, 128) or (large % 64 == 0 and large - count < 64)
    tensor = torch.arange(count)
    full = filled(tensor, large)
    assert full.tolist() == [*range(count), *[count - 1] * (large - count)]
    assert size(large) == large
    oracle = Oracle(torch.sin, count, recorder=Recorder(again))
    assert torch.equal(oracle.fill(tensor)[0], full)
    assert Oracle(torch.sin, count).fill(tensor)[0] is tensor


def test_a_filled_batch_counts_its_own_rows_only():
    net = nn.Flatten()
    oracle = Oracle(net, 5, recorder=Recorder(again))
    rows = torch.tensor([1, 3, 4])
    image = oracle.fill(torch.zeros(3, 1, 1, 2))[0]
    oracle.at(rows)(image)
    assert oracle.counts()[0].tolist() == [0, 1, 0, 1, 1]
    assert oracle.counts()[2] == (0, 0)
