"""Wide ResNets for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from lkd.features.layers import FeatureLayers
from lkd.models.parts import check_counts, initialize_convolutions


class _Block(nn.Module):
    """Two convolutions, each after BatchNorm and ReLU; the projection of the shortcut follows the first ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None  # name in published checkpoints
        if stride != 1 or in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        active = self.relu1(self.bn1(feature))
        residual: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return residual + (feature if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """A wide ResNet for small images: a 3x3 convolution, three stages of pre-activation blocks, and average pooling.

    Images may have any size; the three stages operate at full, half and quarter resolution. Layers that provide
    features:

    - `conv1`, `block1`, `block2`, `block3`: the benchmark's features f0 to f3 (sums, before BatchNorm and ReLU);
    - `flatten`: the pooled feature `(B, C)`;
    - `block2.layer.0.bn1`, `block3.layer.0.bn1`, `bn1`: the benchmark's pre-activations; `block2.layer.0.relu1`,
      `block3.layer.0.relu1` and `relu` are the same features after ReLU.

    Args:
        depth: Number of layers with weights, 6n + 4: each stage has n blocks of two layers.
        widen_factor: Widening factor k: the stages have 16k, 32k and 64k channels.
        num_classes: Number of classes.
        in_channels: Number of input channels: 3 for color images, 1 for grayscale images.

    Raises:
        ValueError: If the depth is not 6n + 4, or a count is not positive.

    References:
        Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016 (arXiv 1605.07146). Names and order of the weights
        match the CIFAR-100 distillation benchmark (Tian et al., arXiv 1910.10699), which uses no dropout either.

    Example:
        >>> import torch
        >>> network = WideResNet(depth=10, widen_factor=1, num_classes=10, in_channels=1)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth of WideResNet must be 6n + 4 (10, 16, 22, 28, ...), got {depth}")
        check_counts(widen_factor=widen_factor, num_classes=num_classes, in_channels=in_channels)
        num_blocks = (depth - 4) // 6
        widths = (16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, widths[0], num_blocks, 1)
        self.block2 = _stage(widths[0], widths[1], num_blocks, 2)
        self.block3 = _stage(widths[1], widths[2], num_blocks, 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(widths[2], num_classes)
        initialize_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Names of the layers that provide features; stages end before the BatchNorm of the next stage."""
        norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
        return FeatureLayers(
            stem="conv1",
            stages=("block1", "block2", "block3"),
            preacts=norms,
            norms=norms,
            map="avgpool:input",
            pooled="flatten",
            head="fc",
        )

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits of a batch of images.

        Args:
            image: `(B, in_channels, H, W)`, float, normalized.

        Returns:
            Logits `(B, num_classes)`.
        """
        feature = self.block3(self.block2(self.block1(self.conv1(image))))
        logits: Tensor = self.fc(self.flatten(self.avgpool(self.relu(self.bn1(feature)))))
        return logits


def _stage(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = _Block(in_channels, out_channels, stride)
    others = [_Block(out_channels, out_channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *others)))


def wrn_16_1(num_classes: int, in_channels: int = 3) -> WideResNet:
    """Wide ResNet with depth 16 and width 1 (0.18 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return WideResNet(16, 1, num_classes, in_channels)


def wrn_16_2(num_classes: int, in_channels: int = 3) -> WideResNet:
    """Wide ResNet with depth 16 and width 2 (0.70 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return WideResNet(16, 2, num_classes, in_channels)


def wrn_40_1(num_classes: int, in_channels: int = 3) -> WideResNet:
    """Wide ResNet with depth 40 and width 1 (0.57 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return WideResNet(40, 1, num_classes, in_channels)


def wrn_40_2(num_classes: int, in_channels: int = 3) -> WideResNet:
    """Wide ResNet with depth 40 and width 2 (2.3 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return WideResNet(40, 2, num_classes, in_channels)
