"""Adapters between student and teacher features: pooling, projections, embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Pooling = Literal["mean", "max"]


def same_size(student: Tensor, teacher: Tensor, pooling: Pooling = "mean") -> tuple[Tensor, Tensor]:
    """Pool the larger of two feature maps to the size of the smaller one.

    Args:
        student: Student feature map `(B, C, H, W)`.
        teacher: Teacher feature map `(B, D, H', W')`.
        pooling: Average or maximum pooling.

    Returns:
        Both feature maps with min(H, H') rows and min(W, W') columns.
    """
    height, width = (min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return pooled_to(student, (height, width), pooling), pooled_to(teacher, (height, width), pooling)


def pooled_to(feature: Tensor, size: tuple[int, int], pooling: Pooling = "mean") -> Tensor:
    """Pool a feature map to `size`; return it unchanged if it has that size.

    Args:
        feature: Feature map `(B, C, H, W)`.
        size: Rows and columns. If the map has fewer of them, its pixels are repeated.
        pooling: Average or maximum pooling.

    Returns:
        Feature map `(B, C, *size)`.
    """
    if feature.shape[2:] == size:
        return feature
    return F.adaptive_avg_pool2d(feature, size) if pooling == "mean" else F.adaptive_max_pool2d(feature, size)


def aligner(in_channels: int, out_channels: int) -> nn.Module:
    """Create a 1x1 convolution where the numbers of channels differ, and the identity where they are equal.

    Args:
        in_channels: Number of channels of the student's feature.
        out_channels: Number of channels of the teacher's feature.
    """
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)


def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """Create a 1x1 convolution without bias, followed by BatchNorm.

    Args:
        in_channels: Number of channels of the student's feature.
        out_channels: Number of channels of the teacher's feature.
    """
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


def channel_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    """Return the numbers of channels of pairs of features.

    Args:
        pairs: Student features `(B, C, ...)` and teacher features `(B, D, ...)`.
    """
    return [(student.shape[1], teacher.shape[1]) for student, teacher in pairs]


def projections(pairs: Iterable[tuple[Tensor, Tensor]]) -> nn.ModuleList:
    """Create a `projection` of each student feature to the channels of the teacher feature.

    Args:
        pairs: Student features `(B, C, H, W)` and teacher features `(B, D, H', W')`.
    """
    return nn.ModuleList(projection(*channels) for channels in channel_pairs(pairs))


def projection_head(in_channels: int, out_channels: int) -> nn.Sequential:
    """Create two 1x1 convolutions without bias, with BatchNorm and ReLU in between.

    Args:
        in_channels: Number of channels of the student's feature.
        out_channels: Number of inner channels, and of channels of the teacher's feature.
    """
    return nn.Sequential(
        *projection(in_channels, out_channels), nn.ReLU(), nn.Conv2d(out_channels, out_channels, 1, bias=False)
    )


def bottleneck(in_channels: int, inner_channels: int, out_channels: int) -> nn.Sequential:
    """Create 1x1, 3x3 and 1x1 convolutions without bias, with BatchNorm and ReLU in between.

    Args:
        in_channels: Number of channels of the student's feature.
        inner_channels: Number of inner channels.
        out_channels: Number of channels of the teacher's feature.
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
    """Create two 3x3 convolutions with a ReLU in between, which generate a feature map from a masked one.

    Args:
        channels: Number of input and output channels.
    """
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second)


def embedding(feature: Tensor, feat_dim: int) -> nn.Sequential:
    """Create a linear embedding of a feature, which is flattened first.

    Args:
        feature: Example feature `(B, ...)`.
        feat_dim: Size of the embedding.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(feature[0].numel(), feat_dim))


def normalized_linear(in_features: int, out_features: int, eps: float = 1e-5, affine: bool = True) -> nn.Sequential:
    """Create a linear layer without bias, which would be redundant, followed by BatchNorm.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        eps: Constant added to the variance in BatchNorm.
        affine: Whether BatchNorm has scale and shift parameters.
    """
    return nn.Sequential(
        nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features, eps=eps, affine=affine)
    )


def aligners(pairs: Iterable[tuple[Tensor, Tensor]]) -> nn.ModuleList:
    """Create a 1x1 convolution without bias for each pair whose numbers of channels differ, and identities otherwise.

    Args:
        pairs: Student features `(B, C, H, W)` and teacher features `(B, D, H', W')`.
    """
    return nn.ModuleList(
        nn.Identity() if student == teacher else nn.Conv2d(student, teacher, 1, bias=False)
        for student, teacher in channel_pairs(pairs)
    )
