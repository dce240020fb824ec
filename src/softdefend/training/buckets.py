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
    counts as zero where another process has one, and has none where nobody has. Which of the two it is, a
    process reads back from its device where it lacks a gradient itself; while a graph is recorded it is as in
    the pass before.

    Args:
        processes: of this run; alone, gradients are computed and no more.
        parameters: in the order in which the network computes with them; gradients come in the reverse one.
    """

    def __init__(self, processes: Processes, parameters: Sequence[Tensor]) -> None:
        self.processes = processes
        self.buckets = _filled(reversed(parameters))
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
        # A rule may freeze some parameters for a while, alike in all processes.
        live = ([p for p in bucket if p.requires_grad] for bucket in self.buckets)
        trained = [bucket for bucket in live if bucket]
        recorded = loss.is_cuda and torch.cuda.is_current_stream_capturing()
        messages = _Messages(self.processes, trained, _leaves(loss), recorded)
        hooks = [
            parameter.register_post_accumulate_grad_hook(messages.arrived)  # type: ignore[no-untyped-call]
            for bucket in trained
            for parameter in bucket
        ]
        try:
            with messages_within():  # of synchronized batch normalization
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
        messages.finish(self._elsewhere)


class _Messages:
    """Those of one backward pass.

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
        for bucket, missing in zip(self._buckets[started:], self._missing[started:], strict=True):
            if missing:
                return
            self._means.append(self._mean(bucket))

    def finish(self, elsewhere: set[Tensor]) -> None:
        """Send the rest, and put the means into the gradients.

        Args:
            elsewhere: parameters with gradients in other processes alone; brought up to date.
        """
        self._means += [self._mean(bucket) for bucket in self._buckets[len(self._means) :]]
        # Reentrant activation checkpointing adds to a gradient more than once in a pass.
        for number in sorted(self._late):
            self._means[number].wait()
            self._means[number] = self._mean(self._buckets[number])
        for mean in self._means:
            mean.put(elsewhere)

    def _mean(self, bucket: Sequence[Tensor]) -> _Mean:
        return _Mean(self._processes, bucket, self._recorded)


class _Mean:
    """The mean of a bucket's gradients, under way from the start; the gradients stay this process's own until
    it is put into them.

    The message also counts for each parameter the processes that have a gradient; not while a graph is
    recorded.
    """

    def __init__(self, processes: Processes, bucket: Sequence[Tensor], recorded: bool) -> None:
        self._bucket, self._size, self._recorded = bucket, processes.size, recorded
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        self._sum = packed([*gradients, *([] if recorded else _counts(bucket))])
        self.wait = processes.begin_sum_(self._sum)

    @torch.no_grad()
    def put(self, elsewhere: set[Tensor]) -> None:
        """Wait for the mean, and put it into the gradients that any process has.

        Args:
            elsewhere: parameters with gradients in other processes alone; brought up to date, but not while
                a graph is recorded.
        """
        self.wait()
        lengths = [parameter.numel() for parameter in self._bucket]
        *sums, counts = torch.split(self._sum, [*lengths, len(self._sum) - sum(lengths)])
        lacking = [parameter for parameter in self._bucket if parameter.grad is None]
        if not self._recorded:
            anywhere = dict(zip(self._bucket, counts.tolist(), strict=True)) if lacking else {}
            elsewhere.difference_update(self._bucket)
            elsewhere.update(parameter for parameter in lacking if anywhere[parameter])
        for parameter, total in zip(self._bucket, sums, strict=True):
            if parameter in elsewhere and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            if parameter.grad is not None:
                parameter.grad.copy_(total.div_(self._size).view(parameter.shape))


def _counts(bucket: Sequence[Tensor]) -> list[Tensor]:
    """1 for each parameter with a gradient, else 0, made on the device: the host would wait for a copy."""
    kinds = {known: bucket[0].new_full((1,), float(known)) for known in (False, True)}
    return [kinds[parameter.grad is not None] for parameter in bucket]


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
