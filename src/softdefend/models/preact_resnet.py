"""PreActResNet-18 for small images (He et al., arXiv 1603.05027)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from softdefend.models.layers import Activation, conv, global_average, make_activation, stages


class PreActBlock(nn.Module):
    """``conv(relu(bn(conv(a)))) + shortcut`` with ``a = relu(bn(x))``.

    The shortcut is x itself, or a 1x1 convolution of a (not of x, and without BatchNorm) where the shape
    changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.activate = make_activation(activation)
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[b,inputs,h,w] -> [b,outputs,h/stride,w/stride]."""
        active = self.activate(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.activate(self.bn2(self.conv1(active)))) + shortcut
        return out


class PreActResNet18(nn.Module):
    """PreActResNet-18 as adversarial training uses it on 32x32 images; 11,172,170 parameters for 10 classes.

    Two layouts are in use. This is that of Rice et al. (arXiv 2002.11569), with a last BatchNorm and ReLU
    before the pooling; the other one has none (11,171,146 parameters). A bare 3x3 stem with 64 channels,
    four stages of two blocks with 64, 128, 256 and 512 channels and strides 1, 2, 2, 2, global average
    pooling, linear.

    Args:
        num_classes: k, the length of the logits.
        in_channels: channels of the images.
        activation: between the layers.
    """

    def __init__(self, num_classes: int, in_channels: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.activate = make_activation(activation)
        self.stem = conv(in_channels, 64)
        block = partial(PreActBlock, activation=activation)
        self.blocks = stages(block, (64, 64, 128, 256, 512), (1, 2, 2, 2), 2)
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b,c,h,w] -> logits [b,k]."""
        features = self.activate(self.bn(self.blocks(self.stem(image))))
        logits: Tensor = self.linear(global_average(features))
        return logits
