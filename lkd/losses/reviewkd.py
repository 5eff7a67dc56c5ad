"""Knowledge review (ReviewKD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkd.losses._adapters import pooled_to, projection
from lkd.losses._checks import check_dims
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature="B C H W", teacher_feature="B C H W")
@full_precision
def hcl_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Hierarchical context loss: mean squared differences of two feature maps and of their pooled forms.

    $$ \left( \mathrm{MSE}(F_s, F_t) + \sum_{k=1}^{K} 2^{-k} \, \mathrm{MSE}(P_k F_s, P_k F_t) \right) \Big/
       \sum_{k=0}^{K} 2^{-k} $$

    $P_k$ averages a map to the k-th of the sizes 4x4, 2x2 and 1x1 that are smaller than it.

    Args:
        student_feature: `(B, C, H, W)`.
        teacher_feature: `(B, C, H, W)`.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Chen et al.: Distilling Knowledge via Knowledge Review, CVPR 2021 (arXiv 2104.09044); the weights are the
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
    """Attention-based fusion of one level's feature map with what came from the deeper levels.

    Args:
        in_channels: Channels of the student's map.
        mid_channels: Channels of what goes from level to level.
        out_channels: Channels of the teacher's map.
        is_deepest: Whether there is no deeper level.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, is_deepest: bool) -> None:
        super().__init__()
        self.reduce = projection(in_channels, mid_channels)
        self.attention = None if is_deepest else nn.Conv2d(2 * mid_channels, 2, kernel_size=1)
        self.expand = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, feature: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher's map of that `size`, and what goes to the next level, of the same size."""
        fused = self.reduce(feature)
        if self.attention is not None and deeper is not None:
            deeper = _resized(deeper, fused.shape[2:])
            own, other = self.attention(torch.cat([fused, deeper], 1)).sigmoid().split(1, dim=1)
            fused = own * fused + other * deeper
        fused = _resized(fused, size)
        return self.expand(fused), fused


def _resized(feature: Tensor, size: Sequence[int]) -> Tensor:
    """A feature map with the nearest pixels at `size`."""
    return feature if feature.shape[2:] == size else F.interpolate(feature, tuple(size), mode="nearest")


def _as_map(feature: Tensor) -> Tensor:
    """Pooled features `(B, C)` as a map of one pixel; maps as they are."""
    return feature[:, :, None, None] if feature.ndim == 2 else feature


class ReviewKD(DistillLoss):
    """Knowledge review: the student's feature maps, from the deepest to the first, are fused and compared.

    Each level's map is fused with what came from the deeper ones, weighted by attention, and then compared with the
    teacher's by `hcl_loss`. Levels may have any channels and sizes; pooled features count as maps of one pixel.

    Args:
        student_layers: Layers of the student that it reads, from the first to the deepest.
        teacher_layers: The teacher's, as many.
        max_mid_channels: What goes from level to level has as many channels as the student's deepest layer, and at most
            these.

    Raises:
        ValueError: If, in training, a layer returns neither a feature map nor pooled features.

    References:
        Chen et al.: Distilling Knowledge via Knowledge Review, CVPR 2021 (arXiv 2104.09044). As in the authors' code,
        the teacher's maps are those before the activation; so are, for ImageNet, the student's (`@preacts`), which for
        CIFAR-100 are those behind it. Their list of the student's layers begins with what the first stage reads, which
        no level then takes.
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
            raise ValueError(f"max_mid_channels must be at least 1, got {max_mid_channels}; 512 is usual")
        self.max_mid_channels = max_mid_channels

    def levels(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Student's and teacher's feature maps, the deepest first."""
        return [(_as_map(ours), _as_map(theirs)) for ours, theirs in reversed(self.pairs(student, teacher))]

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the fusions."""
        levels = self.levels(student.outputs, teacher.outputs)
        for ours, theirs in levels:
            check_dims("ReviewKD", 4, student=ours, teacher=theirs)
        channels = [(ours.shape[1], theirs.shape[1]) for ours, theirs in levels]
        middle = min(channels[0][0], self.max_mid_channels)
        self.fusions = nn.ModuleList(
            _Fusion(own, middle, other, is_deepest=depth == 0) for depth, (own, other) in enumerate(channels)
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `hcl_loss` over the levels."""
        deeper, losses = None, []
        for fusion, (ours, theirs) in zip(self.fusions, self.levels(student, teacher), strict=True):
            output, deeper = fusion(ours, deeper, theirs.shape[2:])
            losses.append(hcl_loss(output, theirs))
        return total(losses)
