"""Knowledge review (ReviewKD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._adapters import channel_pairs, pooled_to, projection
from lkd.losses._checks import check_dims
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature="B C H W", teacher_feature="B C H W")
@full_precision
def hcl_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Hierarchical context loss: mean squared errors between feature maps at several pooled sizes.

    $$ \left( \mathrm{MSE}(F_s, F_t) + \sum_{k=1}^{K} 2^{-k} \, \mathrm{MSE}(P_k F_s, P_k F_t) \right) \Big/
       \sum_{k=0}^{K} 2^{-k} $$

    $P_k$ average-pools a map to the k-th of those sizes among 4x4, 2x2 and 1x1 that are smaller than the map.

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, C, H, W)`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Chen et al.: Distilling Knowledge via Knowledge Review, CVPR 2021 (arXiv 2104.09044). The weights follow the
        authors' code.

    Example:
        >>> round(hcl_loss(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)).item(), 4)
        1.0
    """
    sizes = [size for size in (4, 2, 1) if size < min(student_feature.shape[2:])]
    loss, weight, total = F.mse_loss(student_feature, teacher_feature), 1.0, 1.0
    for size in sizes:
        student, teacher = (pooled_to(feature, (size, size)) for feature in (student_feature, teacher_feature))
        weight /= 2
        loss = loss + weight * F.mse_loss(student, teacher)
        total += weight
    return loss / total


class _Fusion(nn.Module):
    """Attention-based fusion (ABF) of the feature map of one level with the output of the deeper level.

    Args:
        in_channels: Number of channels of the student's map.
        mid_channels: Number of channels passed from level to level.
        out_channels: Number of channels of the teacher's map.
        is_deepest: Whether this is the deepest level.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, is_deepest: bool) -> None:
        super().__init__()
        self.reduce = projection(in_channels, mid_channels)
        self.attention = None if is_deepest else nn.Conv2d(2 * mid_channels, 2, kernel_size=1)
        self.expand = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, feature: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the map compared with the teacher's and the map passed to the next level, both of the given `size`."""
        fused = self.reduce(feature)
        if self.attention is not None and deeper is not None:
            deeper = _resized(deeper, fused.shape[2:])
            weight, deeper_weight = self.attention(torch.cat([fused, deeper], 1)).sigmoid().split(1, dim=1)
            fused = weight * fused + deeper_weight * deeper
        fused = _resized(fused, size)
        return self.expand(fused), fused


def _resized(feature: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a feature map by nearest-neighbor interpolation."""
    return feature if feature.shape[2:] == size else F.interpolate(feature, tuple(size), mode="nearest")


def _as_map(feature: Tensor) -> Tensor:
    """Reshape pooled features `(B, C)` to 1x1 maps; return maps unchanged."""
    return feature[:, :, None, None] if feature.ndim == 2 else feature


class ReviewKD(DistillLoss):
    """Knowledge review: fuse levels from deep to shallow.

    The feature map of each level is fused with the output of the deeper levels by an attention mechanism and compared
    with the teacher's map by `hcl_loss`. Levels may have any number of channels and any size. Pooled features are
    treated as 1x1 maps.

    Args:
        student_layers: Student layers, ordered from the first to the deepest.
        teacher_layers: Teacher layers, one for each student layer.
        max_mid_channels: Upper bound for the number of channels passed from level to level, which otherwise equals the
            number of channels of the student's deepest layer.

    Raises:
        ValueError: If `max_mid_channels` is less than 1. At the start of training, if a layer returns neither a feature
            map nor a pooled feature.

    References:
        Chen et al.: Distilling Knowledge via Knowledge Review, CVPR 2021 (arXiv 2104.09044). As in the authors' code,
        the teacher's maps are pre-activations. The student's maps are pre-activations (`@preacts`) for ImageNet and
        post-activation maps for CIFAR-100. The authors' list of student layers starts with the input of the first
        stage, which is not used by any level.
    """

    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@stages", "@pooled"),
        teacher_layers: Sequence[str] = ("@preacts", "@pooled"),
        max_mid_channels: int = 512,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if max_mid_channels < 1:
            raise ValueError(f"max_mid_channels must be at least 1, got {max_mid_channels}; typically 512")
        self.max_mid_channels = max_mid_channels

    def levels(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of student and teacher feature maps, the deepest first."""
        return [
            (_as_map(student_feature), _as_map(teacher_feature))
            for student_feature, teacher_feature in reversed(self.pairs(student, teacher))
        ]

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the fusion modules."""
        levels = self.levels(student.outputs, teacher.outputs)
        for student_feature, teacher_feature in levels:
            check_dims("ReviewKD", 4, student=student_feature, teacher=teacher_feature)
        channels = channel_pairs(levels)
        middle = min(channels[0][0], self.max_mid_channels)
        self.fusions = nn.ModuleList(
            _Fusion(in_channels, middle, out_channels, is_deepest=depth == 0)
            for depth, (in_channels, out_channels) in enumerate(channels)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `hcl_loss` over the levels."""
        deeper, losses = None, []
        for fusion, (student_feature, teacher_feature) in zip(self.fusions, self.levels(student, teacher), strict=True):
            output, deeper = fusion(student_feature, deeper, teacher_feature.shape[2:])
            losses.append(hcl_loss(output, teacher_feature))
        return total(losses)
