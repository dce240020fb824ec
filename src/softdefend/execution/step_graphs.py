"""Steps of a search that are captured once and replayed: on a GPU their launches then cost nothing.

A *step* is a function of (state, given), both flat named tuples of tensors, to the next state. It
reads nothing else that changes, reads nothing back to the host, and changes no shape. That is what makes it
recordable as a CUDA graph, which runs on fixed addresses.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from softdefend.core.errors import SettingError, one_line

Fields = tuple[Tensor, ...]
"""What a step works on is a named tuple of tensors."""
S = TypeVar("S", bound=Fields)
G = TypeVar("G", bound=Fields)
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Turns a function that works on fixed tensors into one that does the same work again."""

SMALLEST = 16
"""Smallest batch that is captured."""
_SPACING = 64
"""Of batches beyond 128."""
_WORTHWHILE = 8
"""Steps of a kind that are taken before it is captured, the next ones included: a capture costs a few, and
a batch that shrinks leaves many sizes after fewer."""


def captured_size(count: int) -> int:
    """The batch in which ``count`` >= 1 images are computed: a power of two from 16 to 128, or a multiple
    of 64.

    Few enough sizes that a shrinking search meets each only a few times, at most an eighth of a batch above
    448 for nothing, and whole tiles for matrix units.

    >>> [captured_size(count) for count in (1, 9, 100, 129, 420)]
    [16, 16, 128, 192, 448]
    """
    if count > 2 * _SPACING:
        return -(-count // _SPACING) * _SPACING
    return max(SMALLEST, 1 << (count - 1).bit_length())


def fill_up(tensor: Tensor, count: int) -> Tensor:
    """``tensor`` [m, ...] with copies of its last row behind, [count, ...]."""
    missing = count - len(tensor)
    if missing <= 0:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


def with_fields(kind: S, tensors: Any) -> S:
    """A named tuple of the type of ``kind`` with other tensors."""
    return type(kind)(*tensors)


class Meter(Protocol):
    """What counts the forwards and gradients that a step makes of its whole batch."""

    forwards: int
    gradients: int


class _StepGraph(NamedTuple):
    state: Fields
    given: Fields
    replay: Callable[[], None]
    forwards: int
    gradients: int


class StepGraphs:
    """Captured steps, one for each step, shape and type.

    Args:
        capture: how a function on fixed tensors is captured: :class:`CudaGraphCapture`, or in tests the
            function itself.
    """

    def __init__(self, capture: Capture) -> None:
        self.enabled = True
        """Whether steps that were not captured yet are."""
        self.seconds = 0.0
        """Spent on capturing, the device's work included."""
        self._capture = capture
        self._graphs: dict[Hashable, _StepGraph] = {}
        self._asked: Counter[Hashable] = Counter()

    def release(self) -> None:
        """Give the graphs' memory back."""
        self._graphs.clear()

    def __call__(
        self, key: Hashable, step: Callable[[S, G], S], meter: Meter, state: S, given: G, times: int
    ) -> tuple[S, int, int] | None:
        """``step`` applied ``times`` times from ``state``, and the forwards and gradients that it made.

        What comes back is the caller's own memory. None where there is no graph and none is worth it yet,
        or none can be made: then the caller runs the step.

        Args:
            key: what ``step`` depends on beside shapes and types.
            step: state and given to state.
            meter: counts what ``step`` asks of the network.
            state, given: where the step begins, and what it reads.
            times: >= 1.
        """
        whole = (key, _signature(state), _signature(given))
        graph = self._graphs.get(whole)
        if graph is None:
            self._asked[whole] += times
            # Two rehearsals may need what two steps need.
            if not self.enabled or times < 2 or self._asked[whole] < _WORTHWHILE:
                return None
            graph = self._record(step, meter, state, given)
            if graph is None:
                return None
            self._graphs[whole] = graph
        for buffers, tensors in ((graph.state, state), (graph.given, given)):
            _write(buffers, tensors)
        for _ in range(times):
            graph.replay()
        ended = with_fields(state, map(_clone, graph.state))
        return ended, times * graph.forwards, times * graph.gradients

    def _record(self, step: Callable[[S, G], S], meter: Meter, state: S, given: G) -> _StepGraph | None:
        started = _now(state)
        own, read = tuple(map(_clone, state)), tuple(map(_clone, given))
        before, cost = (meter.forwards, meter.gradients), (0, 0)

        def once() -> None:
            nonlocal before, cost
            _write(own, _apart(step(with_fields(state, own), with_fields(given, read)), own))
            after = meter.forwards, meter.gradients
            before, cost = after, (after[0] - before[0], after[1] - before[1])

        try:
            replay = self._capture(once)
        except (torch.OutOfMemoryError, SettingError):
            raise
        except Exception as error:
            # A network may do anything in its forward; what cannot be captured is still evaluated.
            self.enabled = False
            reason = one_line(error)
            consequence = "steps are not captured, which is slower"
            warnings.warn(f"{consequence}: {reason}", RuntimeWarning, stacklevel=2)
            return None
        self.seconds += _now(state) - started
        return _StepGraph(own, read, replay, *cost)


class CudaGraphCapture:
    """Captures CUDA graphs that share one pool of memory: scratch, nothing in it outlives a replay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Not kept alive: the pool goes with its last graph, and must not be used again then.
        self._newest: Callable[[], torch.cuda.CUDAGraph | None] = lambda: None

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """``run`` as a graph; it runs twice before it is captured, to load and choose its kernels."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    run()
            current.wait_stream(self._stream)
            graph, newest = torch.cuda.CUDAGraph(), self._newest()
            pool = None if newest is None else newest.pool()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                    run()
            finally:
                # A capture that fails leaves torch on the capture's stream.
                torch.cuda.set_stream(current)
        self._newest = weakref.ref(graph)
        replay: Callable[[], None] = graph.replay
        return replay


def _now(tensors: Fields) -> float:
    """The clock, once the device has done what was asked of it."""
    if tensors[0].is_cuda:
        torch.cuda.synchronize(tensors[0].device)
    return time.perf_counter()


def _signature(tensors: Fields) -> tuple[Any, ...]:
    return tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _write(buffers: Fields, tensors: Fields) -> None:
    for buffer, tensor in zip(buffers, tensors, strict=True):
        if buffer is not tensor:
            if buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                raise TypeError(f"a step must keep shapes and types: {buffer.shape} became {tensor.shape}")
            buffer.copy_(tensor)


def _apart(tensors: Fields, buffers: Fields) -> Fields:
    """The same tensors, copied where they share memory with another buffer than the one they go into: that
    buffer may be written first."""
    storages = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    return tuple(
        tensor.clone() if tensor is not buffer and tensor.untyped_storage().data_ptr() in storages else tensor
        for tensor, buffer in zip(tensors, buffers, strict=True)
    )
