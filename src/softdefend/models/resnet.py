"""ResNet-18 for small images (He et al., arXiv 1512.03385)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from softdefend.models.layers import Activation, conv, global_average, make_activation, stages


class BasicBlock(nn.Module):
    """``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``.

    The shortcut is the identity, or a 1x1 convolution with BatchNorm where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.activate = make_activation(activation)
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[b,inputs,h,w] -> [b,outputs,h/stride,w/stride]."""
        out = self.activate(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        activated: Tensor = self.activate(out)
        return activated


class ResNet18(nn.Module):
    """ResNet-18 as robustness papers use it on 32x32 images; 11,173,962 parameters for 10 classes.

    Against the ImageNet layout: a 3x3 stem with 64 channels and no max-pooling. Four stages of two basic
    blocks with 64, 128, 256 and 512 channels and strides 1, 2, 2, 2; global average pooling; linear.
    Weights start as torch's layers start them, as in the code of TRADES, MART and AWP. The code of SAT and of
    SGLR has the same network and draws its convolutions anew (``net.init: kaiming``).

    Args:
        num_classes: k, the length of the logits.
        in_channels: channels of the images.
        activation: between the layers.
    """

    def __init__(self, num_classes: int, in_channels: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(in_channels, 64), nn.BatchNorm2d(64), make_activation(activation))
        block = partial(BasicBlock, activation=activation)
        self.blocks = stages(block, (64, 64, 128, 256, 512), (1, 2, 2, 2), 2)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b,c,h,w] -> logits [b,k]."""
        logits: Tensor = self.linear(global_average(self.blocks(self.stem(image))))
        return logits
