from __future__ import annotations

import pytest
import torch

from softdefend.models.resnet import BasicBlock, ResNet18


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 2), (4, 8, 1), (4, 4, 2)])
def test_block_by_hand(inputs, outputs, stride, randomise, conv2d, bn) -> None:
    block = BasicBlock(inputs, outputs, stride).double().eval()
    state = randomise(block)
    x = torch.randn(2, inputs, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = bn(state, "bn1", conv2d(state, "conv1", x, stride)).clamp(min=0)
    out = bn(state, "bn2", conv2d(state, "conv2", out))
    changes = stride != 1 or inputs != outputs
    assert ("shortcut.0.weight" in state) == changes
    skip = bn(state, "shortcut.1", conv2d(state, "shortcut.0", x, stride)) if changes else x
    torch.testing.assert_close(block(x), (out + skip).clamp(min=0))


def test_layout_of_the_whole_network(randomise, conv2d, bn) -> None:
    net = ResNet18(10, 3).double().eval()
    state = randomise(net)
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = bn(state, "stem.1", conv2d(state, "stem.0", image)).clamp(min=0)
    for i, stride in enumerate([1, 1, 2, 1, 2, 1, 2, 1]):
        b = f"blocks.{i}"
        out = bn(state, f"{b}.bn1", conv2d(state, f"{b}.conv1", x, stride)).clamp(min=0)
        out = bn(state, f"{b}.bn2", conv2d(state, f"{b}.conv2", out))
        if stride == 2:
            x = bn(state, f"{b}.shortcut.1", conv2d(state, f"{b}.shortcut.0", x, stride))
        x = (out + x).clamp(min=0)
    expected = x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(net(image), expected)


def test_parameter_count_is_the_published_one() -> None:
    assert sum(p.numel() for p in ResNet18(10, 3).parameters()) == 11_173_962
