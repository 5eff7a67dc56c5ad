"""Structured knowledge distillation for segmentation: pair-wise term (SKDS)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lkd.losses._dense import enlarged
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


@check_shapes(student_feature="B C H W", teacher_feature="B D H W")
@full_precision
def skds_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Mean squared error between the cosine similarities of all pairs of pixels of an image.

    $$ \frac{1}{B M^2} \sum_{i, p, q} \left( \cos(f^s_{ip}, f^s_{iq}) - \cos(f^t_{ip}, f^t_{iq}) \right)^2,
       \quad M = H W $$

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, D, H, W)`.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Liu et al.: Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019 (arXiv 1903.04197).

    Example:
        >>> import torch
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> skds_loss(feature, 3 * feature).item() < 1e-12
        True
    """
    student, teacher = (unit_vectors(values.flatten(2), dim=1) for values in (student_feature, teacher_feature))
    return F.mse_loss(student.mT @ student, teacher.mT @ teacher)


class SKDS(DistillLoss):
    """Structured knowledge distillation for segmentation: match the similarities of pairs of regions.

    Both maps are max-pooled to a few regions, and the student matches the cosine similarities between all regions of an
    image (see `skds_loss`). The numbers of channels may differ. The losses of the layers are summed. If maps differ in
    size, the smaller one is interpolated to the size of the larger one.

    Args:
        student_layers: Student layers whose feature maps are compared.
        teacher_layers: Teacher layers, one for each student layer.
        pool_scale: Height and width of a region relative to those of the map, in (0, 1]: 0.5 results in 2x2 regions, or
            3x3 if the size is odd. `None` compares all pixels, which takes (H * W)² values per image.

    Raises:
        ValueError: If `pool_scale` is not in (0, 1]. At the start of training, if a layer does not return a feature
            map.

    References:
        Liu et al.: Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019 (arXiv 1903.04197). The
        authors use the weight 0.5 on Cityscapes, in addition to pixel-wise distillation and an adversarial term. Their
        second version of the code excludes the norms of the features from the gradient; this class uses the gradient of
        the formula, as their first version does.
    """

    needs_build = False  # `build` only checks the layers
    reads_logits = False

    def __init__(
        self,
        student_layers: Sequence[str] = ("@last_stage",),
        teacher_layers: Sequence[str] = ("@last_stage",),
        pool_scale: float | None = 0.5,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if pool_scale is not None and not 0 < pool_scale <= 1:
            raise ValueError(f"pool_scale must be greater than 0 and at most 1, or None, got {pool_scale}; use 0.5")
        self.pool_scale = pool_scale

    def build(self, student: Probe, teacher: Probe) -> None:
        """Check the shapes of the features."""
        self.pairs(student.outputs, teacher.outputs, dims=4)

    def _pooled(self, feature: Tensor) -> Tensor:
        """Max-pool a map to regions; partial regions at the border count."""
        if self.pool_scale is None:
            return feature
        window = [max(int(size * self.pool_scale), 1) for size in feature.shape[2:]]
        return F.max_pool2d(feature, window, window, ceil_mode=True)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `skds_loss` over the layers."""
        pairs = [enlarged(*pair) for pair in self.pairs(student, teacher)]
        return total([skds_loss(*map(self._pooled, pair)) for pair in pairs])
