"""A small convolutional network for digits: quick on a CPU, wide enough to overfit."""

from __future__ import annotations

from torch import Tensor, nn

from softdefend.models.layers import Activation, conv, global_average, init_weights, make_activation


class SmallCNN(nn.Module):
    """Four 3x3 convolutions with BatchNorm and activation, global average pooling, one linear layer.

    The channels are width, width, 2 width, 2 width; the third convolution has stride 2.

    Args:
        num_classes: k, the length of the logits.
        in_channels: channels of the images.
        width: channels of the first layer.
        activation: between the layers.
    """

    def __init__(
        self, num_classes: int, in_channels: int, width: int = 32, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        plan = [(in_channels, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in plan:
            layers += [
                conv(inputs, outputs, stride=stride),
                nn.BatchNorm2d(outputs),
                make_activation(activation),
            ]
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(2 * width, num_classes)
        init_weights(self)

    def forward(self, image: Tensor) -> Tensor:
        """``image`` [b,c,h,w] -> logits [b,k]."""
        logits: Tensor = self.linear(global_average(self.features(image)))
        return logits
