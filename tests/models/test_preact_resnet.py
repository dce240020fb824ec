from __future__ import annotations

import pytest
import torch

from softdefend.models.preact_resnet import PreActBlock, PreActResNet18


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 2), (4, 8, 1), (4, 4, 2)])
def test_block_by_hand(inputs, outputs, stride, randomise, conv2d, bn_relu) -> None:
    block = PreActBlock(inputs, outputs, stride).double().eval()
    state = randomise(block)
    x = torch.randn(2, inputs, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    kept = x.clone()
    active = bn_relu(state, "bn1", x)
    out = conv2d(state, "conv2", bn_relu(state, "bn2", conv2d(state, "conv1", active, stride)))
    changes = stride != 1 or inputs != outputs
    assert ("shortcut.weight" in state) == changes
    skip = conv2d(state, "shortcut", active, stride) if changes else x
    torch.testing.assert_close(block(x), out + skip)
    assert torch.equal(x, kept)  # the identity shortcut must not see the in-place ReLU


def test_layout_of_the_whole_network(randomise, conv2d, bn_relu) -> None:
    net = PreActResNet18(10, 3).double().eval()
    state = randomise(net)
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = conv2d(state, "stem", image)
    for i, stride in enumerate([1, 1, 2, 1, 2, 1, 2, 1]):
        b = f"blocks.{i}"
        active = bn_relu(state, f"{b}.bn1", x)
        skip = conv2d(state, f"{b}.shortcut", active, stride) if stride == 2 else x
        out = bn_relu(state, f"{b}.bn2", conv2d(state, f"{b}.conv1", active, stride))
        x = conv2d(state, f"{b}.conv2", out) + skip
    x = bn_relu(state, "bn", x)
    expected = x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(net(image), expected)


def test_parameter_count_is_the_published_one() -> None:
    assert sum(p.numel() for p in PreActResNet18(10, 3).parameters()) == 11_172_170
