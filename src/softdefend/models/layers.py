"""What the built-in networks share: convolutions, stages, activations, pooling and the draw of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

Activation = Literal["relu", "silu"]


def make_activation(name: Activation) -> nn.Module:
    """The activation of a built-in network as a layer without weights."""
    return nn.SiLU() if name == "silu" else nn.ReLU(inplace=True)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width at stride 1; no bias, because a BatchNorm follows."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def stages(
    block: Callable[[int, int, int], nn.Module], widths: Sequence[int], strides: Sequence[int], blocks: int
) -> nn.Sequential:
    """The blocks of a residual network, stage after stage.

    Args:
        block: makes one from its channels before and after it, and its stride.
        widths: channels before the first stage, and after each.
        strides: of the first block of each stage; that of the others is 1.
        blocks: of a stage.
    """
    made: list[nn.Module] = []
    for (inputs, outputs), stride in zip(pairwise(widths), strides, strict=True):
        made += [block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(blocks - 1))]
    return nn.Sequential(*made)


def global_average(features: Tensor) -> Tensor:
    """[b,c,h,w] -> [b,c] for any h and w.

    A plain mean: its backward pass is deterministic on CUDA, which adaptive pooling's is not in general.
    """
    return features.mean(dim=(2, 3))


def init_kaiming(net: nn.Module) -> None:
    """Draw the weights of all convolutions from N(0, 2 / (kernel area x output channels)).

    This is Kaiming initialization, normal with fan-out mode (He et al., arXiv 1502.01852, section 2.2).
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def init_weights(net: nn.Module) -> None:
    """Draw first weights as the Wide ResNet of TRADES' code does.

    Convolutions are drawn by :func:`init_kaiming`, linear layers have torch's uniform weights and bias 0, and
    BatchNorm keeps torch's weight 1 and bias 0.
    """
    init_kaiming(net)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
