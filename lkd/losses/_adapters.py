"""Adapters between student and teacher features: pooling, projections, embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Pooling = Literal["mean", "max"]


def same_size(student: Tensor, teacher: Tensor, pooling: Pooling = "mean") -> tuple[Tensor, Tensor]:
    """Two feature maps at the smaller one's size: the larger is pooled.

    Args:
        student: `(B, C, H, W)`.
        teacher: `(B, D, H', W')`.
        pooling: Whether a pixel is the mean or the largest value of those that it stands for.

    Returns:
        Both, with min(H, H') rows and min(W, W') columns.
    """
    height, width = (min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return pooled_to(student, (height, width), pooling), pooled_to(teacher, (height, width), pooling)


def pooled_to(feature: Tensor, size: tuple[int, int], pooling: Pooling = "mean") -> Tensor:
    """A feature map pooled to `size`; as it is if it has that size.

    Args:
        feature: `(B, C, H, W)`.
        size: Rows and columns; where there are more than the map has, its pixels are repeated.
        pooling: Whether a pixel is the mean or the largest value of those that it stands for.

    Returns:
        `(B, C, *size)`.
    """
    if feature.shape[2:] == size:
        return feature
    return F.adaptive_avg_pool2d(feature, size) if pooling == "mean" else F.adaptive_max_pool2d(feature, size)


def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 1x1 convolution without bias, and a BatchNorm.

    Args:
        in_channels: Channels of the student's feature.
        out_channels: Channels of the teacher's.
    """
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


def projections(pairs: Iterable[tuple[Tensor, Tensor]]) -> nn.ModuleList:
    """A `projection` for each of the student's features, to the channels of the teacher's.

    Args:
        pairs: The student's feature `(B, C, H, W)` and the teacher's `(B, D, H', W')`.
    """
    return nn.ModuleList(projection(ours.shape[1], theirs.shape[1]) for ours, theirs in pairs)


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


def embedding(feature: Tensor, feat_dim: int) -> nn.Sequential:
    """A linear map of a feature, flattened if it is a map, to a vector.

    Args:
        feature: An example `(B, ...)`.
        feat_dim: Length of the vector.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(feature[0].numel(), feat_dim))


def normalized_linear(in_features: int, out_features: int, eps: float = 1e-5, affine: bool = True) -> nn.Sequential:
    """A linear layer and a BatchNorm, which makes a bias of the former useless."""
    return nn.Sequential(
        nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features, eps=eps, affine=affine)
    )
