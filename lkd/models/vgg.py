"""VGG networks for small images, with BatchNorm and a single linear layer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lkd.features.layers import FeatureLayers
from lkd.models.parts import check_counts, initialize_convolutions

_NUM_CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_LARGE = 64  # image height in pixels


class VGG(nn.Module):
    """A VGG for small images: five stages of 3x3 convolutions with BatchNorm, average pooling, and one linear layer.

    The first three stages are followed by max pooling, and so is the fourth if images are at least 64 pixels high (in
    the benchmark: exactly 64), so the last stage has 4x4 pixels for images of 32x32 and of 64x64. Layers that provide
    features:

    - `relu0`, `relu1`, `relu2`, `relu3`, `relu4`: the benchmark's features f0 to f4;
    - `flatten`: the pooled feature `(B, C)`;
    - `block1`, `block2`, `block3`, `block4`: the benchmark's pre-activations; these blocks end before their last ReLU.

    Args:
        depth: Number of layers with weights, counting the three linear layers of the original VGG: 8, 11, 13, 16 or 19.
        num_filters: Numbers of channels of the five stages.
        num_classes: Number of classes.
        in_channels: Number of input channels: 3 for color images, 1 for grayscale images.

    Raises:
        ValueError: If the depth is not supported or a count is not positive.

    References:
        Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015
        (arXiv 1409.1556). Layers, names and order of the weights match the CIFAR-100 distillation benchmark (Tian et
        al., arXiv 1910.10699); VGG-8, BatchNorm and the single linear layer are not part of the paper.

    Example:
        >>> import torch
        >>> network = VGG(depth=8, num_filters=(4, 8, 8, 16, 16), num_classes=10, in_channels=1)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: Literal[8, 11, 13, 16, 19],
        num_filters: tuple[int, int, int, int, int],
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth not in _NUM_CONVOLUTIONS:
            raise ValueError(f"depth of VGG must be one of {', '.join(map(str, _NUM_CONVOLUTIONS))}, got {depth}")
        if len(num_filters) != 5:
            raise ValueError(f"num_filters must have 5 elements (one per stage), got {list(num_filters)}")
        check_counts(num_filters=num_filters, num_classes=num_classes, in_channels=in_channels)
        first, second, third, fourth, fifth = num_filters
        numbers = _NUM_CONVOLUTIONS[depth]
        self.block0 = _stage(in_channels, first, numbers[0])
        self.relu0 = nn.ReLU()
        self.block1 = _stage(first, second, numbers[1])
        self.relu1 = nn.ReLU()
        self.block2 = _stage(second, third, numbers[2])
        self.relu2 = nn.ReLU()
        self.block3 = _stage(third, fourth, numbers[3])
        self.relu3 = nn.ReLU()
        self.block4 = _stage(fourth, fifth, numbers[4])
        self.relu4 = nn.ReLU()
        self.pool0 = nn.MaxPool2d(2)
        self.pool1 = nn.MaxPool2d(2)
        self.pool2 = nn.MaxPool2d(2)
        self.pool3 = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(fifth, num_classes)
        initialize_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    @property
    def feature_layers(self) -> FeatureLayers:
        """Names of the layers that provide features."""
        blocks = ("block1", "block2", "block3", "block4")
        return FeatureLayers(
            stem="relu0",
            stages=("relu1", "relu2", "relu3", "relu4"),
            preacts=blocks,
            norms=tuple(f"{block}.{len(self.get_submodule(block)) - 1}" for block in blocks),  # type: ignore[arg-type]
            map="avgpool:input",
            pooled="flatten",
            head="classifier",
        )

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits of a batch of images.

        Args:
            image: `(B, in_channels, H, W)`, float, normalized; at least 8 pixels high and wide.

        Returns:
            Logits `(B, num_classes)`.
        """
        feature = self.relu0(self.block0(image))
        feature = self.relu1(self.block1(self.pool0(feature)))
        feature = self.relu2(self.block2(self.pool1(feature)))
        feature = self.relu3(self.block3(self.pool2(feature)))
        if image.shape[2] >= _LARGE:
            feature = self.pool3(feature)
        feature = self.relu4(self.block4(feature))
        logits: Tensor = self.classifier(self.flatten(self.avgpool(feature)))
        return logits


def _stage(in_channels: int, out_channels: int, num_convolutions: int) -> nn.Sequential:
    """Create a stage without its last ReLU, which is a separate layer, so that the stage outputs the pre-activation."""
    layers: list[nn.Module] = []
    for position in range(num_convolutions):
        before = out_channels if position else in_channels
        layers += [nn.Conv2d(before, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


_FILTERS = (64, 128, 256, 512, 512)


def vgg8(num_classes: int, in_channels: int = 3) -> VGG:
    """VGG-8 for small images (4.0 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return VGG(8, _FILTERS, num_classes, in_channels)


def vgg11(num_classes: int, in_channels: int = 3) -> VGG:
    """VGG-11 for small images (9.3 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return VGG(11, _FILTERS, num_classes, in_channels)


def vgg13(num_classes: int, in_channels: int = 3) -> VGG:
    """VGG-13 for small images (9.5 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return VGG(13, _FILTERS, num_classes, in_channels)


def vgg16(num_classes: int, in_channels: int = 3) -> VGG:
    """VGG-16 for small images (15 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return VGG(16, _FILTERS, num_classes, in_channels)


def vgg19(num_classes: int, in_channels: int = 3) -> VGG:
    """VGG-19 for small images (20 million parameters for 100 classes).

    Args:
        num_classes: Number of classes.
        in_channels: Number of input channels.

    Returns:
        The network.
    """
    return VGG(19, _FILTERS, num_classes, in_channels)
