"""ResNets for small images: the CIFAR networks of He et al., as used in the distillation literature."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lkd.features.layers import FeatureLayers

Shortcut = Literal["A", "B"]


class _ZeroPadShortcut(nn.Module):
    """Shortcut of type A: subsample the pixels and pad the channels with zeros, half of them on each side."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"shortcut 'A' cannot reduce the number of channels, but num_filters decreases from {in_channels} to "
                f"{out_channels}; use increasing num_filters, or shortcut 'B'"
            )
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, feature: Tensor) -> Tensor:
        return F.pad(feature[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _shortcut(kind: Shortcut, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "A":
        return _ZeroPadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; the input of `relu2` is the sum."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(shortcut, in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, feature: Tensor) -> Tensor:
        residual = self.relu1(self.bn1(self.conv1(feature)))
        residual = self.bn2(self.conv2(residual))
        output: Tensor = self.relu2(residual + self.downsample(feature))
        return output


class CIFARResNet(nn.Module):
    """A ResNet for small images: a 3x3 convolution, three stages of two-layer blocks, and global average pooling.

    Images may have any size; the three stages operate at full, half and quarter resolution. Layers that provide
    features: `relu` (the stem), `layer1`, `layer2`, `layer3` (after ReLU), and `flatten` (the pooled feature `(B, C)`).
    The input of the last ReLU of a block, such as `layer1.0.relu2:input`, is its pre-activation.

    Args:
        depth: Number of layers with weights, 6n + 2: each stage has n blocks of two layers.
        num_filters: Numbers of channels of the stem and of the three stages.
        num_classes: Number of classes.
        in_channels: Number of input channels: 3 for color images, 1 for grayscale images.
        shortcut: Shortcut of blocks that change the shape: `B` is a projection (1x1 convolution and BatchNorm), as used
            in the distillation literature; `A` subsamples the input and pads it with zero channels, without parameters,
            as in the original CIFAR networks.

    Raises:
        ValueError: If the depth is not 6n + 2, a count is not positive, the shortcut is unknown, or shortcut `A` would
            have to remove channels.

    References:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2015 (arXiv 1512.03385), section 4.2.
        Names and order of the weights match the CIFAR-100 distillation benchmark (Tian et al., arXiv 1910.10699), which
        uses shortcut `B`, while the paper's CIFAR networks use `A`.

    Example:
        >>> import torch
        >>> network = CIFARResNet(depth=8, num_filters=(4, 4, 8, 16), num_classes=10, in_channels=1)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        num_filters: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int = 3,
        shortcut: Shortcut = "B",
    ) -> None:
        super().__init__()
        _check_arguments(depth, num_filters, num_classes, in_channels, shortcut)
        stem, *widths = num_filters
        num_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, widths[0], num_blocks, 1, shortcut)
        self.layer2 = _stage(widths[0], widths[1], num_blocks, 2, shortcut)
        self.layer3 = _stage(widths[1], widths[2], num_blocks, 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def feature_layers(self) -> FeatureLayers:
        """Names of the layers that provide features."""
        stages = ("layer1", "layer2", "layer3")
        last = [f"{stage}.{len(self.get_submodule(stage)) - 1}" for stage in stages]  # type: ignore[arg-type]
        return FeatureLayers(
            stem="relu",
            stages=stages,
            preacts=tuple(f"{block}.relu2:input" for block in last),
            norms=tuple(f"{block}.bn2" for block in last),
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
        feature = self.relu(self.bn1(self.conv1(image)))
        feature = self.layer3(self.layer2(self.layer1(feature)))
        logits: Tensor = self.fc(self.flatten(self.avgpool(feature)))
        return logits


def _stage(in_channels: int, out_channels: int, num_blocks: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = _BasicBlock(in_channels, out_channels, stride, shortcut)
    others = [_BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *others)


def _check_arguments(
    depth: int, num_filters: tuple[int, ...], num_classes: int, in_channels: int, shortcut: str
) -> None:
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth of a CIFAR ResNet must be 6n + 2 (8, 14, 20, 26, ...), got {depth}")
    if len(num_filters) != 4:
        raise ValueError(f"num_filters must have 4 elements (the stem and three stages), got {list(num_filters)}")
    if min(*num_filters, num_classes, in_channels) < 1:
        raise ValueError(
            f"num_filters, num_classes and in_channels must be at least 1, got {list(num_filters)}, "
            f"{num_classes} and {in_channels}"
        )
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut must be 'A' (zero-padded identity) or 'B' (projection), got {shortcut!r}")


_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)


def resnet8(num_classes: int, in_channels: int = 3, shortcut: Shortcut = "B") -> CIFARResNet:
    """ResNet-8 for small images (0.08 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.
        shortcut: `B` (projection) or `A` (zero-padded identity); see `CIFARResNet`.

    Returns:
        The network.

    Example:
        >>> import torch
        >>> resnet8(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return CIFARResNet(8, _NARROW, num_classes, in_channels, shortcut)


def resnet14(num_classes: int, in_channels: int = 3, shortcut: Shortcut = "B") -> CIFARResNet:
    """ResNet-14 for small images (0.18 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.
        shortcut: `B` (projection) or `A` (zero-padded identity); see `CIFARResNet`.

    Returns:
        The network.
    """
    return CIFARResNet(14, _NARROW, num_classes, in_channels, shortcut)


def resnet20(num_classes: int, in_channels: int = 3, shortcut: Shortcut = "B") -> CIFARResNet:
    """ResNet-20 for small images (0.28 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.
        shortcut: `B` (projection) or `A` (zero-padded identity); see `CIFARResNet`.

    Returns:
        The network.

    Example:
        >>> sum(weight.numel() for weight in resnet20(num_classes=10, shortcut="A").parameters())
        269722
    """
    return CIFARResNet(20, _NARROW, num_classes, in_channels, shortcut)


def resnet32(num_classes: int, in_channels: int = 3, shortcut: Shortcut = "B") -> CIFARResNet:
    """ResNet-32 for small images (0.47 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.
        shortcut: `B` (projection) or `A` (zero-padded identity); see `CIFARResNet`.

    Returns:
        The network.
    """
    return CIFARResNet(32, _NARROW, num_classes, in_channels, shortcut)


def resnet44(num_classes: int, in_channels: int = 3, shortcut: Shortcut = "B") -> CIFARResNet:
    """ResNet-44 for small images (0.67 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.
        shortcut: `B` (projection) or `A` (zero-padded identity); see `CIFARResNet`.

    Returns:
        The network.
    """
    return CIFARResNet(44, _NARROW, num_classes, in_channels, shortcut)


def resnet56(num_classes: int, in_channels: int = 3, shortcut: Shortcut = "B") -> CIFARResNet:
    """ResNet-56 for small images (0.86 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.
        shortcut: `B` (projection) or `A` (zero-padded identity); see `CIFARResNet`.

    Returns:
        The network.
    """
    return CIFARResNet(56, _NARROW, num_classes, in_channels, shortcut)


def resnet110(num_classes: int, in_channels: int = 3, shortcut: Shortcut = "B") -> CIFARResNet:
    """ResNet-110 for small images (1.7 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.
        shortcut: `B` (projection) or `A` (zero-padded identity); see `CIFARResNet`.

    Returns:
        The network.
    """
    return CIFARResNet(110, _NARROW, num_classes, in_channels, shortcut)


def resnet8x4(num_classes: int, in_channels: int = 3, shortcut: Shortcut = "B") -> CIFARResNet:
    """ResNet-8 for small images with four times as many channels (1.2 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.
        shortcut: `B` (projection) or `A` (zero-padded identity); see `CIFARResNet`.

    Returns:
        The network.
    """
    return CIFARResNet(8, _WIDE, num_classes, in_channels, shortcut)


def resnet32x4(num_classes: int, in_channels: int = 3, shortcut: Shortcut = "B") -> CIFARResNet:
    """ResNet-32 for small images with four times as many channels (7.4 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.
        shortcut: `B` (projection) or `A` (zero-padded identity); see `CIFARResNet`.

    Returns:
        The network.
    """
    return CIFARResNet(32, _WIDE, num_classes, in_channels, shortcut)
