"""ImageNet ResNets with a stem for small images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lkd.features.layers import FeatureLayers
from lkd.models.parts import check_counts, initialize_convolutions


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; the input of `relu2` is the sum."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, feature: Tensor) -> Tensor:
        residual = self.relu1(self.bn1(self.conv1(feature)))
        residual = self.bn2(self.conv2(residual))
        output: Tensor = self.relu2(residual + self.shortcut(feature))
        return output


class _Bottleneck(nn.Module):
    """A 3x3 convolution on a quarter of the channels between two 1x1 ones; the input of `relu3` is the sum."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, feature: Tensor) -> Tensor:
        residual = self.relu1(self.bn1(self.conv1(feature)))
        residual = self.relu2(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        output: Tensor = self.relu3(residual + self.shortcut(feature))
        return output


_Block = type[_BasicBlock] | type[_Bottleneck]
_DEPTHS: dict[int, tuple[_Block, tuple[int, int, int, int]]] = {
    18: (_BasicBlock, (2, 2, 2, 2)),
    34: (_BasicBlock, (3, 4, 6, 3)),
    50: (_Bottleneck, (3, 4, 6, 3)),
    101: (_Bottleneck, (3, 4, 23, 3)),
    152: (_Bottleneck, (3, 8, 36, 3)),
}


class ImageNetResNet(nn.Module):
    """An ImageNet ResNet for small images, with a 3x3 convolution without stride and pooling as its stem.

    Images may have any size; the four stages operate at full, half, quarter and one eighth of the resolution. Layers
    that provide features:

    - `relu`, `layer1`, `layer2`, `layer3`, `layer4`: the benchmark's features f0 to f4 (after ReLU);
    - `flatten`: the pooled feature `(B, C)`;
    - the input of the last ReLU of each stage: the benchmark's pre-activations, `layer1.1.relu2:input` and so on in
      ResNet-18; `layer1.2.relu3:input`, `layer2.3.relu3:input`, `layer3.5.relu3:input` and `layer4.2.relu3:input` in
      ResNet-50.

    Args:
        depth: Number of layers with weights: 18, 34, 50, 101 or 152.
        num_classes: Number of classes.
        in_channels: Number of input channels: 3 for color images, 1 for grayscale images.

    Raises:
        ValueError: If the depth is not supported or a count is not positive.

    References:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2015 (arXiv 1512.03385). Names and order of
        the weights match the CIFAR-100 distillation benchmark (Tian et al., arXiv 1910.10699), in which the 3x3
        convolution of a bottleneck halves the resolution, not its first convolution.

    Example:
        >>> import torch
        >>> ImageNetResNet(depth=18, num_classes=10, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: Literal[18, 34, 50, 101, 152], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise ValueError(
                f"depth of ImageNetResNet must be one of {', '.join(map(str, _DEPTHS))}, got {depth}; CIFARResNet "
                "supports other depths"
            )
        check_counts(num_classes=num_classes, in_channels=in_channels)
        block, (first, second, third, fourth) = _DEPTHS[depth]
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _stage(block, 64, 64, first, 1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, second, 2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, third, 2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, fourth, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        initialize_convolutions(self)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Names of the layers that provide features."""
        stages = ("layer1", "layer2", "layer3", "layer4")
        relu, norm = ("relu3", "bn3") if isinstance(self.layer1[0], _Bottleneck) else ("relu2", "bn2")
        last = [f"{stage}.{len(self.get_submodule(stage)) - 1}" for stage in stages]  # type: ignore[arg-type]
        return FeatureLayers(
            stem="relu",
            stages=stages,
            preacts=tuple(f"{block}.{relu}:input" for block in last),
            norms=tuple(f"{block}.{norm}" for block in last),
            map="avgpool:input",
            pooled="flatten",
            head="linear",
        )

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits of a batch of images.

        Args:
            image: `(B, in_channels, H, W)`, float, normalized.

        Returns:
            Logits `(B, num_classes)`.
        """
        feature = self.relu(self.bn1(self.conv1(image)))
        feature = self.layer4(self.layer3(self.layer2(self.layer1(feature))))
        logits: Tensor = self.linear(self.flatten(self.avgpool(feature)))
        return logits


def _stage(block: _Block, in_channels: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
    others = [block(width * block.expansion, width, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(block(in_channels, width, stride), *others)


def resnet18(num_classes: int, in_channels: int = 3) -> ImageNetResNet:
    """ImageNet ResNet-18 for small images (11 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return ImageNetResNet(18, num_classes, in_channels)


def resnet50(num_classes: int, in_channels: int = 3) -> ImageNetResNet:
    """ImageNet ResNet-50 for small images (24 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return ImageNetResNet(50, num_classes, in_channels)
