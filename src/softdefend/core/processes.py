"""The processes that train or evaluate together, and what they tell each other.

Each holds the whole network, and an equal share of every batch. Alone, nothing here does anything: a run of
one process computes as though there were no others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from softdefend.core.errors import LostProcessError, SettingError

T = TypeVar("T")
_LOST = "another process of this run has ended, or does not answer"


class Processes:
    """A group of processes, of which this is one.

    Every process has to make the same calls in the same order. Sums are the same bits in all of them.

    Args:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of ``rows`` [b, ...] of a batch, [b / size, ...]: neighbors, in rank order.
        Where they cannot be shared evenly, shares differ by one row."""
        if self.size == 1:
            return rows
        return rows[len(rows) * self.rank // self.size : len(rows) * (self.rank + 1) // self.size]

    def deal(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items, of which each process has every ``size``-th."""
        return items if self.size == 1 else items[self.rank :: self.size]

    def collect(self, items: Sequence[T], count: int) -> list[T]:
        """All ``count`` items in order, from those that were made of what :meth:`deal` gave."""
        everyone = self.tell(list(items))
        return [everyone[number % self.size][number // self.size] for number in range(count)]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in a new tensor; without gradient."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        with _talking():
            dist.all_reduce(total)
        return total

    def begin_sum_(self, tensor: Tensor) -> Callable[[], None]:
        """Start to put the sum over all processes into ``tensor``; what is returned waits for it, on a GPU by
        having the current stream wait."""
        if self.size == 1:
            return lambda: None
        with _talking():
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with _talking():
                work.wait()

        return wait

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, in a new tensor; without gradient."""
        return tensor if self.size == 1 else self.sum(tensor) / self.size

    @torch.no_grad()
    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all processes into each tensor, by one message for each type."""
        if self.size == 1:
            return
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == kind]
            unpack(self.mean(packed(alike)), alike)

    @torch.no_grad()
    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's values into each tensor."""
        if self.size == 1:
            return
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == kind]
            message = packed(alike)
            with _talking():
                dist.broadcast(message, 0)
            unpack(message, alike)

    @torch.no_grad()
    def gather(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of all processes, [b, ...] each, from those that :meth:`own` gives, by one message."""
        if self.size == 1:
            return rows
        # A copy in any case: what is contiguous may still have strides that no view of bytes allows.
        copies = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in rows]
        parts = [copy.view(len(copy), -1).view(torch.uint8) for copy in copies]
        message = torch.cat(parts, dim=1)
        everyone = message.new_empty(self.size, *message.shape)
        with _talking():
            dist.all_gather(list(everyone.unbind()), message)
        columns = torch.split(everyone.flatten(0, 1), [part.shape[1] for part in parts], dim=1)
        return tuple(
            column.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
            for column, tensor in zip(columns, rows, strict=True)
        )

    def tell(self, value: T) -> list[T]:
        """What every process has as its ``value``, in rank order; plain values and tensors on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _talking():
            dist.all_gather_object(values, value)
        return cast(list[T], values)

    def wait(self) -> None:
        """Return once every process has come here."""
        self.tell(None)

    def from_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the first process, which alone calls it.

        Raises:
            SettingError: in every process, where it was raised there.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None]
        if self.first:
            try:
                told = [(work(), None)]
            except SettingError as error:
                told = [(None, error)]
        with _talking():
            dist.broadcast_object_list(told, 0)
        value, refusal = told[0]
        if refusal is not None:
            raise refusal
        return cast(T, value)

    def agree(self, setting: str, value: object, accepted: str) -> None:
        """Check that all processes have the same ``value``.

        Raises:
            SettingError: in every process, where one has another.
        """
        everyone = self.tell(value)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                given = f"{other} in process {rank}, {everyone[0]} in process 0"
                raise SettingError(setting, given, accepted)


ALONE = Processes()
"""One process by itself."""


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """A message to all processes.

    Raises:
        LostProcessError: one of them has ended, or does not answer.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostProcessError(_LOST) from error


@contextlib.contextmanager
def messages_within() -> Iterator[None]:
    """Work that may send messages of its own, as a compiled network does.

    Raises:
        LostProcessError: a message failed, for one of the other processes has ended or does not answer.
    """
    try:
        yield
    except LostProcessError:
        raise
    except RuntimeError as error:
        # NCCL's errors have a type of their own, gloo's only the name of its source files.
        if isinstance(error, dist.DistError) or "gloo/" in str(error):
            raise LostProcessError(_LOST) from error
        raise


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The numbers of tensors of one type, in one message."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unpack(message: Tensor, tensors: Sequence[Tensor]) -> None:
    """Put the numbers of :func:`packed` tensors into tensors of the same shapes."""
    parts = torch.split(message, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
