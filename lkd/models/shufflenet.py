"""ShuffleNetV1 and ShuffleNetV2 for small images."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from lkd.features.layers import FeatureLayers
from lkd.models.parts import check_counts

_STEM = 24


class _GroupBlock(nn.Module):
    """Grouped 1x1 convolutions around a 3x3 depthwise one; `relu3` receives the sum or concatenation with the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        made = out_channels if stride == 1 else out_channels - in_channels
        inner = made // 4
        first_groups = 1 if in_channels == _STEM else groups  # the stem has too few channels for groups
        self.is_residual = stride == 1
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, made, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.shortcut = nn.Identity() if self.is_residual else nn.AvgPool2d(3, stride=2, padding=1)
        self.relu3 = nn.ReLU()

    def forward(self, feature: Tensor) -> Tensor:
        made = self.shuffle(self.relu1(self.bn1(self.conv1(feature))))
        made = self.relu2(self.bn2(self.conv2(made)))
        made = self.bn3(self.conv3(made))
        kept = self.shortcut(feature)
        output: Tensor = self.relu3(made + kept if self.is_residual else torch.cat([made, kept], dim=1))
        return output


class ShuffleNetV1(nn.Module):
    """ShuffleNetV1 for small images: a 1x1 convolution, three stages, and global average pooling.

    Images may have any size; the three stages operate at half, quarter and one eighth of the resolution. Layers that
    provide features:

    - `relu`, `layer1`, `layer2`, `layer3`: the benchmark's features f0 to f3 (after ReLU);
    - `flatten`: the pooled feature `(B, C)`;
    - `layer1.3.relu3:input`, `layer2.7.relu3:input`, `layer3.3.relu3:input`: the benchmark's pre-activations.

    Args:
        num_filters: Numbers of channels of the three stages, increasing from the 24 channels of the stem; each must be
            a multiple of 4 * groups.
        groups: Number of groups of the 1x1 convolutions.
        num_classes: Number of classes.
        in_channels: Number of input channels: 3 for color images, 1 for grayscale images.

    Raises:
        ValueError: If the numbers of channels do not increase or are not divisible as required, or a count is not
            positive.

    References:
        Zhang, Zhou, Lin, Sun: ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, CVPR
        2018 (arXiv 1707.01083). Layers, names and order of the weights match the CIFAR-100 distillation benchmark (Tian
        et al., arXiv 1910.10699), which, unlike the paper, has a ReLU after the 3x3 convolutions.

    Example:
        >>> import torch
        >>> network = ShuffleNetV1((48, 96, 192), groups=2, num_classes=10, in_channels=1)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_filters: tuple[int, int, int], groups: Literal[1, 2, 3], num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        if groups not in (1, 2, 3):
            raise ValueError(f"groups of ShuffleNetV1 must be 1, 2 or 3, got {groups}")
        widths = (_STEM, *num_filters)
        if len(widths) != 4 or any(after <= before or after % (4 * groups) for before, after in pairwise(widths)):
            raise ValueError(
                f"num_filters must be 3 increasing multiples of {4 * groups} (4 * groups), each greater than {_STEM}, "
                f"got {list(num_filters)}"
            )
        check_counts(num_classes=num_classes, in_channels=in_channels)
        self.conv1 = nn.Conv2d(in_channels, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = _group_stage(_STEM, widths[1], 4, groups)
        self.layer2 = _group_stage(widths[1], widths[2], 8, groups)
        self.layer3 = _group_stage(widths[2], widths[3], 4, groups)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(num_filters[-1], num_classes)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Names of the layers that provide features."""
        stages = ("layer1", "layer2", "layer3")
        last = [f"{stage}.{len(self.get_submodule(stage)) - 1}" for stage in stages]  # type: ignore[arg-type]
        return FeatureLayers(
            stem="relu",
            stages=stages,
            preacts=tuple(f"{block}.relu3:input" for block in last),
            norms=tuple(f"{block}.bn3" for block in last),
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
        feature = self.layer3(self.layer2(self.layer1(feature)))
        logits: Tensor = self.linear(self.flatten(self.avgpool(feature)))
        return logits


def _group_stage(in_channels: int, out_channels: int, num_blocks: int, groups: int) -> nn.Sequential:
    others = [_GroupBlock(out_channels, out_channels, 1, groups) for _ in range(num_blocks - 1)]
    return nn.Sequential(_GroupBlock(in_channels, out_channels, 2, groups), *others)


class _SplitBlock(nn.Module):
    """Half of the channels are passed through, the other half is filtered; `relu3` receives their concatenation.

    The passed channels are already non-negative, so this ReLU does not change them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, feature: Tensor) -> Tensor:
        kept, made = feature.chunk(2, dim=1)
        made = self.relu1(self.bn1(self.conv1(made)))
        made = self.bn3(self.conv3(self.bn2(self.conv2(made))))
        output: Tensor = self.shuffle(self.relu3(torch.cat([kept, made], dim=1)))
        return output


class _DownBlock(nn.Module):
    """Two branches that process all channels at half the resolution and are concatenated."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, feature: Tensor) -> Tensor:
        left = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(feature)))))
        right = self.relu3(self.bn3(self.conv3(feature)))
        right = self.relu5(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        output: Tensor = self.shuffle(torch.cat([left, right], dim=1))
        return output


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 for small images: a 1x1 convolution, three stages, a 1x1 convolution, and global average pooling.

    Images may have any size; the three stages operate at half, quarter and one eighth of the resolution. Layers that
    provide features:

    - `relu`, `layer1`, `layer2`, `layer3`: the benchmark's features f0 to f3 (after ReLU, shuffled);
    - `flatten`: the pooled feature `(B, C)`;
    - `layer1.3.relu3:input`, `layer2.7.relu3:input`, `layer3.3.relu3:input`: the benchmark's pre-activations (not
      shuffled).

    Args:
        num_filters: Numbers of channels of the three stages, which must be even, and of the last convolution. The paper
            uses (48, 96, 192, 1024), (116, 232, 464, 1024), (176, 352, 704, 1024) and (244, 488, 976, 2048).
        num_classes: Number of classes.
        in_channels: Number of input channels: 3 for color images, 1 for grayscale images.

    Raises:
        ValueError: If the number of channels of a stage is odd, or a count is not positive.

    References:
        Ma, Zhang, Zheng, Sun: ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018
        (arXiv 1807.11164). Names and order of the weights match the CIFAR-100 distillation benchmark (Tian et al.,
        arXiv 1910.10699), which replaces the paper's 3x3 convolution and max pooling by a 1x1 convolution without
        stride.

    Example:
        >>> import torch
        >>> network = ShuffleNetV2((8, 16, 32, 64), num_classes=10, in_channels=1)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_filters: tuple[int, int, int, int], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if len(num_filters) != 4 or any(width % 2 for width in num_filters[:3]):
            raise ValueError(
                f"num_filters must have 4 elements, of which the first 3 (the stages) are even, got {list(num_filters)}"
            )
        check_counts(num_filters=num_filters, num_classes=num_classes, in_channels=in_channels)
        first, second, third, pooled = num_filters
        self.conv1 = nn.Conv2d(in_channels, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = _split_stage(_STEM, first, 4)
        self.layer2 = _split_stage(first, second, 8)
        self.layer3 = _split_stage(second, third, 4)
        self.conv2 = nn.Conv2d(third, pooled, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(pooled)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(pooled, num_classes)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Names of the layers that provide features; no `norms`: half of a stage's output bypasses its last block."""
        stages = ("layer1", "layer2", "layer3")
        last = [f"{stage}.{len(self.get_submodule(stage)) - 1}" for stage in stages]  # type: ignore[arg-type]
        return FeatureLayers(
            stem="relu",
            stages=stages,
            preacts=tuple(f"{block}.relu3:input" for block in last),
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
        feature = self.layer3(self.layer2(self.layer1(feature)))
        feature = self.relu2(self.bn2(self.conv2(feature)))
        logits: Tensor = self.linear(self.flatten(self.avgpool(feature)))
        return logits


def _split_stage(in_channels: int, out_channels: int, num_blocks: int) -> nn.Sequential:
    others = [_SplitBlock(out_channels) for _ in range(num_blocks - 1)]
    return nn.Sequential(_DownBlock(in_channels, out_channels), *others)


def shufflev1(num_classes: int, in_channels: int = 3) -> ShuffleNetV1:
    """ShuffleNetV1 with three groups for small images (0.95 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return ShuffleNetV1((240, 480, 960), 3, num_classes, in_channels)


def shufflev2(num_classes: int, in_channels: int = 3) -> ShuffleNetV2:
    """ShuffleNetV2 with width 1 for small images (1.4 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return ShuffleNetV2((116, 232, 464, 1024), num_classes, in_channels)
