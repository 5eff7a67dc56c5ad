"""U-Net for semantic segmentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.features.layers import FeatureLayers
from lkd.models.parts import check_counts, initialize_convolutions


class UNet(nn.Module):
    """U-Net with BatchNorm and padded convolutions, which returns logits at the size of the image.

    Each encoder stage has two 3x3 convolutions and is followed by max pooling, except for the last one; each decoder
    stage interpolates its input to the size of the encoder's map, appends that map, and has two 3x3 convolutions.
    Layers that provide features:

    - `encoder.0`, `encoder.1`, ...: outputs of the encoder stages;
    - `decoder.0`, `decoder.1`, ...: outputs of the decoder stages, the last one at the size of the image.

    Args:
        num_filters: Numbers of channels of the encoder stages, at least two; the decoder has the same in reverse order.
        num_classes: Number of classes.
        in_channels: Number of input channels: 3 for color images, 1 for grayscale images.

    Raises:
        ValueError: If there are fewer than two stages or a count is not positive.

    References:
        Ronneberger, Fischer, Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation, MICCAI 2015
        (arXiv 1505.04597). BatchNorm, padding and interpolation are not part of the paper.

    Example:
        >>> UNet((4, 8), num_classes=5)(torch.zeros(2, 3, 9, 12)).shape
        torch.Size([2, 5, 9, 12])
    """

    def __init__(self, num_filters: tuple[int, ...], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if len(num_filters) < 2:
            raise ValueError(f"num_filters must have at least 2 elements (one per stage), got {list(num_filters)}")
        check_counts(num_filters=num_filters, num_classes=num_classes, in_channels=in_channels)
        inputs = (in_channels, *num_filters[:-1])
        self.encoder = nn.ModuleList(_stage(*channels) for channels in zip(inputs, num_filters, strict=True))
        upward = list(zip(num_filters[::-1], num_filters[-2::-1], strict=False))
        self.decoder = nn.ModuleList(_stage(below + beside, beside) for below, beside in upward)
        self.head = nn.Conv2d(num_filters[0], num_classes, 1)
        initialize_convolutions(self)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Layers that criteria refer to by name: `@stages` (the encoder), `@decoder`, `@head` and its input, `@map`."""
        stages = tuple(f"encoder.{number}" for number in range(len(self.encoder)))
        decoder = tuple(f"decoder.{number}" for number in range(len(self.decoder)))
        return FeatureLayers(stages=stages, decoder=decoder, map="head:input", head="head")

    def forward(self, input: Tensor) -> Tensor:
        """Compute the logits `(B, K, H, W)` of images `(B, C, H, W)`."""
        maps = []
        for number, stage in enumerate(self.encoder):
            input = stage(F.max_pool2d(input, 2) if number else input)
            maps.append(input)
        for stage, beside in zip(self.decoder, maps[-2::-1], strict=True):
            above = F.interpolate(input, beside.shape[2:], mode="nearest")
            input = stage(torch.cat((above, beside), 1))
        logits: Tensor = self.head(input)
        return logits


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)
