"""MobileNetV2 for small images."""

from __future__ import annotations

from torch import Tensor, nn

from lkd.features.layers import FeatureLayers
from lkd.models.parts import check_counts, initialize_convolutions

# For each stage: channels at width 1, number of blocks, stride of the first block.
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
_STEM = 32
_POOLED = 1280


class _InvertedResidual(nn.Module):
    """Inverted residual: 1x1 expansion, 3x3 depthwise convolution, and 1x1 projection without ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.is_residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *_conv_bn_relu(in_channels, inner, 1),
            *_conv_bn_relu(inner, inner, 3, stride, groups=inner),
            *_conv_bn_relu(inner, out_channels, 1)[:2],
        )

    def forward(self, feature: Tensor) -> Tensor:
        output: Tensor = self.conv(feature)
        return feature + output if self.is_residual else output


class MobileNetV2(nn.Module):
    """MobileNetV2 for small images, whose last feature map has 2x2 pixels for images of 32x32.

    Layers that provide features:

    - `conv1`, `blocks.1`, `blocks.2`, `blocks.4`, `blocks.6`: the benchmark's features f0 to f4;
    - `flatten`: the pooled feature `(B, 1280)`.

    The benchmark defines no pre-activations for this network. No ReLU follows a stage, so f1 to f4 can be used as such.

    Args:
        width: Width multiplier of the channels, 1 in the paper. The last layer has 1280 channels, or more if the width
            is greater than 1.
        num_classes: Number of classes.
        in_channels: Number of input channels: 3 for color images, 1 for grayscale images.
        expansion: Expansion factor of the channels within a block.

    Raises:
        ValueError: If a count is not positive, or the width is so small that a stage has no channels.

    References:
        Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018
        (arXiv 1801.04381). Strides, names and order of the weights match the CIFAR-100 distillation benchmark (Tian et
        al., arXiv 1910.10699), in which the second stage keeps the resolution and the first one has an expansion
        convolution as well, with factor 1.

    Example:
        >>> import torch
        >>> MobileNetV2(width=0.25, num_classes=10, in_channels=1).eval()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: float, num_classes: int, in_channels: int = 3, expansion: int = 6) -> None:
        super().__init__()
        if int(_STAGES[0][0] * width) < 1:
            raise ValueError(f"width must be at least {1 / _STAGES[0][0]} for all stages to have channels, got {width}")
        check_counts(num_classes=num_classes, in_channels=in_channels, expansion=expansion)
        before = int(_STEM * width)
        pooled = max(_POOLED, int(_POOLED * width))
        self.conv1 = nn.Sequential(*_conv_bn_relu(in_channels, before, 3, stride=2))
        self.blocks = nn.Sequential()
        for channels, num_blocks, stride in _STAGES:
            after = int(channels * width)
            first = _InvertedResidual(before, after, stride, expansion if len(self.blocks) else 1)
            others = [_InvertedResidual(after, after, 1, expansion) for _ in range(num_blocks - 1)]
            self.blocks.append(nn.Sequential(first, *others))
            before = after
        self.conv2 = nn.Sequential(*_conv_bn_relu(before, pooled, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        linear = nn.Linear(pooled, num_classes)
        self.classifier = nn.Sequential(linear)
        initialize_convolutions(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Names of the layers that provide features; `preacts` equals `stages`, since stages end without a ReLU."""
        stages = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")
        return FeatureLayers(
            stem="conv1",
            stages=stages,
            preacts=stages,
            norms=tuple(f"{stage}.{len(self.get_submodule(stage)) - 1}.conv.7" for stage in stages),  # type: ignore[arg-type]
            map="avgpool:input",
            pooled="flatten",
            head="classifier.0",
        )

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits of a batch of images.

        Args:
            image: `(B, in_channels, H, W)`, float, normalized.

        Returns:
            Logits `(B, num_classes)`.
        """
        feature = self.conv2(self.blocks(self.conv1(image)))
        logits: Tensor = self.classifier(self.flatten(self.avgpool(feature)))
        return logits


def _conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    padding = kernel_size // 2
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


def mobilenetv2(num_classes: int, in_channels: int = 3) -> MobileNetV2:
    """MobileNetV2 with width 0.5 for small images (0.81 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return MobileNetV2(0.5, num_classes, in_channels)
