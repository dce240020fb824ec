"""A row of probabilities for every training sample, averaged over time."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from softdefend.core.errors import SettingError
from softdefend.core.processes import ALONE, Processes

_TOP = re.compile(r"top-([1-9]\d*)")


class LabelMemory(ABC):
    """Exponential moving average of per-sample predictions, kept on the device.

    Rows start as the one-hot label, so after m updates the given label still weighs ``momentum ** m``.
    Nothing here reads the device from the host or changes a shape.

    Args:
        momentum: weight of the old row in an update, in [0, 1].
        processes: those that train together; each keeps all rows, also of samples that another one saw.
    """

    def __init__(self, momentum: float, processes: Processes = ALONE) -> None:
        self.momentum, self.processes = momentum, processes

    @abstractmethod
    def read(self, index: Tensor) -> Tensor:
        """Rows [b, k] float32 of the samples ``index`` [b]."""

    @abstractmethod
    def _write(self, index: Tensor, rows: Tensor) -> None: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that hold the rows."""

    def update(self, index: Tensor, probability: Tensor) -> Tensor:
        """Move the rows of ``index`` [b] towards ``probability`` [b, k] and return them, [b, k].

        The returned rows are exact; the memory keeps what its storage can hold of them. No index may appear
        twice in a batch.
        """
        rows = self.momentum * self.read(index) + (1 - self.momentum) * probability
        self._write(index, rows)
        return rows

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` gave, in place."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class DenseMemory(LabelMemory):
    """All k probabilities of every sample: n * k * 4 bytes in float32 (CIFAR-10: 2 MB, CIFAR-100: 20 MB),
    half of it in float16.

    A float16 row is within 2^-12 / (1 - momentum) of the exact one in every entry, 0.0025 at momentum 0.9:
    each write rounds by at most 2^-12 (half a unit in the last place below one), and an earlier rounding
    weighs ``momentum`` as much with every later write.
    """

    def __init__(
        self,
        labels: Tensor,
        k: int,
        momentum: float,
        dtype: torch.dtype = torch.float32,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__(momentum, processes)
        # Not one_hot: its int64 table would take twice the memory of a float32 one beside it.
        self.table = torch.zeros(len(labels), k, dtype=dtype, device=labels.device)
        self.table.scatter_(1, labels[:, None], 1)

    def read(self, index: Tensor) -> Tensor:
        return self.table[index].float()

    def _write(self, index: Tensor, rows: Tensor) -> None:
        self.table.index_copy_(0, *self.processes.gather(index, rows.to(self.table.dtype)))

    def state_dict(self) -> dict[str, Tensor]:
        return {"memory": self.table}


class TopMemory(LabelMemory):
    """The m largest probabilities of every sample in float16 with their classes; what is left of the mass is
    taken to be spread evenly over the other classes. For many classes: n * m * 4 bytes, so that 1,281,167
    samples of 1,000 classes take 164 MB at m = 32 (dense float32: 5.1 GB).

    A write moves no entry by more than the (m + 1)-th largest of the row, itself at most 1 / (m + 1), and
    moves no mass into or out of the m largest, but for float16's 2^-12.
    """

    def __init__(self, labels: Tensor, k: int, momentum: float, m: int, processes: Processes = ALONE) -> None:
        super().__init__(momentum, processes)
        if not 1 <= m < k <= 2**15:
            raise SettingError("label.storage", f"top-{m}", f"top-1 to top-{k - 1} with {k} classes")
        self.k, self.m = k, m
        self.classes = ((labels[:, None] + torch.arange(m, device=labels.device)) % k).to(torch.int16)
        self.values = torch.zeros(len(labels), m, dtype=torch.float16, device=labels.device)
        self.values[:, 0] = 1

    def read(self, index: Tensor) -> Tensor:
        values = self.values[index].float()
        rest = (1 - values.sum(dim=1, keepdim=True)).clamp_min(0) / (self.k - self.m)
        return rest.repeat(1, self.k).scatter(1, self.classes[index].long(), values)

    def _write(self, index: Tensor, rows: Tensor) -> None:
        values, classes = rows.topk(self.m, dim=1)
        index, values, classes = self.processes.gather(index, values.half(), classes.to(torch.int16))
        self.values.index_copy_(0, index, values)
        self.classes.index_copy_(0, index, classes)

    def state_dict(self) -> dict[str, Tensor]:
        return {"memory_values": self.values, "memory_classes": self.classes}


def make_memory(
    storage: str, labels: Tensor, k: int, momentum: float, processes: Processes = ALONE
) -> LabelMemory:
    """A memory for labels [n] int64 of ``k`` classes.

    Args:
        storage: ``float32``, ``float16``, or ``top-M`` for the M largest entries of a row.

    Raises:
        SettingError: another storage, or an M that is not below k.
    """
    check_storage(storage)
    if top := _TOP.fullmatch(storage):
        return TopMemory(labels, k, momentum, int(top[1]), processes)
    dtype = torch.float16 if storage == "float16" else torch.float32
    return DenseMemory(labels, k, momentum, dtype, processes)


def check_storage(storage: str) -> None:
    """Check the name of a storage.

    Raises:
        SettingError: :func:`make_memory` does not know it.
    """
    if storage not in ("float32", "float16") and not _TOP.fullmatch(storage):
        raise SettingError("label.storage", repr(storage), "float32, float16, or top-M such as top-32")
