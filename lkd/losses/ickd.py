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
    """Inner products of a feature map's channels, each row scaled to length 1: `(B, C, C)`."""
    channels = feature.flatten(2)
    return unit_vectors(channels @ channels.mT, dim=2)


@check_shapes(student_feature="B C H W", teacher_feature="B C H' W'")
@full_precision
def ickd_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""Squared difference of the channels' correlations.

    $$ \frac{1}{B C} \sum_i \lVert R(F_{s,i}) - R(F_{t,i}) \rVert_F^2, \quad
       R(F)_c = (F F^\top)_c \, / \, \lVert (F F^\top)_c \rVert_2, \quad F \in \mathbb{R}^{C \times HW} $$

    Args:
        student_feature: `(B, C, H, W)`.
        teacher_feature: `(B, C, H', W')`; sizes may differ.

    Returns:
        A scalar; float32 for features in half precision, else the features' type.

    References:
        Liu et al.: Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation, ICCV 2021
        (arXiv 2202.03680); the rows' scaling is the authors' code.

    Example:
        >>> import torch
        >>> feature = torch.rand(2, 8, 4, 4)
        >>> ickd_loss(feature, 3 * feature).item() < 1e-10
        True
    """
    return (_correlation(student_feature) - _correlation(teacher_feature)).square().sum(2).mean()


class ICKD(DistillLoss):
    """Inter-channel correlation: the student's channels are to be as like each other as the teacher's.

    The student's feature map goes through a 1x1 convolution with BatchNorm. It is the paper's ICKD-C, for
    classification.

    Args:
        student_layers: Layers of the student whose feature maps it reads; the losses are added.
        teacher_layers: The teacher's, as many; sizes may differ.

    Raises:
        ValueError: In training, if a layer returns no feature map.

    References:
        Liu et al.: Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation, ICCV 2021
        (arXiv 2202.03680), who weigh it with 2.5 for CIFAR-100.
    """

    reads_logits = False

    def __init__(
        self, student_layers: Sequence[str] = ("@last_stage",), teacher_layers: Sequence[str] = ("@last_stage",)
    ) -> None:
        super().__init__(student_layers, teacher_layers)

    def build(self, student: Probe, teacher: Probe) -> None:
        """Make the connectors."""
        pairs = self.pairs(student.outputs, teacher.outputs, dims=4)
        self.connectors = projections(pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of `ickd_loss` over the layers."""
        pairs = zip(self.connectors, self.pairs(student, teacher), strict=True)
        return total([ickd_loss(connector(ours), theirs) for connector, (ours, theirs) in pairs])
