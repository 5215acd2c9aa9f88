"""Networks of the benchmark that no package names: factories for `sft.models.build`."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

FACTORIES = ("sft_networks:resnet", "sft_networks:lite0")


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, seen: Tensor) -> Tensor:
        inside = functional.relu(self.bn1(self.conv1(seen)))
        return functional.relu(self.bn2(self.conv2(inside)) + self.shortcut(seen))


def resnet(num_classes: int) -> nn.Module:
    """Build the small batch-norm ResNet: a stem of 24 channels, blocks of 24, 48 and 96."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        _Block(24, 24, 1), _Block(24, 48, 2), _Block(48, 96, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, num_classes),
    )  # fmt: skip


def lite0(num_classes: int) -> nn.Module:
    """Build EfficientNet-Lite0 as the PyPI package `efficientnet-lite-pytorch` has it."""
    from efficientnet_lite_pytorch import EfficientNet

    network: Any = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    return cast("nn.Module", network)
