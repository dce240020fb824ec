"""Residual networks as DeepMind released them (Gowal et al., arXiv 2010.03593), to evaluate their weights.

They differ from this package's own networks in three ways that change what the same weights compute: the
activation may be SiLU, convolutions with stride 2 pad right and below only, and PreActResNet-18 has 3x3
convolutions as shortcuts. Attribute names are those of the released weights.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from softdefend.models.layers import global_average

Activation = Callable[[Tensor], Tensor]

STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation that their code normalizes by, which the weights do not hold: of CIFAR-10 and
CIFAR-100, by the number of classes."""


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """Without padding, which :func:`_pad` does."""
    return nn.Conv2d(inputs, outputs, kernel, stride, bias=False)


def _pad(x: Tensor, stride: int) -> Tensor:
    """What a 3x3 convolution is given: a border of one, above and left only at stride 1."""
    before = 1 if stride == 1 else 0
    return F.pad(x, (before, 1, before, 1))


class _Block(nn.Module):
    """A block of the wide ResNet: pre-activation, and a 1x1 convolution of it where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation, self.stride = activation, stride
        self.batchnorm_0, self.conv_0 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None if inputs == outputs else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out = self.conv_0(_pad(active, self.stride))
        added: Tensor = self.conv_1(self.activation(self.batchnorm_1(out))) + shortcut
        return added


class _Group(nn.Module):
    """The blocks of one width; the first has the stride."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        first = _Block(inputs, outputs, stride, activation)
        self.block = nn.Sequential(
            first, *(_Block(outputs, outputs, 1, activation) for _ in range(blocks - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class DeepMindWideResNet(nn.Module):
    """WRN-depth-widen in DeepMind's layout.

    Args:
        num_classes: k, the length of the logits.
        in_channels: channels of the images.
        depth: 6 n + 4.
        widen: the factor on the channels.
        activation: ReLU or SiLU (also called Swish).
    """

    def __init__(
        self, num_classes: int, in_channels: int, depth: int, widen: int, activation: Activation
    ) -> None:
        super().__init__()
        widths, blocks = [16, 16 * widen, 32 * widen, 64 * widen], (depth - 4) // 6
        self.activation = activation
        self.init_conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            *(
                _Group(blocks, inputs, outputs, stride, activation)
                for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
            )
        )
        self.batchnorm = nn.BatchNorm2d(widths[-1])
        self.logits = nn.Linear(widths[-1], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b,c,h,w], normalized -> logits [b,k]."""
        features = self.activation(self.batchnorm(self.layer(self.init_conv(image))))
        logits: Tensor = self.logits(global_average(features))
        return logits


class _PreActBlock(nn.Module):
    """A block of PreActResNet-18: its shortcut is a 3x3 convolution of x itself where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation, self.stride = activation, stride
        self.batchnorm_0, self.conv_2d_1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, 3, stride)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_2d_2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = _conv(inputs, outputs, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(_pad(x, self.stride))
        out = self.conv_2d_1(_pad(self.activation(self.batchnorm_0(x)), self.stride))
        added: Tensor = self.conv_2d_2(self.activation(self.batchnorm_1(out))) + shortcut
        return added


class DeepMindPreActResNet18(nn.Module):
    """PreActResNet-18 in DeepMind's layout.

    Args:
        num_classes: k, the length of the logits.
        in_channels: channels of the images.
        activation: ReLU or SiLU.
    """

    def __init__(self, num_classes: int, in_channels: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.conv_2d = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        widths = [64, 64, 128, 256, 512]
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            first = _PreActBlock(inputs, outputs, 1 if number == 0 else 2, activation)
            blocks = nn.Sequential(first, _PreActBlock(outputs, outputs, 1, activation))
            self.add_module(f"layer_{number}", blocks)
        self.batchnorm = nn.BatchNorm2d(512)
        self.logits = nn.Linear(512, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b,c,h,w], normalized -> logits [b,k]."""
        x = self.conv_2d(image)
        for number in range(4):
            x = self.get_submodule(f"layer_{number}")(x)
        features = self.activation(self.batchnorm(x))
        logits: Tensor = self.logits(global_average(features))
        return logits
