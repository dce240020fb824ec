"""Copies of batches from main memory to a GPU."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

BUFFERS = 2
"""Pinned tensors, used in turn."""


class Uploader:
    """Brings tensors to a GPU through pinned memory, which it copies while the host goes on.

    A buffer is written again when its copy has ended, so the host is two copies ahead of the device at most.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __call__(
        self, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[Tensor], object]
    ) -> Tensor:
        """What ``fill`` writes into a tensor of pinned memory, on the device; the copy may not have ended."""
        buffer = self._free()
        size = math.prod(shape) * dtype.itemsize
        if len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        content = buffer[:size].view(dtype).view(shape)
        fill(content)
        copied = content.to(self._device, non_blocking=True)
        # Blocking: a thread that spins until then takes a core from the processes that decode.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._buffers.append((buffer, event))
        return copied

    def _free(self) -> Tensor:
        if len(self._buffers) < BUFFERS:
            return torch.empty(0, dtype=torch.uint8)
        buffer, copied = self._buffers.popleft()
        copied.synchronize()
        return buffer
