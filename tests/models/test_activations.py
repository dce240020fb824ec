"""SiLU between the layers: every built-in network against layers written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError
from softdefend.execution import fused
from softdefend.models import NetSettings, build
from softdefend.models.preact_resnet import PreActResNet18
from softdefend.models.resnet import ResNet18
from softdefend.models.small_cnn import SmallCNN
from softdefend.models.wide_resnet import WideResNet

IMAGE = torch.rand(2, 1, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
STAGES = [
    (stride, width) for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)) for stride in (stride, 1)
]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def head(state: dict[str, Tensor], x: Tensor) -> Tensor:
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


def preact(state, conv2d, bn, strides: list[int]) -> Tensor:
    x = conv2d(state, "stem", IMAGE)
    for i, stride in enumerate(strides):
        b = f"blocks.{i}"
        active = silu(bn(state, f"{b}.bn1", x))
        skip = conv2d(state, f"{b}.shortcut", active, stride) if f"{b}.shortcut.weight" in state else x
        x = conv2d(
            state, f"{b}.conv2", silu(bn(state, f"{b}.bn2", conv2d(state, f"{b}.conv1", active, stride)))
        )
        x = x + skip
    return head(state, silu(bn(state, "bn", x)))


@pytest.mark.parametrize(
    ("net", "strides"),
    [
        (lambda: WideResNet(5, 1, depth=16, widen=2, activation="silu"), [1, 1, 2, 1, 2, 1]),
        (lambda: PreActResNet18(5, 1, activation="silu"), [stride for stride, _ in STAGES]),
    ],
    ids=["wide", "preact"],
)
def test_preactivation_networks(net, strides, randomise, conv2d, bn) -> None:
    net = net().double().eval()
    state = randomise(net)
    torch.testing.assert_close(net(IMAGE), preact(state, conv2d, bn, strides))


def test_resnet(randomise, conv2d, bn) -> None:
    net = ResNet18(5, 1, activation="silu").double().eval()
    state = randomise(net)
    x = silu(bn(state, "stem.1", conv2d(state, "stem.0", IMAGE)))
    for i, (stride, _) in enumerate(STAGES):
        b = f"blocks.{i}"
        out = silu(bn(state, f"{b}.bn1", conv2d(state, f"{b}.conv1", x, stride)))
        out = bn(state, f"{b}.bn2", conv2d(state, f"{b}.conv2", out))
        if f"{b}.shortcut.0.weight" in state:
            x = bn(state, f"{b}.shortcut.1", conv2d(state, f"{b}.shortcut.0", x, stride))
        x = silu(out + x)
    torch.testing.assert_close(net(IMAGE), head(state, x))


def test_small_cnn(randomise, conv2d, bn) -> None:
    net = SmallCNN(5, 1, width=4, activation="silu").double().eval()
    state, x = randomise(net), IMAGE
    for i, stride in enumerate((1, 1, 2, 1)):
        x = silu(bn(state, f"features.{3 * i + 1}", conv2d(state, f"features.{3 * i}", x, stride)))
    torch.testing.assert_close(net(IMAGE), head(state, x))


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "preact_resnet18"])
def test_weights_are_drawn_and_named_alike(name: str) -> None:
    states = []
    for activation in ("relu", "silu"):
        torch.manual_seed(0)
        settings = NetSettings(name, activation=activation)  # type: ignore[arg-type]
        states.append(build(settings, num_classes=4, in_channels=1, mean=[0.5], std=[0.2]).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activation": "gelu"}, r"^net\.activation: got '?gelu'?; accepted: relu"),
        (
            {"name": "timm:resnet18", "activation": "silu"},
            r"^net\.activation: got silu with net\.name timm:resnet18; accepted: relu; only built-in",
        ),
    ],
    ids=["unknown", "timm"],
)
def test_an_activation_that_cannot_be_is_refused(settings, said) -> None:
    with pytest.raises(SettingError, match=said):
        build(NetSettings(**settings), num_classes=4, in_channels=1, mean=[0.5], std=[0.2])


def test_the_fused_kernels_which_have_relu_inside_refuse_silu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(fused, "find_spec", lambda _: object())
    reasons = [
        fused.refusal(nn.Sequential(nn.Identity(), net), (3, 32, 32), torch.device("cuda"))
        for net in (ResNet18(4, 3), ResNet18(4, 3, activation="silu"))
    ]
    assert reasons[0] is None
    assert "silu" in str(reasons[1])
