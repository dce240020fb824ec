"""Gradients of several processes, averaged while the backward pass still computes the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from softdefend.core.processes import Processes, messages_within, packed

LIMIT = 25 * 2**20
"""Bytes at which a bucket is full, as in torch's DistributedDataParallel."""


class Buckets:
    """The parameters, by the messages in which their gradients are averaged.

    A message starts once the gradients of its bucket are complete and those before it have started. All
    processes send the same ones in the same order, whatever has a gradient where: a parameter without one
    counts as zero where another process has one, and has none where nobody has. Buckets that nobody had a
    gradient for in the first pass cost no message, until a process says in the last message of a pass that it
    has one.

    A process reads such a word back from its device only where it lacks a gradient itself, and never while a
    graph is recorded: what has a gradient is then as in the pass before.

    Args:
        processes: of this run; alone, gradients are computed and no more.
        parameters: in the order in which the network computes with them; gradients come in the reverse one.
    """

    def __init__(self, processes: Processes, parameters: Sequence[Tensor]) -> None:
        self.processes = processes
        self.buckets = _filled(reversed(parameters))
        self._idle: list[int] | None = None
        """Numbers of the buckets without a message, the same in all processes."""
        self._elsewhere: set[Tensor] = set()
        """Parameters that in the pass before had a gradient in other processes alone."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to those that the parameters have, and take the mean of the sums over
        all processes.

        Raises:
            LostProcessError: a process has ended.
        """
        if self.processes.size == 1:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        recorded = loss.is_cuda and torch.cuda.is_current_stream_capturing()
        leaves = _leaves(loss)
        idle = self._without_message(leaves, recorded)
        sent = self._trained(number for number in range(len(self.buckets)) if number not in idle)
        if not sent:
            idle.clear()
            sent = self._trained(range(len(self.buckets)))
        messages = _Messages(self.processes, sent, leaves, recorded)
        hooks = [
            parameter.register_post_accumulate_grad_hook(messages.arrived)  # type: ignore[no-untyped-call]
            for bucket in sent
            for parameter in bucket
        ]
        try:
            with messages_within():  # of synchronized batch normalization
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
        woken = messages.finish(self._elsewhere, [self.buckets[number] for number in idle])
        numbers = [number for number, wakes in zip(idle, woken, strict=False) if wakes]
        for bucket in self._trained(numbers):
            _Mean(self.processes, bucket, recorded).put(self._elsewhere)
        idle[:] = [number for number in idle if number not in numbers]

    def _trained(self, numbers: Iterable[int]) -> list[list[Tensor]]:
        """Of these buckets what is trained, alike in all processes: a rule may freeze some for a while."""
        live = ([p for p in self.buckets[number] if p.requires_grad] for number in numbers)
        return [bucket for bucket in live if bucket]

    def _without_message(self, leaves: set[Tensor], recorded: bool) -> list[int]:
        """Numbers of buckets; in the first pass those that it comes to in no process."""
        if self._idle is not None:
            return self._idle
        wanted = {
            number
            for number, bucket in enumerate(self.buckets)
            if any(parameter in leaves or parameter.grad is not None for parameter in bucket)
        }
        anywhere = set().union(*([wanted] if recorded else self.processes.tell(wanted)))
        idle = [number for number in range(len(self.buckets)) if anywhere and number not in anywhere]
        if not recorded:
            self._idle = idle
        return idle


class _Messages:
    """Those of one backward pass. The last one starts after it.

    Args:
        leaves: the parameters that the pass comes to, and others.
        recorded: whether a CUDA graph is recorded.
    """

    def __init__(
        self,
        processes: Processes,
        buckets: Sequence[Sequence[Tensor]],
        leaves: set[Tensor],
        recorded: bool,
    ) -> None:
        self._processes, self._buckets, self._recorded = processes, buckets, recorded
        self._missing = [leaves.intersection(bucket) for bucket in buckets]
        self._number = {parameter: number for number, bucket in enumerate(buckets) for parameter in bucket}
        self._means: list[_Mean] = []
        self._late: set[int] = set()

    def arrived(self, parameter: Tensor) -> None:
        """Take note of a gradient, and start what is complete."""
        number, started = self._number[parameter], len(self._means)
        if number < started:
            self._late.add(number)
        self._missing[number].discard(parameter)
        for bucket, missing in zip(self._buckets[started:-1], self._missing[started:-1], strict=True):
            if missing:
                return
            self._means.append(self._mean(bucket))

    def finish(self, elsewhere: set[Tensor], idle: Sequence[Sequence[Tensor]]) -> list[bool]:
        """Send the rest, and put the means into the gradients.

        Args:
            elsewhere: parameters with gradients in other processes alone; brought up to date.
            idle: buckets without a message.

        Returns:
            For each of these whether some process has a gradient for it.
        """
        for bucket in self._buckets[len(self._means) : -1]:
            self._means.append(self._mean(bucket))
        words = [any(parameter.grad is not None for parameter in bucket) for bucket in idle]
        self._means += [self._mean(bucket, words) for bucket in self._buckets[-1:]]
        # Reentrant activation checkpointing adds to a gradient more than once in a pass.
        for number in sorted(self._late):
            self._means[number].wait()
            self._means[number] = self._mean(self._buckets[number])
        for mean in self._means:
            mean.put(elsewhere)
        return self._means[-1].further() if idle else []

    def _mean(self, bucket: Sequence[Tensor], further: Sequence[bool] = ()) -> _Mean:
        return _Mean(self._processes, bucket, self._recorded, further)


class _Mean:
    """The mean of a bucket's gradients, under way from the start; the gradients stay this process's own until
    it is put into them.

    The message also counts the processes that have a gradient, for each parameter, and for which each of the
    ``further`` words is true; not while a graph is recorded.
    """

    def __init__(
        self, processes: Processes, bucket: Sequence[Tensor], recorded: bool, further: Sequence[bool] = ()
    ) -> None:
        self._bucket, self._size, self._recorded = bucket, processes.size, recorded
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        words = [] if recorded else [*(p.grad is not None for p in bucket), *further]
        self._words = len(words)
        self._sum = packed([*grads, *_numbers(words, grads[0])])
        self.wait = processes.begin_sum_(self._sum)

    @torch.no_grad()
    def put(self, elsewhere: set[Tensor]) -> None:
        """Wait for the mean, and put it into the gradients that any process has.

        Args:
            elsewhere: parameters with gradients in other processes alone; brought up to date, but not while
                a graph is recorded.
        """
        self.wait()
        *sums, counts = torch.split(self._sum, [*(p.numel() for p in self._bucket), self._words])
        lacking = [p for p in self._bucket if p.grad is None]
        if lacking and not self._recorded:
            anywhere = dict(zip(self._bucket, counts.tolist(), strict=False))
            elsewhere.difference_update(self._bucket)
            elsewhere.update(p for p in lacking if anywhere[p])
        for parameter, total in zip(self._bucket, sums, strict=True):
            if parameter in elsewhere and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            if parameter.grad is not None:
                parameter.grad.copy_(total.div_(self._size).view(parameter.shape))

    def further(self) -> list[bool]:
        """For each of the further words whether it is true in some process, once the mean has come; nothing
        while a graph is recorded."""
        words = self._sum[len(self._sum) - self._words :][len(self._bucket) :]
        return [count > 0 for count in words.tolist()] if self._words else []


def _numbers(words: Sequence[bool], like: Tensor) -> list[Tensor]:
    """Ones and zeros that need no copy from the host."""
    if all(words):
        return [like.new_ones(len(words))]
    one, zero = like.new_ones(1), like.new_zeros(1)
    return [one if word else zero for word in words]


def _filled(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Buckets of one type each, in the order given."""
    buckets: list[list[Tensor]] = []
    size = LIMIT
    for parameter in parameters:
        if size >= LIMIT or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets


def _leaves(loss: Tensor) -> set[Tensor]:
    """What the gradient of ``loss`` goes to: a bucket does not wait for parameters without one.

    No node is kept: on a GPU one that outlives its pass belongs to the wrong stream when a step is captured.
    """
    found: set[Tensor] = set()
    todo = [loss.grad_fn]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node is None:
            continue
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found.add(leaf)
        new = {parent for parent, _ in node.next_functions} - seen
        seen |= new
        todo += new
    return found
