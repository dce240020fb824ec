from __future__ import annotations

import pytest
import torch

from softdefend.models.wide_resnet import WideResNet


@pytest.mark.parametrize(("depth", "count"), [(28, 36_479_194), (34, 46_160_474)])
def test_parameter_count_is_the_published_one(depth: int, count: int) -> None:
    with torch.device("meta"):
        net = WideResNet(10, 3, depth, widen=10)
    assert sum(p.numel() for p in net.parameters()) == count


def test_layout_of_the_whole_network(randomise, conv2d, bn_relu) -> None:
    net = WideResNet(5, 1, depth=16, widen=2).double().eval()
    state = randomise(net)
    image = torch.rand(2, 1, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = conv2d(state, "stem", image)
    assert x.shape == (2, 16, 8, 12)
    for i, (stride, width) in enumerate([(1, 32), (1, 32), (2, 64), (1, 64), (2, 128), (1, 128)]):
        b = f"blocks.{i}"
        active = bn_relu(state, f"{b}.bn1", x)
        skip = conv2d(state, f"{b}.shortcut", active, stride) if i % 2 == 0 else x
        out = bn_relu(state, f"{b}.bn2", conv2d(state, f"{b}.conv1", active, stride))
        x = conv2d(state, f"{b}.conv2", out) + skip
        assert x.shape[1] == width
    x = bn_relu(state, "bn", x)
    expected = x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(net(image), expected)
