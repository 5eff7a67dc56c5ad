"""Inter-channel correlation for knowledge distillation (ICKD)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lkd.losses._adapters import projections
from lkd.losses._precision import full_precision
from lkd.losses._shapes import check_shapes
from lkd.losses._unit_vectors import unit_vectors
from lkd.losses.base import DistillLoss, total
from lkd.types import Batch, Outputs, Probe


def _correlation(feature: Tensor) -> Tensor:
    """Return the Gram matrix of the channels with rows normalized to unit length `(B, C, C)`."""
    channels = feature.flatten(2)
    return unit_vectors(channels @ channels.mT, dim=2)


@check_shapes(student_feature="B C H W", teacher_feature="B C H' W'")
@full_precision
def ickd_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Squared difference of inter-channel correlation matrices.

    $$ \frac{1}{B C} \sum_i \lVert R(F_{s,i}) - R(F_{t,i}) \rVert_F^2, \quad
       R(F)_c = (F F^\top)_c \, / \, \lVert (F F^\top)_c \rVert_2, \quad F \in \mathbb{R}^{C \times HW} $$

    Args:
        student_feature: Student feature map `(B, C, H, W)`.
        teacher_feature: Teacher feature map `(B, C, H', W')`, possibly of another size.

    Returns:
        Scalar loss (float32 for half-precision inputs).

    References:
        Liu et al.: Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation, ICCV 2021
        (arXiv 2202.03680). The normalization of the rows follows the authors' code.

    Example:
        >>> import torch
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> ickd_loss(feature, 3 * feature).item() < 1e-10
        True
    """
    return (_correlation(student_feature) - _correlation(teacher_feature)).square().sum(2).mean()


class ICKD(DistillLoss):
    """Inter-channel correlation: match channel Gram matrices.

    The criterion implements ICKD-C, the variant of the paper for classification (see `ickd_loss`). The student's
    feature map passes through a 1x1 convolution with BatchNorm first.

    Args:
        student_layers: Student layers whose feature maps are compared; the losses are summed.
        teacher_layers: Teacher layers, one for each student layer; the sizes of the maps may differ.

    Raises:
        ValueError: At the start of training, if a layer does not return a feature map.

    References:
        Liu et al.: Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation, ICCV 2021
        (arXiv 2202.03680). The authors use the weight 2.5 for CIFAR-100.
    """

    reads_logits = False

    def __init__(
        self, student_layers: Sequence[str] = ("@last_stage",), teacher_layers: Sequence[str] = ("@last_stage",)
    ) -> None:
        super().__init__(student_layers, teacher_layers)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Create the connectors."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        self.connectors = projections(pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the sum of `ickd_loss` over the layers."""
        pairs = zip(self.connectors, self.pairs(student, teacher), strict=True)
        return total(
            [
                ickd_loss(connector(student_feature), teacher_feature)
                for connector, (student_feature, teacher_feature) in pairs
            ]
        )
