from __future__ import annotations

import torch

from softdefend.models.small_cnn import SmallCNN


def test_layout_of_the_whole_network(randomise, conv2d, bn_relu) -> None:
    net = SmallCNN(10, 1, width=6).double().eval()
    state = randomise(net)
    x = image = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for i, (stride, width) in enumerate([(1, 6), (1, 6), (2, 12), (1, 12)]):
        x = bn_relu(state, f"features.{3 * i + 1}", conv2d(state, f"features.{3 * i}", x, stride))
        assert x.shape[1] == width
    expected = x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(net(image), expected)


def test_default_width_is_32() -> None:
    # four bias-free convolutions, four BatchNorms (weight and bias), one linear layer
    convolutions = 9 * (1 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    norms = 2 * (32 + 32 + 64 + 64)
    assert sum(p.numel() for p in SmallCNN(10, 1).parameters()) == convolutions + norms + 64 * 10 + 10
