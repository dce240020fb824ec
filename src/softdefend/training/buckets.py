"""Gradients of several processes, averaged while the backward pass still computes the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from softdefend.core.processes import Processes, messages_within, packed, unpack

LIMIT = 25 * 2**20
"""Bytes at which a bucket is full, as in torch's DistributedDataParallel."""


class Buckets:
    """The parameters, by the messages in which their gradients are averaged.

    A message starts once the gradients of its bucket are complete and those before it have started, so that
    all processes send the same ones in the same order. Nothing is kept from one backward pass to the next.

    Args:
        processes: of this run; alone, gradients are computed and no more.
        parameters: in the order in which the network computes with them; gradients come in the reverse one.
    """

    def __init__(self, processes: Processes, parameters: Sequence[Tensor]) -> None:
        self.processes = processes
        self.buckets = _filled(reversed(parameters))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to those that the parameters have, and take the mean of the sums over
        all processes.

        Raises:
            LostProcessError: a process has ended.
        """
        if self.processes.size == 1:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        messages = _Messages(self.processes, self.buckets, _leaves(loss))
        hooks = [
            parameter.register_post_accumulate_grad_hook(messages.arrived)  # type: ignore[no-untyped-call]
            for bucket in self.buckets
            for parameter in bucket
            if parameter.requires_grad  # a rule may freeze some for a while
        ]
        try:
            with messages_within():  # of synchronized batch normalization
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
        messages.finish()


class _Messages:
    """Those of one backward pass.

    Args:
        leaves: the parameters that the pass comes to, and others.
    """

    def __init__(
        self, processes: Processes, buckets: Sequence[Sequence[Tensor]], leaves: set[Tensor]
    ) -> None:
        self._processes, self._buckets = processes, buckets
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
            self._means.append(_Mean(self._processes, bucket))

    def finish(self) -> None:
        """Send the rest, and put the means into the gradients."""
        self._means += [_Mean(self._processes, bucket) for bucket in self._buckets[len(self._means) :]]
        # Reentrant activation checkpointing adds to a gradient more than once in a pass.
        for number in sorted(self._late):
            self._means[number].wait()
            self._means[number] = _Mean(self._processes, self._buckets[number])
        for mean in self._means:
            mean.put()


class _Mean:
    """The mean of a bucket's gradients, under way from the start; the gradients stay this process's own until
    it is put into them."""

    def __init__(self, processes: Processes, bucket: Sequence[Tensor]) -> None:
        self._gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        self._size = processes.size
        self.wait: Callable[[], None] = lambda: None
        if self._gradients:
            self._sum = packed(self._gradients)
            self.wait = processes.begin_sum_(self._sum)

    @torch.no_grad()
    def put(self) -> None:
        self.wait()
        if self._gradients:
            unpack(self._sum.div_(self._size), self._gradients)


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
