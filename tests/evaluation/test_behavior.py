"""What tells a network from another of the same weights and structure: what it does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softdefend.evaluation.examine import behavior

IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3


class _Through(torch.autograd.Function):
    """The same image, another gradient."""

    sign = 1.0

    @staticmethod
    def forward(ctx, image: Tensor) -> Tensor:
        return image.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Through.sign * grad


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.last = nn.Linear(16, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(_Through.apply(image).flatten(1))


def test_the_same_network_says_the_same_and_a_repaired_gradient_another_thing(monkeypatch):
    assert behavior(Net(), IMAGES, LABELS) == behavior(Net(), IMAGES, LABELS)
    right = behavior(Net(), IMAGES, LABELS)
    monkeypatch.setattr(_Through, "sign", -1.0)
    assert behavior(Net(), IMAGES, LABELS) != right


def test_logits_that_changed_places_are_others():
    class Turned(Net):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image)[:, [1, 2, 0]]

    assert behavior(Turned(), IMAGES, LABELS) != behavior(Net(), IMAGES, LABELS)


def test_classes_beyond_a_byte_are_told_apart():
    """In a byte, class 257 would be class 1."""

    class Constant(Net):
        def __init__(self, named: int) -> None:
            super().__init__(300)
            self.named = named

        def forward(self, image: Tensor) -> Tensor:
            logits = 0 * super().forward(image)
            logits[:, self.named] += 1
            return logits

    first, other = (behavior(Constant(named), IMAGES, LABELS).split("classes ")[1] for named in (1, 257))
    assert first != other
