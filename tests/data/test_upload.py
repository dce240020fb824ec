"""The way to a GPU, against one that copies as late as it may."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from softdefend.data.upload import Uploader


@pytest.fixture
def lazy_copies(monkeypatch) -> dict[int, torch.Tensor]:
    """Copies by number, of a device that makes each when the host waits for it; on it tensors are the host's
    own until then."""
    made: dict[int, torch.Tensor] = {}
    handed: list[torch.Tensor] = []

    class Event:
        def __init__(self, blocking):
            assert blocking  # a host that spins takes a core

        def record(self, stream):
            assert stream == "of cuda:1"  # whichever device is the current one
            self.number = len(handed) - 1

        def synchronize(self):
            made[self.number] = handed[self.number].clone()

    class OfHost(torch.Tensor):
        def to(self, device, non_blocking):
            assert non_blocking
            handed.append(self.as_subclass(torch.Tensor))
            return self

    def empty(size, dtype, pin_memory=False):
        assert pin_memory or size == 0
        return torch.empty(size, dtype=dtype).as_subclass(OfHost)

    cuda = SimpleNamespace(Event=Event, current_stream=lambda device: f"of {device}")
    instead = SimpleNamespace(empty=empty, uint8=torch.uint8, cuda=cuda)
    monkeypatch.setattr("softdefend.data.upload.torch", instead)
    return made


def test_memory_is_written_again_only_after_its_copy(lazy_copies):
    """Also where a smaller tensor, a larger one or one of another type comes between; the last two copies are
    not waited for."""
    upload = Uploader(torch.device("cuda:1"))
    shapes = [(4, 3), (4, 3), (2, 3), (4, 3), (7, 3), (4, 3), (1,), (7, 3)]
    for number, shape in enumerate(shapes):
        dtype = torch.float32 if number == 3 else torch.uint8
        upload(shape, dtype, lambda room, number=number: room.fill_(number))
        assert sorted(lazy_copies) == list(range(max(number - 1, 0)))
    for number, copy in lazy_copies.items():
        assert copy.shape == shapes[number]
        assert (copy == number).all()
