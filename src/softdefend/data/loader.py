"""Batches of encoded images, decoded ahead of training by processes of their own."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from softdefend.core.errors import SettingError, one_line
from softdefend.data.encoded import Decoder, EncodedImages, RandomCrop

CHUNK = 32
"""Images that a process makes before it takes others; all views of one image, if these are more."""
AHEAD = 2
"""Chunks that each process has in work or has finished."""
BATCHES = 3
"""Batches in main memory beside those, at most. On a GPU two are on their way there; on a CPU an epoch's
last, smaller batch has memory of its own. The rest is for the chunk that is being copied."""


class Chunk(NamedTuple):
    """Images to decode: where to, positions in the table and, for random parts, seeds [views][m]."""

    slot: int
    rows: list[int]
    draws: list[list[int]]


class Decoded(NamedTuple):
    """A chunk whose images are in their slot."""

    slot: int
    size: int


class _Chunks(Dataset[Any]):
    """Decodes chunks into slots [slots, views, m, h, w, c] uint8 that all processes share, so that no image
    travels between them. What cannot be decoded comes back as the arguments of its error, since errors of
    other classes do not survive the way between processes."""

    def __init__(self, decoder: Decoder, crop: RandomCrop | None, slots: Tensor) -> None:
        self.decoder, self.crop, self.slots = decoder, crop, slots

    def __getitem__(self, chunk: Chunk) -> Decoded | tuple[str, str, str]:
        pixels = self.slots[chunk.slot].numpy()
        try:
            for i, row in enumerate(chunk.rows):
                for view, image in enumerate(self._views(row, [draws[i] for draws in chunk.draws])):
                    pixels[view, i] = image.transpose(1, 2, 0)
        except SettingError as error:
            return error.setting, str(error.given), error.accepted
        return Decoded(chunk.slot, len(chunk.rows))

    def _views(self, row: int, draws: list[int]) -> Iterator[np.ndarray[Any, Any]]:
        if self.crop is None:
            return iter([self.decoder.middle(row)])
        return self.decoder.parts(row, self.crop, draws)


def _start_method() -> BaseContext:
    """Processes are copies of one that has nothing but this module: copies of one that has threads, or a GPU,
    may hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _as_it_is(made: Any) -> Any:
    return made


class _Coming(Sampler[Chunk]):
    """The chunks of the batches that come, of ``size`` images, each in the slot that was used longest ago."""

    def __init__(self, images: EncodedImages, size: int, slots: int) -> None:
        self.images, self.size, self.slots = images, size, slots
        self.batches: Sequence[tuple[Tensor, Tensor]] = ()

    def __iter__(self) -> Iterator[Chunk]:
        slots = itertools.cycle(range(self.slots))
        for index, draws in self.batches:
            parts = zip(torch.split(index, self.size), torch.split(draws, self.size, dim=1), strict=True)
            for one, two in parts:
                yield Chunk(next(slots), self.images.rows[one].tolist(), two.tolist())


class Loader:
    """Decodes the batches of an epoch in their order, some ahead.

    In memory are at most :meth:`bound` bytes of decoded images; what is read of files is the system's cache,
    which it drops whenever memory is short.

    Args:
        images: what batches are of.
        crop: random parts of the images; their middles when None.
    """

    def __init__(self, images: EncodedImages, crop: RandomCrop | None) -> None:
        self.images, self.crop = images, crop
        self.views = 0
        """Of each image in the batches that are expected."""
        self.waited = 0.0
        """Seconds for which batches were not ready when they were asked for, since :meth:`expect`."""
        self._ready: Iterator[Any] = iter(())
        self._chunks: DataLoader[Any] | None = None
        self._slots = torch.empty(0, dtype=torch.uint8)

    def bound(self, batch: int) -> int:
        """Bytes of decoded images in memory at once, at most, in batches of a size and the expected views."""
        ahead = self.images.workers * AHEAD * max(CHUNK, self.views)
        return (ahead + BATCHES * self.views * batch) * self.images.shape[1:].numel()

    def expect(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin with the batches that come: positions [b] among the images, and draws [views, b]; [0, b]
        without random parts.

        Raises:
            SettingError: not enough shared memory for the processes.
        """
        self._ready, self.waited = iter(()), 0.0
        if not batches:
            return
        views = len(batches[0][1]) or 1
        size = min(max(CHUNK // views, 1), max(len(index) for index, _ in batches))
        if views != self.views or size > self._coming.size:
            self._start(views, size)
        self._coming.batches = batches
        assert self._chunks is not None
        self._ready = iter(self._chunks)

    def fill(self, batch: Tensor) -> None:
        """Write the next batch into a tensor in main memory, [views, b, h, w, c] uint8.

        Raises:
            SettingError: an image cannot be decoded, or a process was ended.
        """
        done = 0
        while done < batch.shape[1]:
            slot, size = self._next()
            place, decoded = batch[:, done : done + size], self._slots[slot][:, :size]
            # Not torch's copy: its threads go on spinning, on cores that are to decode.
            np.copyto(place.numpy(), decoded.numpy())
            done += size

    def _start(self, views: int, size: int) -> None:
        """Make slots for ``size`` images, and processes that know them.

        torch asks for a new chunk before it hands out a finished one, so that with the latter there is one
        more than the processes have.
        """
        # The old ones end first: memory that processes share may be short.
        self._chunks, self._slots = None, torch.empty(0, dtype=torch.uint8)
        workers, (c, h, w) = self.images.workers, self.images.shape[1:]
        slots = workers * AHEAD + 1
        self._slots = torch.empty(slots, views, size, h, w, c, dtype=torch.uint8)
        if workers:
            try:
                self._slots.share_memory_()  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                accepted = "fewer processes, or more memory that they can share (a container's --shm-size)"
                raise SettingError("data.workers", f"{workers} ({one_line(error)})", accepted) from error
        self.views, self._coming = views, _Coming(self.images, size, slots)
        self._chunks = DataLoader(
            _Chunks(self.images.decoder, self.crop, self._slots),
            batch_size=None,
            sampler=self._coming,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=_start_method() if workers else None,
        )

    def _next(self) -> Decoded:
        started = time.perf_counter()
        try:
            made = next(self._ready)
        except RuntimeError as error:  # of torch, about a process
            given = f"{self.images.workers} ({one_line(error)})"
            accepted = "fewer processes, memory for them, and __name__ == '__main__' in your own script"
            raise SettingError("data.workers", given, accepted) from error
        self.waited += time.perf_counter() - started
        if not isinstance(made, Decoded):
            raise SettingError(*made)
        return made
