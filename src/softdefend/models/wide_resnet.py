"""Wide ResNets for small images (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from softdefend.models.layers import (
    Activation,
    conv,
    global_average,
    init_weights,
    make_activation,
    stages,
)
from softdefend.models.preact_resnet import PreActBlock


class WideResNet(nn.Module):
    """WRN-depth-widen without dropout, in the layout of TRADES' code (arXiv 1901.08573).

    A bare 3x3 stem with 16 channels; three stages of (depth - 4) / 6 pre-activation blocks with 16, 32 and
    64 times ``widen`` channels and strides 1, 2, 2; a last BatchNorm and ReLU; global average pooling;
    linear. For 10 classes WRN-28-10 has 36,479,194 and WRN-34-10 has 46,160,474 parameters.

    Args:
        num_classes: k, the length of the logits.
        in_channels: channels of the images.
        depth: 6 n + 4.
        widen: the factor on the channels.
        activation: between the layers.
    """

    def __init__(
        self, num_classes: int, in_channels: int, depth: int, widen: int, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.activate = make_activation(activation)
        self.stem = conv(in_channels, 16)
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        block = partial(PreActBlock, activation=activation)
        self.blocks = stages(block, widths, (1, 2, 2), (depth - 4) // 6)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], num_classes)
        init_weights(self)

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b,c,h,w] -> logits [b,k]."""
        features = self.activate(self.bn(self.blocks(self.stem(image))))
        logits: Tensor = self.linear(global_average(features))
        return logits
