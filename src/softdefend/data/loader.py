"""Batches of encoded images, decoded ahead of training by processes of their own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from softdefend.core.errors import SettingError, one_line
from softdefend.data.encoded import Decoder, EncodedImages, RandomCrop

CHUNK = 32
"""Images that a process decodes before it takes others."""
_AHEAD = 2
"""Chunks that each process has in work or has finished."""
BATCHES = 3
"""Batches in main memory beside those: the one in training, one being copied, and one being put together."""


class Chunk(NamedTuple):
    """Images to decode: positions in the table and, for random parts, a seed for each image and view."""

    rows: list[int]
    draws: list[list[int]]


class _Chunks(Dataset[Any]):
    """Decodes chunks, [views, m, c, h, w] uint8; what cannot be decoded comes back as the arguments of its
    error, since errors of other classes do not survive the way between processes."""

    def __init__(self, decoder: Decoder, crop: RandomCrop | None) -> None:
        self.decoder, self.crop = decoder, crop

    def __getitem__(self, chunk: Chunk) -> Tensor | tuple[str, str, str]:
        decoder, crop = self.decoder, self.crop
        pixels = torch.empty(
            len(chunk.draws) or 1, len(chunk.rows), len(decoder.mode), *decoder.size, dtype=torch.uint8
        )
        try:
            for i, row in enumerate(chunk.rows):
                if crop is None:
                    pixels[0, i] = torch.from_numpy(decoder.middle(row).copy())
                for view, draws in enumerate(chunk.draws):
                    assert crop is not None
                    pixels[view, i] = torch.from_numpy(decoder.part(row, crop, draws[i]).copy())
        except SettingError as error:
            return error.setting, str(error.given), error.accepted
        return pixels


def _start_method() -> BaseContext:
    """Processes are copies of one that has nothing but this module: copies of one that has threads, or a GPU,
    may hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _as_it_is(made: Any) -> Any:
    return made


class _Coming(Sampler[Chunk]):
    """The chunks of the batches that come."""

    def __init__(self, images: EncodedImages) -> None:
        self.images = images
        self.batches: Sequence[tuple[Tensor, Tensor]] = ()

    def __iter__(self) -> Iterator[Chunk]:
        for index, draws in self.batches:
            parts = zip(torch.split(index, CHUNK), torch.split(draws, CHUNK, dim=1), strict=True)
            yield from (Chunk(self.images.rows[one].tolist(), two.tolist()) for one, two in parts)


class Loader:
    """Decodes the batches of an epoch in their order, some ahead.

    In memory are at most :meth:`bound` bytes of decoded images; what is read of files is the system's cache,
    which it drops whenever memory is short.

    Args:
        images: what batches are of.
        crop: random parts of the images; their middles when None.
        pin: put batches into memory from which a GPU copies without waiting.
    """

    def __init__(self, images: EncodedImages, crop: RandomCrop | None, *, pin: bool) -> None:
        self.images, self.pin = images, pin
        self.waited = 0.0
        """Seconds for which batches were not ready when they were asked for, since :meth:`expect`."""
        self._coming, workers = _Coming(images), images.workers
        self._chunks = DataLoader(
            _Chunks(images.decoder, crop),
            batch_size=None,
            sampler=self._coming,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=_start_method() if workers else None,
        )
        self._ready: Iterator[Any] = iter(())

    def bound(self, batch: int, views: int = 1) -> int:
        """Bytes of decoded images in memory at once, at most, in batches of a size."""
        one = views * self.images.shape[1:].numel()
        return (self.images.workers * _AHEAD * CHUNK + BATCHES * batch) * one

    def expect(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin with the batches that come: positions [b] among the images, and draws [views, b]."""
        self._ready, self.waited = iter(()), 0.0
        self._coming.batches = batches
        self._ready = iter(self._chunks)

    def next(self, size: int) -> Tensor:
        """The next batch, [views, size, c, h, w] uint8.

        Raises:
            SettingError: an image cannot be decoded, or a process was ended.
        """
        started, parts, missing = time.perf_counter(), [], size
        while missing:
            try:
                part = next(self._ready)
            except RuntimeError as error:  # of torch, about a process
                reason = one_line(error)
                accepted = "fewer processes, memory for them, and __name__ == '__main__' in your own script"
                raise SettingError("data.workers", f"{self.images.workers} ({reason})", accepted) from error
            if isinstance(part, tuple):
                raise SettingError(*part)
            parts.append(part)
            missing -= part.shape[1]
        batch = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        self.waited += time.perf_counter() - started
        return batch.pin_memory() if self.pin else batch
