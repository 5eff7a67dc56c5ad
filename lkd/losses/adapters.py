"""What brings a student's feature to a teacher's shape."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two feature maps at the smaller one's size: the larger is averaged over the pixels.

    Args:
        student: `(B, C, H, W)`.
        teacher: `(B, D, H', W')`.

    Returns:
        Both, with min(H, H') rows and min(W, W') columns.
    """
    height, width = (min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return pooled_to(student, (height, width)), pooled_to(teacher, (height, width))


def pooled_to(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """A feature map averaged to `size`; as it is if it has that size.

    Args:
        feature: `(B, C, H, W)`.
        size: Rows and columns, at most H and W.

    Returns:
        `(B, C, *size)`.
    """
    return feature if feature.shape[2:] == size else F.adaptive_avg_pool2d(feature, size)


def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 1x1 convolution without bias, and a BatchNorm.

    Args:
        in_channels: Channels of the student's feature.
        out_channels: Channels of the teacher's.
    """
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


def bottleneck(in_channels: int, inner_channels: int, out_channels: int) -> nn.Sequential:
    """Convolutions 1x1, 3x3 and 1x1 without bias, with BatchNorm and ReLU between them.

    Args:
        in_channels: Channels of the student's feature.
        inner_channels: Channels in between.
        out_channels: Channels of the teacher's feature.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, inner_channels, 1, bias=False),
        nn.BatchNorm2d(inner_channels),
        nn.ReLU(),
        nn.Conv2d(inner_channels, inner_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner_channels),
        nn.ReLU(),
        nn.Conv2d(inner_channels, out_channels, 1, bias=False),
    )


def generator(channels: int) -> nn.Sequential:
    """Two 3x3 convolutions with a ReLU between them: they make a feature map of a masked one.

    Args:
        channels: Channels of both.
    """
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second)


def check_dims(owner: str, dims: int, **features: Tensor) -> None:
    """Say which layer has not the form that a criterion reads.

    Args:
        owner: The criterion's name.
        dims: 4: feature maps `(B, C, H, W)`; 3: tokens `(B, N, C)`; 2: pooled features `(B, C)`.
        features: What to call a feature, and the feature.

    Raises:
        ValueError: If one has another number of dimensions.
    """
    forms = {4: "feature maps (B, C, H, W)", 3: "tokens (B, N, C)", 2: "pooled features (B, C)"}
    for name, feature in features.items():
        if feature.ndim != dims:
            raise ValueError(
                f"{owner} reads {forms[dims]}; the {name} layer returns {tuple(feature.shape)}: name another layer"
            )
